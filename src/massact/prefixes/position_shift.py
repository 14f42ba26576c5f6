"""How a model counts positions, found by experiment: whether only distances matter, or which table is read.

Shapes: B sequences, T tokens, V vocabulary, N rows of a table, D width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from massact.models import Model
from massact.prefixes.refusals import MOST_SLOTS, refused, title_of
from massact.trace import unchanged

N_TOKENS = 12
SHIFTED = 5  # positions further on
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_MOST_OFFSET = 8  # rows of a table before that of position 0


@dataclass(frozen=True)
class Positions:
    """How a model counts positions.

    Args:
        way: "relative" (only distances matter: rotary), "unsaid" (the model takes no `position_ids`; the proof tells),
            or "table" (a learned vector for each).
        table: dotted path of the table; offset: its row for position 0.
    """

    way: str
    table: str = ""
    offset: int = 0

    def before(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """What a prefix of n tokens is run with, so that text that counts from 0 sees it at the right distance."""
        return {"position_ids": torch.arange(-n, 0, device=device)[None]} if self.way == "relative" else {}

    def shift(self, module: nn.Module, n: int) -> None:
        """Move a table by n rows, in place, so that position 0 is what position n was; the context is n shorter."""
        if self.way != "table":
            return
        table: Any = module.get_submodule(self.table)
        weight = table.weight.detach()
        kept = torch.cat([weight[: self.offset], weight[self.offset + n :]]).clone()
        table.weight, table.num_embeddings = nn.Parameter(kept, table.weight.requires_grad), len(kept)
        config: Any = module.config
        size = len(weight) - self.offset
        for name in _CONTEXT:
            if getattr(config, name, None) == size:
                setattr(config, name, size - n)


def logits_at(model: Model, module: nn.Module, ids_BT: Tensor, **more: Any) -> Tensor:
    """Logits (B, T, V) of one pass without a cache; `module` may be another one than the model's."""
    given: dict[str, Any] = {"input_ids": ids_BT.to(model.device), "use_cache": False} | model.arguments | more
    with torch.inference_mode(), unchanged(module):
        return module(**given).logits


def allowed_of(dtype: torch.dtype, exact: float) -> float:
    """How far apart logits may be that are equal but for rounding, over the greatest: `exact` in 32 bits."""
    return exact if dtype in (torch.float32, torch.float64) else max(exact, 8 * torch.finfo(dtype).eps)


def apart(x: Tensor, y: Tensor) -> float:
    """max |x - y| over max |y|."""
    return float((x.double() - y.double()).abs().max() / y.double().abs().max())


def positions_of(model: Model) -> Positions:
    """How a model counts positions, by what it gives for other ones.

    Raises:
        UserError: positions are absolute, and no table of them is found.
    """
    module, vocabulary = model.module, model.vocabulary or 2
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return Positions("unsaid")
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (2, N_TOKENS), generator=draw)
    at_T = torch.arange(N_TOKENS, device=model.device)[None]
    wanted, allowed = logits_at(model, module, ids_BT, position_ids=at_T), allowed_of(model.dtype, 1e-4)
    # Further on first: where positions are rows of a table, those before 0 are none.
    if apart(logits_at(model, module, ids_BT, position_ids=at_T + SHIFTED), wanted) > allowed:
        return _table(model, ids_BT)
    if apart(logits_at(model, module, ids_BT, position_ids=at_T - MOST_SLOTS), wanted) > allowed:
        raise refused(title_of(model), "Its logits change where all positions are counted from before 0.")
    return Positions("relative")


def _table(model: Model, ids_BT: Tensor) -> Positions:
    """The table that positions are rows of: another row for position t changes what is said from t on, and no more."""
    context, given = model.context, getattr(model.module, "get_input_embeddings", lambda: None)()
    for name, part in model.module.named_modules():
        if not isinstance(part, nn.Embedding) or part is given or context is None:
            continue
        offset = part.num_embeddings - context
        if 0 <= offset <= _MOST_OFFSET and all(_moves(model, part, offset, t, ids_BT) for t in (0, N_TOKENS // 2)):
            return Positions("table", name, offset)
    raise refused(title_of(model), "Its positions are absolute, and no table of them was found that could be shifted.")


def _moves(model: Model, table: nn.Embedding, offset: int, t: int, ids_BT: Tensor) -> bool:
    """Whether another row for position t changes the logits there, and none before."""
    wanted = logits_at(model, model.module, ids_BT)
    row = table.weight[offset + t].detach().clone()
    try:
        with torch.no_grad():
            table.weight[offset + t] = row + row.std().clamp(min=1e-2) * torch.linspace(-1, 1, len(row)).to(row)
        changed = (logits_at(model, model.module, ids_BT) != wanted).any(-1).all(0)
    finally:
        with torch.no_grad():
            table.weight[offset + t] = row
    return bool(changed[t]) and not bool(changed[:t].any())
