"""Edits: what changes a model's tensors, weights or inputs, and `edited`, which patches a live model with them.

Inside the `with` the module is the same object, usable by any other library; on exit it is bit for bit as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from massact.corpora import Batch
from massact.corpora.masks import first_kept
from massact.records.anatomy import Anatomy
from massact.records.errors import UserError, WorkError, near
from massact.stats.attended import Attended
from massact.trace.added_tokens import tokens_added
from massact.trace.attention import AttentionCall, attending
from massact.trace.hooks import tapped
from massact.trace.text_rows import TEXT_POSITIONS, TextRows, positions_like, text_rows


@dataclass(frozen=True)
class Edit:
    """Where to change a tensor, and the pure function that does it.

    Args:
        name: shown in results and errors.
        site: a glob over printed site names.
        apply: takes the tensor (B, T, D) and the batch, gives a new tensor of that shape.
        writes: what it writes to, as a mask or what else has a sum, for edits that may write what is there already (the
            mean of a constant); None: what differs afterwards.
    """

    name: str
    site: str
    apply: Callable[[Tensor, Batch], Tensor]
    writes: Callable[[Tensor, Batch], Tensor] | None = None


@dataclass(frozen=True)
class WeightEdit:
    """A parameter that is changed for the time.

    Args:
        name: shown in results and errors.
        parameter: its dotted name.
        apply: takes the parameter, gives a new tensor of its shape.
    """

    name: str
    parameter: str
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InputEdit:
    """The model's inputs, changed before it sees them.

    Args:
        name: shown in results and errors.
        apply: takes the inputs by name, gives new ones.
    """

    name: str
    apply: Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class AttentionEdit:
    """The output of attention calls, changed before the output projection.

    Args:
        name: shown in results and errors.
        site: a glob over attention sites, such as `*.attention`.
        apply: takes the call of one sequence and gives its new output (H, T, F).
    """

    name: str
    site: str
    apply: Callable[[Attended], Tensor]


@dataclass(frozen=True)
class AddedTokens:
    """Tokens of zeros, in the residual stream from before the first block to after the last.

    For blocks that know nothing of positions, or take the first tokens as they are (image models); a model of text
    makes its mask and its positions before the first block.

    Args:
        name: shown in results and errors.
        stack: name of the stack.
        n: how many.
        at: index of the first of them; None: behind all tokens.
    """

    name: str
    stack: str = ""
    n: int = 1
    at: int | None = None


@dataclass(frozen=True)
class Together:
    """Several edits that are one: the same change at several layers, say.

    Args:
        name: shown in results and errors.
        edits: one count for all: at a later layer there may be nothing left to change. Added tokens count only where
            they are the whole edit: what is done to them beside it must change something by itself.
    """

    name: str
    edits: tuple[Edit | WeightEdit | InputEdit | AttentionEdit | AddedTokens, ...]


SingleEdit = Edit | WeightEdit | InputEdit | AttentionEdit | AddedTokens
AnyEdit = SingleEdit | Together


def parts_of(edit: AnyEdit) -> tuple[SingleEdit, ...]:
    """The edits that one consists of: itself, or those that are done together."""
    return edit.edits if isinstance(edit, Together) else (edit,)


@dataclass
class Fired:
    """Proof that an edit did something: how often it ran, how many elements it wrote."""

    name: str
    n_calls: int = 0
    n_elements: int = 0

    def count(self, old: Tensor, new: Tensor) -> None:
        """One more call; the number of changed elements stays a tensor, so that nothing synchronises."""
        self.n_calls += 1
        self.n_elements = self.n_elements + (new != old).sum()  # type: ignore[assignment]


class Editable(Protocol):
    """What `edited` needs of a model; `massact.models.Model` is one."""

    module: nn.Module
    anatomy: Anatomy


@contextmanager
def edited(
    model: Editable, *edits: AnyEdit, sequences: Sequence[int] = (), rows: list[TextRows] | None = None
) -> Iterator[list[Fired]]:
    """Patch a live model for the length of a `with`.

    Args:
        model: a loaded model; its `module` is what other libraries run.
        edits: applied in this order where several are at one place.
        sequences: index in the corpus of every row, for edits that draw at random; nothing: the rows are counted.
        rows: gets, of every forward pass of tokens, which positions of the text its rows are.

    Yields:
        What each edit did so far.

    Raises:
        UserError: a selector or a parameter name matches nothing; with `rows`, an edit moves tokens and does not say
            where to.
        WorkError: on leaving, an edit did not fire or changed nothing (not if the body raised).
    """
    fired = [Fired(e.name) for e in edits]
    parts = [(one, done) for edit, done in zip(edits, fired, strict=True) for one in parts_of(edit)]
    live = _Live(tuple(sequences), rows)
    with ExitStack() as stack:
        taps: list[Any] = []
        calls: dict[Any, Any] = {}
        for edit, done in parts:
            if isinstance(edit, WeightEdit):
                stack.enter_context(_weights(model.module, edit, done))
            elif isinstance(edit, AddedTokens):
                alone = all(isinstance(e, AddedTokens) for e, d in parts if d is done)
                count = partial(_count_added, done, alone)
                stack.enter_context(tokens_added(model.module, model.anatomy.stack(edit.stack), edit.n, edit.at, count))
            elif isinstance(edit, InputEdit):
                live.inputs.append((edit, done))
            elif isinstance(edit, AttentionEdit):
                places = model.anatomy.select_attention(edit.site)
                if not places:
                    raise UserError(
                        f"No attention call matches {edit.site!r}.",
                        do=near(edit.site, [str(s) for s in model.anatomy.attentions])
                        if model.anatomy.attentions
                        else "Look for them first: with_attention(model).",
                    )
                calls |= {p: _attention(edit, done, p, (calls.get(p), lambda: live.batch)) for p in places.values()}
            else:
                change = change_of(edit, done, lambda: live.batch)
                taps += [(place, change) for place in model.anatomy.select(edit.site).values()]
        state = stack.enter_context(tapped(model.module, taps))
        heads = stack.enter_context(attending(model.module, calls))
        live.begin = lambda: (state.begin(), heads.begin())
        stack.enter_context(_roots(model.module, live))
        yield fired
    for done in fired:
        done.n_elements = int(done.n_elements)
    check_fired(fired)


class _Live:
    """What is known of the forward pass that goes on: the batch that edits are told about."""

    def __init__(self, sequences: tuple[int, ...] = (), rows: list[TextRows] | None = None) -> None:
        self.batch, self.sequences, self.rows = Batch({}, (), ()), sequences, rows
        self.inputs: list[tuple[InputEdit, Fired]] = []
        self.begin: Callable[[], Any] = lambda: None
        self.depth = 0

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before a forward pass of the whole model, or of its base alone."""
        self.depth += 1
        if self.depth > 1:
            return None
        self.begin()
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        changed, known = dict(given), {} if self.rows is None else positions_like(given)
        moved = known.get(TEXT_POSITIONS)
        for edit, done in self.inputs:
            before = changed
            changed = edit.apply(changed | ({TEXT_POSITIONS: moved} if moved is not None else {}))
            moved = changed.pop(TEXT_POSITIONS, None)
            done.n_calls += 1
            done.n_elements += sum(_differ(before.get(k), v) for k, v in changed.items())
        if self.rows is not None and known:
            name = ", ".join(edit.name for edit, _ in self.inputs)
            self.rows += [r for r in [text_rows(given, changed, moved, name)] if r is not None]
        batch = _batch(changed)
        same = len(self.sequences) == len(batch.sequences)
        self.batch = replace(batch, sequences=self.sequences) if same else batch
        return ((), changed) if self.inputs else None

    def leave(self, *_: Any) -> None:
        self.depth -= 1


def _count_added(done: Fired, alone: bool, zeros_BND: Tensor) -> None:
    done.n_calls += 1
    done.n_elements += zeros_BND.numel() if alone else 0


def _differ(old: Any, new: Any) -> int:
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return 0
    return new.numel() if old.shape != new.shape else int((old != new).sum())


def _batch(inputs: dict[str, Any]) -> Batch:
    """The batch of one live forward pass: where each row begins, and how much a cache already holds."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    first = next((v for k, v in tensors.items() if k != "attention_mask"), None)
    n = 0 if first is None else len(first)
    return Batch(tensors, tuple(range(n)), (None,) * n, past_of(inputs))


def past_of(inputs: Mapping[str, Any]) -> int:
    """How many positions before those of a forward pass its cache already holds."""
    cache = inputs.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


@contextmanager
def _roots(module: nn.Module, live: _Live) -> Iterator[None]:
    """Hooks on the model, and on its base and its towers, each of which may be run alone."""
    base = getattr(module, "base_model", module)
    towers = [child for child in module.children() if hasattr(child, "main_input_name")]
    handles = []
    try:
        for root in dict.fromkeys([module, base if isinstance(base, nn.Module) else module, *towers]):
            handles.append(root.register_forward_pre_hook(live.enter, with_kwargs=True, prepend=True))
            handles.append(root.register_forward_hook(live.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def change_of(edit: Edit, done: Fired, batch: Callable[[], Batch]) -> Callable[[Tensor], Tensor]:
    """A tap that applies an edit and counts what it did."""

    def change(h: Tensor) -> Tensor:
        new = edit.apply(h, batch())
        if new.shape != h.shape:
            raise WorkError(f"Edit {edit.name!r} gave shape {tuple(new.shape)} for {tuple(h.shape)}.")
        if edit.writes is None:
            done.count(h, new)
        else:
            done.n_calls += 1
            done.n_elements = done.n_elements + edit.writes(h, batch()).sum()  # type: ignore[assignment]
        return new

    return change


def _attention(
    edit: AttentionEdit,
    done: Fired,
    place: Any,
    around: tuple[Callable[[AttentionCall], Tensor] | None, Callable[[], Batch]],
) -> Callable[[AttentionCall], Tensor]:
    """What sees an attention call and applies an edit, after an earlier edit of the same call."""
    earlier, batch = around

    def change(call: AttentionCall) -> Tensor:
        call = call if earlier is None else replace(call, out_BHTF=earlier(call))
        assert call.out_BHTF is not None
        starts = _starts(batch(), call.shape[0], call.shape[3])
        rows = [edit.apply(replace(call.of(b, place), start=starts[b])) for b in range(call.shape[0])]
        new = torch.stack([row.to(call.out_BHTF.dtype) for row in rows])
        done.count(call.out_BHTF, new)
        return new

    return change


def _starts(batch: Batch, n: int, width: int) -> list[int]:
    """Where every row begins behind its padding."""
    first = first_kept(batch.inputs.get("attention_mask"), width)
    return [0] * n if first is None or len(first) != n else first.tolist()


@contextmanager
def _weights(module: nn.Module, edit: WeightEdit, done: Fired) -> Iterator[None]:
    parameters = dict(module.named_parameters())
    if edit.parameter not in parameters:
        raise UserError(f"The model has no parameter {edit.parameter!r}.", do=near(edit.parameter, parameters))
    weight = parameters[edit.parameter]
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            new = edit.apply(kept.clone())
            done.count(kept, new)
            weight.copy_(new)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def check_fired(fired: Sequence[Fired]) -> None:
    """Refuse a table of effects about nothing.

    Raises:
        WorkError: an edit never ran, or changed no element.
    """
    for one in fired:
        if one.n_calls == 0 or int(one.n_elements) == 0:
            raise WorkError(
                f"Edit {one.name!r} changed nothing ({one.n_calls} calls, {int(one.n_elements)} elements).",
                do="Check its site and what it matches: a table of its effect would be about nothing.",
            )
