"""What an attention variant costs: a whole training step over that of the same model with plain softmax.

    python benchmarks/train.py                                    # 512 tokens, every variant
    python benchmarks/train.py --variants kv-bias sink-logit --tokens 128 512 1024 --pairs 11
    python benchmarks/train.py --device cuda --dtype bf16 --batch 16 --tokens 1024

A step is the forward pass, the backward pass and AdamW, on random token ids: a llama of 4 layers, width 256, 4 heads of
64, vocabulary 2,048. One fresh process for each variant and length, in which the two models take turns (A B, B A, ...);
printed is the median over the pairs of wall(variant) / wall(softmax), and the lowest and highest pair. One thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

from side_by_side import ask, machine, one_thread, pairs_of

one_thread()

SHAPE = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4, "intermediate_size": 688}  # fmt: skip


def stepper(variant: str, args: argparse.Namespace) -> Callable[[], Any]:
    """One training step of a model with a variant; "softmax" leaves the model as it is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from massact.variants.application import apply_variant

    torch.manual_seed(0)
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    model = apply_variant(LlamaForCausalLM(LlamaConfig(**SHAPE)), variant).to(args.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.length), device=args.device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(args: argparse.Namespace) -> None:
    """One process: one variant, one JSON line."""
    import torch

    torch.set_num_threads(1)
    plain, other = stepper("softmax", args), stepper(args.variant, args)
    plain(), other(), plain(), other()
    print(json.dumps({"pairs": pairs_of(plain, other, args.pairs, args.device)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    from massact.variants.registry import VARIANTS

    print(f"{machine(args.device)}, Python {platform.python_version()}, {args.dtype}, batch {args.batch}")
    print(f"{'':20s}" + "".join(f"{t:>20,}" for t in args.tokens))
    rows = []
    for variant in args.variants or VARIANTS:
        line = f"{variant:20s}"
        for length in args.tokens:
            options = {"variant": variant, "length": length, "batch": args.batch, "dtype": args.dtype,
                       "device": args.device, "pairs": args.pairs}  # fmt: skip
            timed = ask(sys.executable, __file__, worker=True, **options)
            if "missing" in timed:
                line += f"  not measured ({timed['missing']})"
                continue
            ratios = [b / a for a, b in timed["pairs"]]
            line += f"{statistics.median(ratios):8.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
            rows.append(options | {"ratios": ratios})
        print(line, flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
