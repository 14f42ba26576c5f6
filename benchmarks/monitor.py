"""What the training monitor costs, beside a step without it.

Steps with and without the monitor's look take turns A B, B A, ... on the same model and batch; printed is the median
over the pairs of B / A, what that comes to for a look at every N-th step, and what the parts take.

    python benchmarks/monitor.py                        # a small GPT-2 and Llama shape on one CPU thread
    python benchmarks/monitor.py --shape gpt2-124m --batch 12 --tokens 1024 --device cuda --dtype bf16
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from side_by_side import machine, one_thread, pairs_of

one_thread()

SHAPES = {"gpt2-small": ("gpt2-124m", {"model.n_layer": 6, "model.n_embd": 384, "model.n_head": 6,
                                       "model.vocab_size": 8192}),
          "gpt2-124m": ("gpt2-124m", {}),
          "llama-small": ("llama-60m", {"model.num_hidden_layers": 6, "model.hidden_size": 384,
                                        "model.intermediate_size": 1024, "model.num_attention_heads": 6,
                                        "model.num_key_value_heads": 6, "model.vocab_size": 8192})}  # fmt: skip


def measure_cost(
    shape: str, batch: int, tokens: int, device: str, dtype: str, pairs: int, sequences: int
) -> dict[str, Any]:
    """Medians of the ratio of a watched to a plain step, of one shape."""
    import torch

    from massact.training import Monitor, TrainConfig
    from massact.training.components import Loss, build_model, build_optimizer

    torch.set_num_threads(1)
    name, options = SHAPES[shape]
    config = TrainConfig.of(name, **options)
    model = build_model(config).to(device).train()
    optimizer = build_optimizer(config, model)
    ids = torch.randint(0, 8000, (batch, tokens + 1), generator=torch.Generator().manual_seed(0)).to(device)
    monitor, loss = Monitor(model, every=1, sequences=sequences), Loss()

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            out = model(input_ids=ids[:, :-1])
            value = loss(out, ids[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def watched() -> None:
        with monitor:
            step()
        monitor.step()

    step()
    watched()
    found = pairs_of(step, watched, pairs, device)
    ratios = [b / a for a, b in found]
    return {"plain_s": statistics.median(a for a, _ in found), "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios)}  # fmt: skip


def main() -> None:
    """Print one line for each shape."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=SHAPES, nargs="*", default=["gpt2-small", "llama-small"])
    for name, value in (("batch", 4), ("tokens", 256), ("pairs", 8), ("sequences", 4), ("every", 100)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    a = p.parse_args()
    print(f"{machine(a.device)}; {a.batch} x {a.tokens} tokens a step, {a.dtype}, a look every {a.every} steps")
    for shape in a.shape:
        r = measure_cost(shape, a.batch, a.tokens, a.device, a.dtype, a.pairs, a.sequences)
        span = f"{r['ratio']:.3f} ({r['least']:.3f} to {r['most']:.3f})"
        cost = 100 * (r["ratio"] - 1) / a.every
        print(f"{shape}: step {r['plain_s']:.3f} s; watched / plain {span}; at N = {a.every}: {cost:.3f} %")


if __name__ == "__main__":
    main()
