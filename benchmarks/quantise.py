"""What a table of schemes costs: forward passes, the rounding itself, and what massact adds to both.

    python benchmarks/quantise.py                                  # small head and GPT-2 shapes, 256 tokens
    python benchmarks/quantise.py --models gpt2 --tokens 512 --pairs 5 --device cuda

n schemes are n + 1 forward passes with loss (the first in full precision), each with the rounding of its sites.
`rounding` is torchao's functions alone on what passes these sites; `floor` = forward + rounding; `hooks` a script of
forward pre-hooks on every Linear, as one would write it by hand (queries, keys and values round the same input three
times); `massact` the pass of `evaluate`, with exemption, proof that it fired, and the errors of every layer in two
columns. `last block` is a scheme there alone: earlier blocks run once for all. Every approach runs on the same weights
in one process and takes turns with the bare forward; printed are medians over the pairs, in units of the bare forward
with loss. One thread. That massact and the hooks give the same loss is checked first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

from side_by_side import machine, one_thread, pairs_of, peak_mb

one_thread()
SCHEMES = ("int8-tensor", "int8-token", "fp8-tensor", "int4-group32", "int8-tensor+hadamard", "nvfp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small head", "gpt2"], choices=["small head", "gpt2"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    import intervene
    import scan as scans

    import massact as ma

    print(f"{machine(args.device)}, Python {platform.python_version()}")
    for name in args.models:
        module = intervene.small_head(args.device) if name == "small head" else scans.build(name, args.device)
        model, ids = ma.load(module), scans.tokens(args.tokens, args.device).cpu() % 2048
        title = scans.MODELS.get(name, "12 x 768 Llama shape, 2,048 words, fp32")
        print(f"\n{title}, {args.tokens:,} tokens; unit: one forward pass with loss")
        head = ("rounding", 10), ("floor", 8), ("hooks", 8), ("massact", 9), ("range", 14), ("/ floor", 9), ("MB", 8)
        print(f"{'scheme':24s}" + "".join(f"{word:>{width}s}" for word, width in head))
        for scheme in args.schemes:
            one_scheme(model, ma.corpus(ids), scheme, args)


def one_scheme(model: Any, corpus: Any, name: str, args: argparse.Namespace) -> None:
    """One row of the table, and another of the last block alone."""
    from massact.interventions import evaluate
    from massact.quantisation.deviations import Propagated
    from massact.quantisation.linears import linears_of
    from massact.quantisation.massive_tokens import MassiveTokens
    from massact.quantisation.roundings import Prepared, calibrate, edit_of
    from massact.quantisation.schemes import scheme

    made, massive = scheme(name), MassiveTokens(("0@start",), {0: {0: 0}})
    ready = calibrate(Prepared(model, "", linears_of(model, ""), massive), corpus, [made], 1, lambda *_: None)
    inside = [(layer, site) for layer in range(1, model.anatomy.stacks[0].n_layers) for site in made.sites]
    edit, last = edit_of(ready, made), edit_of(ready, made.without(inside), "last block")

    def ours() -> Any:
        return evaluate(model, corpus, [edit], watcher=Propagated("", massive))

    hooks = by_hooks(ready, made)
    with hooks() as nll:
        found = ours().edited[made.name]["nll"]
        assert abs(float(found[0]) - nll(corpus)) < 5e-3, (name, found, nll(corpus))
    bare = lambda: evaluate(model, corpus, [])  # noqa: E731
    turns = {
        "rounding": rounding_alone(ready, made, corpus),
        "hooks": lambda: run_hooks(hooks, corpus),
        "massact": ours,
        "last": lambda: evaluate(model, corpus, [last]),
    }
    ratio = {k: [b / a for a, b in pairs_of(bare, run, args.pairs, args.device)] for k, run in turns.items()}
    middle = {k: statistics.median(v) for k, v in ratio.items()}
    floor = 1 + middle["rounding"]
    own = [x - 1 for x in ratio["massact"]]  # without the pass in full precision
    extra = peak_mb(ours, args.device) - peak_mb(bare, args.device)
    print(
        f"{name:24s}{middle['rounding']:10.2f}{floor:8.2f}{middle['hooks']:8.2f}{statistics.median(own):9.2f}"
        f"{min(own):7.2f}-{max(own):.2f}{statistics.median(own) / floor:10.2f}{extra:8.0f}"
        f"   last block {middle['last'] - 1:.2f}", flush=True,
    )  # fmt: skip


def rounding_alone(ready: Any, made: Any, corpus: Any) -> Callable[[], Any]:
    """The rounding of everything that passes the sites of one pass."""
    import torch

    from massact.quantisation.linears import point_of
    from massact.quantisation.roundings import rounding_at
    from massact.trace import Edit, observing

    held: dict[Any, Any] = {}
    sites = [s for s in ready.linears.widths if point_of(s) in made.sites]

    def keep(site: Any) -> Any:
        return Edit("keep", str(site), lambda h, _: (held.__setitem__(site, h.clone()), h)[1])

    batch = next(iter(corpus.batches(1)))
    looks = [keep(site) for site in sites]
    with torch.inference_mode(), observing(ready.model, (), looks, batch=batch, lenient=("edits",)) as seen:
        ready.model.run(batch.inputs, places=seen.places)
    roundings = {site: rounding_at(ready, made, site) for site in sites}

    def run() -> None:
        with torch.inference_mode():
            for site, x in held.items():
                roundings[site](x[0, 1:])

    return run


def by_hooks(ready: Any, made: Any) -> Callable[[], Any]:
    """A script of hooks: the same rounding before every module that reads a site; a `with` that gives a loss."""
    from contextlib import contextmanager

    import torch

    from massact.quantisation.roundings import rounding_at

    @contextmanager
    def installed() -> Any:
        handles = []
        for site, names in ready.linears.readers.items():
            rounding = rounding_at(ready, made, site)
            for name in names if rounding is not None else ():

                def hook(_: Any, args: Any, rounding: Any = rounding) -> Any:
                    spared = made.spares
                    rest = rounding(args[0][0, 1:] if spared else args[0][0])[None]
                    return (torch.cat([args[0][:, :1], rest], 1) if spared else rest,)

                handles.append(ready.model.module.get_submodule(name).register_forward_pre_hook(hook))

        def nll(corpus: Any) -> float:
            ids = corpus.inputs["input_ids"].to(ready.model.device)
            with torch.inference_mode():
                logits = ready.model.module(input_ids=ids).logits.float()
            return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))

        try:
            yield nll
        finally:
            for handle in handles:
                handle.remove()

    return installed


def run_hooks(hooks: Callable[[], Any], corpus: Any) -> None:
    """One pass of the script."""
    with hooks() as nll:
        nll(corpus)


if __name__ == "__main__":
    sys.exit(main())
