"""What attention statistics cost over the attention call alone, and a whole explanation over the bare forward pass.

    python benchmarks/attention.py                                # one call: 1k to 16k tokens, fp32 and bf16
    python benchmarks/attention.py --tokens 4096 --dtypes bf16 --approaches chosen all_keys
    python benchmarks/attention.py --whole-model                  # `explain` over the bare forward pass
    python benchmarks/attention.py --device cuda --dtypes bf16 --tokens 32768 131072

One call: the baseline is `F.scaled_dot_product_attention`, causal. Every approach also gives its output.

    chosen      exact probabilities of 8 chosen keys for every query, from the log-sum-exp
    parts       chosen, and the output split into the update from these keys and the rest
    all_keys    the exact mass on every key and the entropy: one more call of the kernel, keys and queries swapped
    explain     everything that `explain` measures of one layer (HeadStats), all keys included
    eager       transformers' eager attention with its T x T weights, and the mean mass on every key

Time: one fresh process for each approach, which takes turns with the baseline on the same tensors; printed is the
median over the pairs of wall(B) / wall(A). Memory: one fresh process each, peak beyond the inputs; `x2` is its growth
when T doubles. 12 heads up to 4,096 tokens, fewer beyond. One thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

from side_by_side import ask, machine, one_thread, pairs_of, peak_mb

one_thread()

HEADS = {8192: 4, 16384: 2}  # the work is per head, memory is not unlimited
N_KEYS, E = 8, 64
Call = Callable[[Any, Any, Any], Any]


def heads_at(tokens: int) -> int:
    return 12 if tokens <= 4096 else HEADS.get(tokens, 1)


def inputs(tokens: int, dtype: str, device: str) -> Any:
    """Random q, k, v (1, H, T, E) with a sink: every query likes key 0, which has a small value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads_at(tokens), tokens, E, generator=generator) for _ in range(3))
    q[..., 0] += 2
    k[:, :, 0], v[:, :, 0] = 0.1 * k[:, :, 0], 0.05 * v[:, :, 0]
    k[:, :, 0, 0] += 24
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    return tuple(x.to(device, kind) for x in (q, k, v))


# -------------------------------------------------------------------------------------------- approaches
def sdpa(q: Any, k: Any, v: Any) -> Any:
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attended(q: Any, k: Any, v: Any) -> Any:
    """The call as a tap sees it: the same kernel, asked for its log-sum-exp as well."""
    from massact.stats.attention_call import Attended, fused_attention

    out, lse = fused_attention(q, k, v, None, True, E**-0.5)
    return Attended(q[0], k[0], v[0], out[0], lse[0], E**-0.5, causal=True, forward=True)


def keys(q: Any) -> Any:
    import torch

    return torch.linspace(0, q.shape[2] // 2, N_KEYS, device=q.device).long()


def chosen(q: Any, k: Any, v: Any) -> Any:
    a = attended(q, k, v)
    return a.out_HTF, a.probs(keys(q)).mean((0, 1))


def parts(q: Any, k: Any, v: Any) -> Any:
    import torch

    a, at = attended(q, k, v), keys(q)
    p_HTC = a.probs(at)
    update_HTF = torch.matmul(p_HTC.to(q.dtype), a.values(at).to(q.dtype))
    return p_HTC.mean((0, 1)), update_HTF, a.out_HTF - update_HTF


def all_keys(q: Any, k: Any, v: Any) -> Any:
    a = attended(q, k, v)
    return a.out_HTF, a.columns()


def explain(q: Any, k: Any, v: Any) -> Any:
    from massact.stats.heads import HeadStats, Targets
    from massact.stats.protocol import Where

    found, others = keys(q).tolist(), list(range(10, 42))
    stats = HeadStats(Targets({0: found}, {0: [i + 1 for i in found]}, {0: others}))
    stats.update(attended(q, k, v), Where(0))
    return stats.result()


def eager(q: Any, k: Any, v: Any) -> Any:
    import torch
    from transformers.models.llama.modeling_llama import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups, training = 1, False

    hidden = torch.full((q.shape[2],) * 2, torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    out, weights = eager_attention_forward(Module(), q, k, v, hidden[None, None], scaling=E**-0.5)
    return out, weights.mean((0, 1, 2), dtype=torch.float32)


APPROACHES: dict[str, Call] = {
    "chosen": chosen, "parts": parts, "all_keys": all_keys, "explain": explain, "eager": eager}  # fmt: skip


# ------------------------------------------------------------------------------------------------ whole model
def explain_model(name: str, device: str) -> tuple[Callable[[Any], Any], dict[str, Callable[[Any], Any]]]:
    """The bare forward pass of a model of `scan.py`, and explanations of it: of findings alone, and of all keys."""
    import scan as scans

    import massact as ma
    from massact.explanations.job import measured_tables
    from massact.models import with_attention
    from massact.verbs.explain import ExplainConfig

    model = scans.build(name, device)
    loaded = with_attention(ma.load(model))
    found: dict[int, Any] = {}

    def run(columns: bool) -> Callable[[Any], Any]:
        def one(ids: Any) -> Any:
            corpus = ma.corpus(ids)
            if len(ids[0]) not in found:
                found[len(ids[0])] = ma.scan(loaded, corpus, null=False, bos_contrast=False, rank_sequences=0)
            return measured_tables(loaded, corpus, found[len(ids[0])], ExplainConfig(columns=columns))

        return one

    return scans.bare(model), {"findings": run(False), "all_keys": run(True)}


# ------------------------------------------------------------------------------------------------ worker
def worker(args: argparse.Namespace) -> None:
    """One process: one approach, one JSON line."""
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        if args.approach.startswith("model:"):
            import scan as scans

            _, name, kind = args.approach.split(":")
            bare, runs = explain_model(name, args.device)
            ids = scans.tokens(args.length, args.device)
            bare(ids), runs[kind](ids)
            pairs = pairs_of(lambda: bare(ids), lambda: runs[kind](ids), args.pairs, args.device)
            print(json.dumps({"pairs": pairs}))
            return
        run = sdpa if args.approach == "sdpa" else APPROACHES[args.approach]
        run(*inputs(256, args.dtype, args.device))
        qkv = inputs(args.length, args.dtype, args.device)
        if args.memory:
            print(json.dumps({"extra_mb": peak_mb(lambda: run(*qkv), args.device)}))
            return
        if args.length <= 4096:
            sdpa(*qkv), run(*qkv)
        print(json.dumps({"pairs": pairs_of(lambda: sdpa(*qkv), lambda: run(*qkv), args.pairs, args.device)}))


def _ratios(given: dict[str, Any]) -> list[float]:
    return [b / a for a, b in given["pairs"]]


def one_call(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of one attention call."""
    rows = []
    for dtype in args.dtypes:
        print(f"\n{dtype}, one causal call of width {E}\n{'':10s}" + "".join(f"{t:>24,}" for t in args.tokens))
        print(f"{'':10s}" + f"{'time':>9s}{'MB':>8s}{'x2':>7s}" * len(args.tokens))
        for approach in ("sdpa", *args.approaches):
            line, before = f"{approach:10s}", None
            for length in args.tokens:
                options = {"device": args.device, "approach": approach, "length": length, "dtype": dtype}
                timed = ask(sys.executable, __file__, worker=True, pairs=args.pairs, **options)
                held = ask(sys.executable, __file__, worker=True, memory=True, **options)
                if "missing" in timed or "missing" in held:
                    line += f"{'no memory':>24s}"
                    continue
                per_head = held["extra_mb"] / heads_at(length)
                grown = "" if before is None else f"{per_head / before:.1f}"
                line += f"{statistics.median(_ratios(timed)):9.3f}{held['extra_mb']:8.0f}{grown:>7s}"
                before = per_head
                rows.append(options | {"ratios": _ratios(timed), "extra_mb": held["extra_mb"]})
            print(line, flush=True)
    return rows


def whole_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of a whole explanation over the bare forward pass."""
    import scan as scans

    rows = []
    for name, title in scans.MODELS.items():
        for length in args.tokens:
            line = f"{title}, {length:,} tokens:"
            for kind in ("findings", "all_keys"):
                options = {"device": args.device, "approach": f"model:{name}:{kind}", "length": length}
                timed = ask(sys.executable, __file__, worker=True, pairs=args.pairs, **options)
                if "missing" in timed:
                    line += f"  {kind} not measured ({timed['missing']})"
                    continue
                ratios = _ratios(timed)
                line += f"  {kind} {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                rows.append(options | {"ratios": ratios})
            print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), choices=list(APPROACHES))
    parser.add_argument("--whole-model", action="store_true", help="explain over the bare forward pass")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--approach", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    args.tokens = args.tokens or ([1024, 2048] if args.whole_model else [1024, 4096, 8192, 16384])
    print(f"{machine(args.device)}, Python {platform.python_version()}")
    rows = whole_model(args) if args.whole_model else one_call(args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
