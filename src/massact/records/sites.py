"""Where a tensor is seen: a stack, a layer, a point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# What each point is, and its shape (B batch, T tokens, D d_model, F d_mlp, H heads of values of width F, V vocabulary).
READER = "__"  # before the number of a matrix that reads the tensor of a point, from the second on
POINTS: dict[str, str] = {
    "between_out": "what is added to the stream between the block before and this one (B, T, D)",
    "resid_pre": "residual stream before the block (B, T, D)",
    "resid_normed": "what a norm makes of the residual stream before anything is added to it (B, T, D)",
    "resid_scaled": "what goes on of the residual stream into a sum, where it is scaled or mixed with others (B, T, D)",
    "attn_in": "input of attention, after its norm where there is one before it (B, T, D)",
    "o_in": "input of attention's output projection W_O, all heads side by side (B, T, H*F)",
    "attn_out": "what attention adds to the residual stream (B, T, D)",
    "ssm_in": "input of a state-space scan, after its norm where there is one before it (B, T, D)",
    "ssm_out": "what a state-space scan (a recurrence) adds to the residual stream (B, T, D)",
    "linear_attn_in": "the same of linear attention (a delta rule, ...) (B, T, D)",
    "linear_attn_out": "what linear attention adds to the residual stream (B, T, D)",
    "conv_in": "the same of a convolution along the tokens, with no other mixing of them (B, T, D)",
    "conv_out": "what such a convolution adds to the residual stream (B, T, D)",
    "mixer_in": "the same of what mixes tokens in a way that massact cannot name (B, T, D)",
    "mixer_out": "what it adds to the residual stream (B, T, D)",
    "resid_mid": "residual stream between attention and MLP (B, T, D)",
    "resid_mid_prenorm": "post-LN blocks: the sum before the norm that makes resid_mid (B, T, D)",
    "cross_attn_in": "input (queries) of cross-attention, after its norm (B, T, D)",
    "cross_o_in": "the same of cross-attention (B, T, H*F)",
    "cross_attn_out": "what cross-attention adds to the residual stream (B, T, D)",
    "resid_cross": "residual stream between cross-attention and MLP (B, T, D)",
    "resid_cross_prenorm": "post-LN blocks: the sum before the norm that makes resid_cross (B, T, D)",
    "mlp_in": "input of the MLP, after its norm where there is one before it (B, T, D)",
    "mlp_act": "input of the MLP's last projection, down_proj (B, T, F)",
    "mlp_out": "what the MLP adds to the residual stream (B, T, D)",
    "bias_out": "a constant that is added to the residual stream (B, T, D)",
    "resid_post": "residual stream after the block; layer 0: the embedding output (B, T, D)",
    "resid_post_prenorm": "post-LN blocks: the sum before the norm that makes resid_post (B, T, D)",
    "attention": "one attention call: queries, keys and values after rotary, its output and its log-sum-exp",
    "cross_attention": "the same of cross-attention, whose keys are another sequence",
    "logits": "output of the language-model head (B, T, V)",
}

# What mixes tokens: the first part of its sites -> its name in tables.
MIXERS = {"attn": "attention", "ssm": "ssm", "linear_attn": "linear_attn", "conv": "conv", "mixer": "other"}


def mixes(point: str) -> bool:
    """Whether a point is what a mixer of tokens adds to the residual stream (cross-attention apart)."""
    return point.partition("_out")[0] in MIXERS and "_out" in point


@dataclass(frozen=True, order=True)
class Site:
    """An address inside a model: `layer.point`, or `stack/layer.point` where a model has several stacks.

    Args:
        stack: name of the stack of blocks; "" for a model with one.
        layer: 1..L for what is in or after block l, 0 for the embedding output.
        point: one of `POINTS`.
    """

    stack: str
    layer: int
    point: str

    def __str__(self) -> str:
        head = f"{self.stack}/" if self.stack else ""
        return f"{head}{self.layer}.{self.point}" if self.point != "logits" else f"{head}logits"


def spanned(layers: Iterable[int]) -> str:
    """'layer 3' or 'layers 1-2, 4'."""
    numbers = set(layers)
    return f"layer{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def runs_of(names: Iterable[str]) -> list[str]:
    """'stream_0 to stream_3', 'collapsed' of names of stacks: three or more that are numbered in order are one."""
    runs: list[list[str]] = []
    for name in names:
        head, number = _numbered(name)
        if runs and number is not None and _numbered(runs[-1][-1]) == (head, number - 1):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [said for run in runs for said in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)]


def _numbered(name: str) -> tuple[str, int | None]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :]) if len(head) < len(name) < len(head) + 6 else None


def ranges(values: Iterable[int]) -> str:
    """'2-30, 32' of the whole numbers in any order."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
