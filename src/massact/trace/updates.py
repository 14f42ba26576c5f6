"""What statistics are given of a forward pass: the rows of each sequence that count, and where these are.

Shapes: B rows of a batch, T positions, D dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from torch import Tensor

from massact.corpora import Batch
from massact.corpora.batch import Positions, counted
from massact.records.anatomy import AttentionPlace
from massact.records.errors import WorkError
from massact.stats import Statistic, Where
from massact.stats.attention_call import Attended
from massact.trace.attention import AttentionCall
from massact.trace.text_rows import TextRows
from massact.trace.windows import whole, windows_of


def feed(
    statistic: Statistic, h_BTD: Tensor, batch: Batch, text_BT: Tensor | None = None, most: int | None = None
) -> None:
    """Give each sequence's valid rows to a statistic.

    Args:
        text_BT: where they stand in the text, if they may have moved.
        most: only of so many sequences.
    """
    if h_BTD.ndim == 2:  # some modules see tokens of all sequences in one row
        h_BTD = h_BTD.reshape(len(batch.sequences), -1, h_BTD.shape[-1])
    wheres = list(islice(_wheres(batch, h_BTD.shape[1], text_BT), most))
    together = getattr(statistic, "update_all", None)
    if together is not None and len(wheres) > 1 and all(rows is None for _, rows, _ in wheres):
        together(h_BTD[: len(wheres)], [where for *_, where in wheres])
        return
    for b, rows, where in wheres:
        if rows is None:
            statistic.update(h_BTD[b], where)
        else:
            statistic.update(h_BTD[b, rows] if isinstance(rows, slice) else h_BTD[b].index_select(0, rows), where)


def _wheres(batch: Batch, width: int, text_BT: Tensor | None) -> Iterator[tuple[int, Positions, Where]]:
    """Which positions of each sequence count, and where these are."""
    for b, (sequence, rows) in enumerate(zip(batch.sequences, batch.rows_of(width), strict=True)):
        if text_BT is not None:
            yield b, rows, Where(sequence, positions=text_BT[b] if rows is None else text_BT[b][rows])
        elif isinstance(rows, Tensor):
            yield b, rows, Where(sequence, positions=rows)
        else:  # a mask is about the text, say, not about patches
            yield b, rows, Where(sequence, start=batch.past if rows is None else rows.start or 0)


def attended_sequences(
    call: AttentionCall,
    place: AttentionPlace,
    batch: Batch,
    text_BT: Tensor | None = None,
    most: int | None = None,
) -> Iterator[tuple[Attended, Where]]:
    """The attention call of each sequence of a batch, without the positions that do not count, and where these are.

    Args:
        text_BT, most: as for `feed`.

    Raises:
        WorkError: the call has another number of rows than the batch has sequences.
    """
    n = len(batch.sequences)
    windows = windows_of(call, place, batch)
    call = whole(call, windows) if windows else call.split(n)
    if call.shape[0] != n:
        raise WorkError(
            f"Attention in {place.module!r} saw {call.shape[0]} rows for {n} sequences.",
            "The model split its input into windows, which it did not do when it was proved.",
        )
    for b, rows, where in islice(_wheres(batch, call.shape[2], text_BT), most):
        attended = call.of(b, place)
        yield attended if rows is None else attended.trimmed(rows), where


def moved_batch(batch: Batch, rows: TextRows) -> Batch:
    """The batch of a pass that an edit may have moved tokens in: which rows count there."""
    mask, n = rows.counted_BR, len(rows.positions_BR)
    kept = (None,) * n if mask is None else tuple(counted(m) if bool(m.any()) else slice(0, 0) for m in mask)
    return replace(batch, inputs={"input_ids": rows.positions_BR}, rows=kept)
