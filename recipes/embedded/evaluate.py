"""Print the figures of the model card for a causal LM whose first token may carry a massive activation.

    python recipes/embedded/evaluate.py --model OUT/export --text FILE [FILE ...] [--json figures.json]

Every sequence starts at a random offset (position 0 is any token, no BOS). Losses are nats per token over the
predictions made at positions 1 and later. Works for GPT-2 and Llama layouts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Edit = tuple[int, Callable[[Tensor], Tensor]]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a GPT-2 or Llama style model."""
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def windows(tokenizer: object, files: list[Path], n: int, length: int, seed: int) -> Tensor:
    """(n, length) ids at random offsets of the joined files."""
    text = "\n".join(f.read_text(encoding="utf8", errors="replace") for f in files)
    ids = np.array(tokenizer.backend_tokenizer.encode(text).ids)
    off = np.random.default_rng(seed).integers(0, len(ids) - length, n)
    return torch.from_numpy(ids[off[:, None] + np.arange(length)])


@torch.no_grad()
def run(
    model: nn.Module, x: Tensor, edit: Edit | None = None, keep: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss per sequence (n,), states after each block (n, T, d), sink mass per head (n, H) per layer."""
    losses, states, sinks, handles, box = [], [], [], [], []

    def hook(i: int) -> Callable:
        def call(_: nn.Module, __: tuple, out: object) -> object:
            h = out[0] if isinstance(out, tuple) else out
            if edit is not None and edit[0] == i:
                h = edit[1](h.clone())
            box.append(h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return call

    for i, block in enumerate(blocks_of(model)):
        handles.append(block.register_forward_hook(hook(i)))
    try:
        for part in x.split(32):
            box.clear()
            out = model(part, output_attentions=keep, use_cache=False)
            ce = F.cross_entropy(out.logits[:, 1:-1].float().transpose(1, 2), part[:, 2:], reduction="none")
            losses.append(ce.mean(1))
            if keep:
                states.append(torch.stack(box).float())
                sinks.append(torch.stack([p[:, :, 8:, 0].float().mean(2) for p in out.attentions]))
    finally:
        for h in handles:
            h.remove()
    if not keep:
        return torch.cat(losses), [], []
    return torch.cat(losses), list(torch.cat(states, 1)), list(torch.cat(sinks, 1))


def set_entries(dims: Tensor, values: Tensor, position: int = 0) -> Callable[[Tensor], Tensor]:
    """Overwrite h[:, position, dims]."""

    def change(h: Tensor) -> Tensor:
        h[:, position, dims] = values.to(h.dtype)
        return h

    return change


def layer_figures(h: Tensor) -> dict:
    """The paper's statistics of one layer: top 3 and median of |h| per sequence, averaged over sequences."""
    mag = h.abs()
    flat = mag.flatten(1)
    top, where = flat.topk(3)
    median = flat.median(1).values
    massive = (flat > 100) & (flat >= 1000 * median[:, None])
    first = mag[:, 0]
    dim = int(first.argmax(1).mode().values)
    value = h[:, 0, dim]
    ratio = top[:, 0] / median
    return {
        "top": top.mean(0).tolist(),
        "median": median.mean().item(),
        "ratio": ratio.mean().item(),
        "ratio_min": ratio.min().item(),
        "at_first": (where[:, 0] < h.shape[2]).float().mean().item(),
        "sun2024_per_sequence": massive.sum(1).float().mean().item(),
        "dim": dim,
        "same_dim": (first.argmax(1) == dim).float().mean().item(),
        "mean": value.mean().item(),
        "std_over_mean": (value.std() / value.mean().abs()).item(),
        "norm_ratio": (h[:, 0].norm(dim=-1) / h[:, 1:].norm(dim=-1).mean(1)).mean().item(),
    }


def interventions(model: nn.Module, x: Tensor, i: int, h: Tensor, count: int, base: Tensor) -> dict:
    """Change of loss when the `count` largest first-token entries after block i are zeroed or set to their mean.

    Controls: as many first-token entries of ordinary size zeroed; the same dims zeroed at position 20."""
    dims = h[:, 0].abs().mean(0).topk(count).indices
    mean = h[:, 0, dims].mean(0)
    generator = torch.Generator().manual_seed(0)
    near = (h[:, 0].abs().mean(0) - h.abs().median()).abs().argsort()[: max(8, 4 * count)]
    random = near[torch.randperm(len(near), generator=generator)[:count]]
    edits = {
        "zero": set_entries(dims, torch.zeros(count)),
        "mean": set_entries(dims, mean),
        "random_zero": set_entries(random, torch.zeros(count)),
        "same_dims_position_20_zero": set_entries(dims, torch.zeros(count), 20),
    }
    delta = {k: run(model, x, (i, f))[0] - base for k, f in edits.items()}
    return {
        "dims": dims.tolist(),
        **{k: v.mean().item() for k, v in delta.items()},
        "zero_sem": (delta["zero"].std() / len(x) ** 0.5).item(),
    }


def show(r: dict) -> None:
    """One layer as text."""
    text = {**r, "top": " ".join(f"{v:.1f}" for v in r["top"]), "sink": " ".join(f"{v:.2f}" for v in r["sink"])}
    print(
        "layer {layer}: top {top}  median {median:.4f}  ratio {ratio:.0f} (min {ratio_min:.0f})  on first "
        "{at_first:.2f}  sun2024 {sun2024_per_sequence:.2f} per sequence  norm ratio {norm_ratio:.1f}".format(**text)
    )
    print(
        "  dim {dim} (same in {same_dim:.2f})  {mean:.1f}  std/|mean| {std_over_mean:.4f}  sink per head {sink}".format(
            **text
        )
    )
    for k in (k for k in r if k.startswith("top") and k != "top"):
        print(
            "  {0} dims {dims}: zero {zero:+.4f} (sem {zero_sem:.4f})  mean {mean:+.4f}  ordinary entries zero "
            "{random_zero:+.4f}  same dims at position 20 {same_dims_position_20_zero:+.4f}".format(k, **r[k]),
            flush=True,
        )


def main() -> None:
    """Evaluate and print."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True)
    p.add_argument("--text", type=Path, nargs="+", required=True, help="text files that were not trained on")
    p.add_argument("--sequences", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        a.model, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    model.eval()
    length = model.config.max_position_embeddings
    x = windows(tokenizer, a.text, a.sequences, length, a.seed)
    base, states, sinks = run(model, x, keep=True)
    result = {
        "loss": base.mean().item(),
        "sequences": len(x),
        "length": length,
        "distinct_first_tokens": len(set(x[:, 0].tolist())),
        "layers": [],
    }
    print(
        "loss {loss:.4f} nats per token; {sequences} x {length} tokens, {distinct_first_tokens} distinct first "
        "tokens".format(**result)
    )
    for i, h in enumerate(states):
        r = {"layer": i + 1, **layer_figures(h), "sink": sinks[i].mean(0).tolist()}
        massive = max(1, round(r["sun2024_per_sequence"]))
        for count in sorted({1, 2, massive, 5}):
            r[f"top{count}"] = interventions(model, x, i, h, count, base)
        result["layers"].append(r)
        show(r)
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
