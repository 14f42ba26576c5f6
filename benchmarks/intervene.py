"""What a table of edits costs: forward passes of the whole model, with and without sharing the prefix.

    python benchmarks/intervene.py                       # 8 edits at layers 3, 6 and 9 of 12
    python benchmarks/intervene.py --models gpt2 --tokens 512

Eight edits at layer l of L cost l / L + 8 (1 - l / L) forward passes (`edits`), and the baseline its own way through
the blocks behind l (`with baseline`). `shared` holds the head and the loss as well, which every edit needs: in `small
head`, a 12 x 768 Llama shape with 2,048 words, they cost as little as in a model of billions; of GPT-2 124M they are
40 %. Every approach runs on the same weights in one process and takes turns with one evaluation of the baseline;
printed are medians over the pairs. One thread. That sharing changes no number is checked first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from typing import Any

from side_by_side import machine, one_thread, pairs_of

one_thread()


def edits_at(layer: int, n: int) -> list[Any]:
    """Edits that change one entry of the first token each: as cheap as an edit can be."""
    from massact.trace import Edit

    def edit(i: int) -> Any:
        def apply(h: Any, batch: Any) -> Any:
            new = h.clone()
            new[:, 0, i] += 1
            return new

        return Edit(f"edit {i}", f"{layer}.resid_post", apply)

    return [edit(i) for i in range(n)]


def small_head(device: str) -> Any:
    """A 12 x 768 Llama shape with a small vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048,
        vocab_size=2048, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small head", "gpt2"], choices=["small head", "gpt2"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", nargs="+", type=int, default=[3, 6, 9])
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    import scan as scans

    import massact as ma

    print(f"{machine(args.device)}, Python {platform.python_version()}")
    for name in args.models:
        module = small_head(args.device) if name == "small head" else scans.build(name, args.device)
        model, ids = ma.load(module), scans.tokens(args.tokens, args.device).cpu() % 2048
        corpus = ma.corpus(ids)
        title = scans.MODELS.get(name, "12 x 768 Llama shape, 2,048 words, fp32")
        print(f"\n{title}, {args.tokens:,} tokens, {args.edits} edits; unit: one forward pass with loss")
        head = ("layer", 6), ("edits", 8), ("with baseline", 15), ("+ 10 %", 8), ("shared", 8), ("range", 14)
        print("".join(f"{word:>{width}s}" for word, width in head) + f"{'not shared':>12s}")
        for layer in args.layers:
            one_layer(model, corpus, layer, args)


def one_layer(model: Any, corpus: Any, layer: int, args: argparse.Namespace) -> None:
    """One row of the table."""
    import numpy as np

    from massact.interventions import evaluate
    from massact.interventions.watchers import Whole

    edits = edits_at(layer, args.edits)
    one, other = evaluate(model, corpus, edits), evaluate(model, corpus, edits, watcher=Whole())
    for edit in edits:
        np.testing.assert_array_equal(one.edited[edit.name]["nll"], other.edited[edit.name]["nll"])

    def ratios(n: int, share_prefix: bool) -> list[float]:
        pairs = pairs_of(
            lambda: evaluate(model, corpus, []),
            lambda: evaluate(model, corpus, edits, watcher=None if share_prefix else Whole()),
            n,
            args.device,
        )
        return [b / a for a, b in pairs]

    share = layer / model.anatomy.stacks[0].n_layers
    edits_alone = share + args.edits * (1 - share)
    bound = edits_alone + 1 - share
    shared, plain = ratios(args.pairs, True), ratios(max(1, args.pairs // 2), False)
    print(
        f"{layer:6d}{edits_alone:8.2f}{bound:15.2f}{1.1 * bound:8.2f}{statistics.median(shared):8.2f}"
        f"{min(shared):7.2f}-{max(shared):.2f} {statistics.median(plain):11.2f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
