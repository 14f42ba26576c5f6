"""Window attention with the first tokens kept: what a cache of fixed size would still hold (Xiao 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from massact.records.errors import UserError
from massact.stats.attention_call import Attended
from massact.trace import AttentionEdit

_BLOCK_VALUES = 1 << 20  # logits of one block of queries
_HIDDEN = -3e4  # a logit below this is a hidden key: the least value of half precision is -65,504


def window(width: int, keep: int = 0, site: str = "*.attention") -> AttentionEdit:
    """Every query sees the first keys and the last ones only, `width` of them in all, and the softmax is theirs.

    Query t attends to the keys 0 .. keep - 1 and t - (width - keep) + 1 .. t:
        out_t = sum over them of exp(s) v / (sum over them of exp(s) + exp(b)),  b a learned sink, where there is one.
    What the model's own mask hides stays hidden; a query that sees nothing gives zero. A query that loses no key keeps
    the model's own output bit for bit. In blocks of queries: O(T width) work, no T x T matrix.

    Positions are those of the text, not counted anew in the cache, and are counted from the first one of the batch:
    give texts that are padded on the left one at a time.

    Args:
        width: keys that a query sees, at least 1.
        keep: of these, how many are the first of the text; 0 to width.
        site: a glob over attention sites.

    Raises:
        UserError: width or keep out of range; when it runs: attention that is not causal, that reads a cache or another
            sequence, or of which the values or the logits were not seen.
    Source: Xiao 2023, Section 3.
    """
    if width < 1:
        raise UserError(f"A window of {width} keys.", do="Use a width of 1 or more.")
    if not 0 <= keep <= width:
        raise UserError(f"A window of {width} keys cannot keep {keep} first ones.", do=f"Keep 0 to {width}.")

    def apply(a: Attended) -> Tensor:
        _check(a)
        assert a.out_HTF is not None
        H, T, _ = a.shape
        new_HTF = a.out_HTF.float().clone()
        rows = max(1, min(width, _BLOCK_VALUES // (H * 2 * width)))
        for start in range(width, T, rows):  # the queries before have lost nothing
            at_R = torch.arange(start, min(T, start + rows), device=a.device)
            lost_R = _loses(a, at_R, width - keep, keep)
            out_HRF = _block(a, at_R, width - keep, keep)
            new_HTF[:, at_R] = torch.where(lost_R[:, None], out_HRF, new_HTF[:, at_R])
        return new_HTF

    return AttentionEdit(f"window {width}, first {keep} kept", site, apply)


def _check(a: Attended) -> None:
    H, T, S = a.shape
    reason = ""
    if not a.forward:
        reason = "its queries see the keys behind them, so it has no last keys"
    elif T != S:
        reason = f"it has {T} queries and {S} keys: a cache, or another sequence"
    elif a.v_KSF is None or a.out_HTF is None:
        reason = "its values or its output were not seen"
    elif a.v_KSF.shape[1] != S or H % len(a.v_KSF):
        reason = f"its values {tuple(a.v_KSF.shape)} do not belong to {S} keys of {H} heads"
    if reason:
        raise UserError("A window cannot be laid over this attention.", f"For {reason}.")


def _loses(a: Attended, at_R: Tensor, last: int, keep: int) -> Tensor:
    """Which queries lose a key that their own mask shows them: (R,) bool."""
    lost_R = at_R >= keep + last
    mask = a.mask_HTS
    if mask is None or not bool(lost_R.any()):
        return lost_R
    key_S = torch.arange(a.shape[2], device=a.device)
    gone_RS = (key_S >= keep) & (key_S <= at_R[:, None] - last)
    mine = mask if mask.shape[1] == 1 else mask[:, at_R]
    return (gone_RS & (mine > _HIDDEN).any(0)).any(-1)


def _block(a: Attended, at_R: Tensor, last: int, keep: int) -> Tensor:
    """Output of some queries: float32 (H, R, F)."""
    first, end = int(at_R[0]), int(at_R[-1]) + 1
    recent = torch.arange(max(keep, first - last + 1), end, device=a.device)
    keys_C = torch.cat([torch.arange(min(keep, end), device=a.device), recent])
    seen_RC = (keys_C <= at_R[:, None]) & ((keys_C < keep) | (keys_C > at_R[:, None] - last))
    s_HRC = a.logits(at_R, keys_C)
    s_HRC = s_HRC.masked_fill(~seen_RC | (s_HRC < _HIDDEN), -math.inf)
    norm_HR = s_HRC.logsumexp(-1)
    if a.sink_H is not None:
        norm_HR = torch.logaddexp(norm_HR, a.sink_H.float()[:, None])
    p_HRC = (s_HRC - norm_HR.nan_to_num(neginf=0.0)[..., None]).exp_()
    return torch.matmul(p_HRC, a.values(keys_C))
