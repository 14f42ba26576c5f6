"""Edits: what changes a model's tensors, weights or inputs, as data; `observation` puts them in force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from massact.corpora import Batch
from massact.corpora.masks import first_kept
from massact.records.anatomy import AttentionPlace, Stack
from massact.records.errors import UserError, WorkError, near
from massact.records.sites import Site
from massact.stats.attention_call import Attended
from massact.trace.added_tokens import tokens_added
from massact.trace.attention import AttentionCall, Replace
from massact.trace.text_rows import TEXT_POSITIONS
from massact.trace.windows import apart, joined, whole, windows_of


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
class KeyValueEdit:
    """Keys and values of attention calls, changed before the kernel gets them: what it gives is of the new ones.

    Keys are after rotary. Where the model hands them to transformers' attention interface, or lets the kernel repeat
    them, there is one for each of K key-value heads; a model that repeats them itself gives one for each query head
    (`AttentionPlace.n_kv_heads` says how many). In cross-attention they are of the other sequence. The slot of an
    attention variant is no key, and is not among them.

    With a cache the kernel is given the keys of earlier passes once more, as the model made them, and `apply` gets
    them all: the cache itself is never changed, and nothing is edited twice.

    Args:
        name: shown in results and errors.
        site: a glob over attention sites, such as `*.attention`.
        apply: takes keys (B, K, S, E), values (B, K, S, F) and the batch, gives new ones of these shapes.
    """

    name: str
    site: str
    apply: Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor]]


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
    edits: tuple[Edit | WeightEdit | InputEdit | AttentionEdit | KeyValueEdit | AddedTokens, ...]


SingleEdit = Edit | WeightEdit | InputEdit | AttentionEdit | KeyValueEdit | AddedTokens
AnyEdit = SingleEdit | Together


def parts_of(edit: AnyEdit) -> tuple[SingleEdit, ...]:
    """The edits that one consists of: itself, or those that are done together."""
    return edit.edits if isinstance(edit, Together) else (edit,)


@dataclass
class Fired:
    """Proof that an edit did something: how often it ran, how many elements it wrote, how much it changed them.

    Args:
        greatest: of all elements, |new - old| / max(|new|, |old|): 0 where the edit wrote what was there, 1 for zero.
        known: False where a change has no size: another token, a token more.
    """

    name: str
    n_calls: int = 0
    n_elements: int = 0
    greatest: float | Tensor = 0.0
    known: bool = True

    @property
    def change(self) -> float:
        """The greatest relative change of an element; NaN where it is unknown."""
        return float(self.greatest) if self.known else float("nan")

    def count(self, old: Tensor, new: Tensor, n: Tensor | None = None) -> None:
        """One more call; what it did stays in tensors, so that nothing synchronises.

        Args:
            n: elements that it wrote; None: those that differ afterwards.
        """
        self.n_calls += 1
        self._compare(old, new, n)

    def count_keys(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
        """One more call that changed keys and values."""
        self.n_calls += 1
        for a, b in zip(old, new, strict=True):
            self._compare(a, b)

    def _compare(self, old: Tensor, new: Tensor, n: Tensor | None = None) -> None:
        """Add what differs, and how much."""
        with torch.no_grad():
            differs = new != old
            self.n_elements = self.n_elements + (differs.sum() if n is None else n)
            if not new.numel():
                return
            if not new.is_floating_point():
                old, new = old.float(), new.float()
            size = torch.maximum(new.abs(), old.abs())
            change = (
                (new - old).abs_().div_(size).masked_fill_(~differs, 0.0).amax()
            )  # in place: it is as large as a state
            change = change.float().nan_to_num(torch.inf)
            self.greatest = torch.fmax(self.greatest, change) if isinstance(self.greatest, Tensor) else change

    def settle(self) -> None:
        """Turn what was counted into numbers, once nothing runs any more."""
        self.n_elements, self.greatest = int(self.n_elements), float(self.greatest)

    def add(self, other: Fired) -> None:
        """Add what the same edit did elsewhere."""
        self.n_calls += other.n_calls
        self.n_elements += int(other.n_elements)
        self.greatest, self.known = max(float(self.greatest), float(other.greatest)), self.known and other.known


def add_tokens(
    module: nn.Module, stack: Stack, edit: AddedTokens, done: Fired, alone: bool
) -> AbstractContextManager[None]:
    """Added tokens, for the length of a `with`; they count where they are the whole edit."""

    def count(zeros_BND: Tensor) -> None:
        done.n_calls += 1
        done.n_elements += zeros_BND.numel() if alone else 0
        done.known = False

    return tokens_added(module, stack, edit.n, edit.at, count)


def change_inputs(edit: InputEdit, done: Fired, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as an edit changes them, counted."""
    changed = edit.apply(inputs)
    done.n_calls += 1
    done.known = False  # ids and masks are no amounts
    done.n_elements += sum(_differ(inputs.get(k), v) for k, v in changed.items() if k != TEXT_POSITIONS)
    return changed


def _differ(old: Any, new: Any) -> int:
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return 0
    return new.numel() if old.shape != new.shape else int((old != new).sum())


def past_of(inputs: Mapping[str, Any]) -> int:
    """How many positions before those of a forward pass its cache already holds."""
    length = getattr(inputs.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())


def change_of(edit: Edit, done: Fired, batch: Callable[[], Batch]) -> Callable[[Tensor], Tensor]:
    """A tap that applies an edit and counts what it did."""

    def change(h: Tensor) -> Tensor:
        given = batch()
        old = joined(h, given)
        new = edit.apply(old, given)
        if new.shape != old.shape:
            raise WorkError(f"Edit {edit.name!r} gave shape {tuple(new.shape)} for {tuple(old.shape)}.")
        done.count(old, new, None if edit.writes is None else edit.writes(old, given).sum())
        return new.reshape(h.shape)

    return change


def change_of_call(
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
        windows = windows_of(call, place, batch())
        seen = whole(call, windows) if windows else call
        starts = _starts(batch(), seen.shape[0], seen.shape[3])
        rows = [edit.apply(replace(seen.of(b, place), start=starts[b])) for b in range(seen.shape[0])]
        new = torch.stack([row.to(call.out_BHTF.dtype) for row in rows])
        new = apart(new, windows) if windows else new
        done.count(call.out_BHTF, new)
        return new

    return change


def change_of_keys(edit: KeyValueEdit, done: Fired, earlier: Replace | None, batch: Callable[[], Batch]) -> Replace:
    """What applies an edit to the keys and values of a call, after an earlier edit of them, and counts what it did."""

    def change(k_BKSE: Tensor, v_BKSF: Tensor) -> tuple[Tensor, Tensor]:
        old = (k_BKSE, v_BKSF) if earlier is None else earlier(k_BKSE, v_BKSF)
        k, v = edit.apply(*old, batch())
        for now, was in zip((k, v), old, strict=True):
            if now.shape != was.shape:
                raise WorkError(f"Edit {edit.name!r} gave shape {tuple(now.shape)} for {tuple(was.shape)}.")
        new = k.to(old[0].dtype), v.to(old[1].dtype)
        done.count_keys(old, new)
        return new

    return change


def check_keys(edit: KeyValueEdit, places: Mapping[Site, AttentionPlace]) -> None:
    """Refuse an edit of keys that cannot be reached.

    Raises:
        UserError: attention is written out at one of its sites.
    """
    hidden = [site for site, place in places.items() if place.via == "softmax"]
    cut = [site for site, place in places.items() if place.windows]
    if cut:
        raise UserError(
            f"Edit {edit.name!r} cannot reach the keys of {cut[0]} ({len(cut)} of {len(places)} sites).",
            "Attention is in windows there: keys and values are given window by window.",
            "Edit what attention gives (AttentionEdit), or other layers.",
        )
    if hidden:
        raise UserError(
            f"Edit {edit.name!r} cannot reach the keys of {hidden[0]} ({len(hidden)} of {len(places)} sites).",
            "Attention is written out there: only its softmax and its product with the values are seen, no keys.",
            "Change v_proj and k_proj by hooks of your own, or load it with attn_implementation 'sdpa' if it has that.",
        )


def _starts(batch: Batch, n: int, width: int) -> list[int]:
    """Where every row begins behind its padding."""
    first = first_kept(batch.inputs.get("attention_mask"), width)
    return [0] * n if first is None or len(first) != n else first.tolist()


@contextmanager
def change_weights(module: nn.Module, edit: WeightEdit, done: Fired) -> Iterator[None]:
    """Another parameter, for the length of a `with`."""
    parameters = dict(module.named_parameters())
    if edit.parameter not in parameters:
        raise UserError(f"The model has no parameter {edit.parameter!r}.", do=near(edit.parameter, parameters))
    weight = parameters[edit.parameter]
    if weight.is_meta:
        raise UserError(f"The parameter {edit.parameter!r} cannot be changed.",
                        "It is offloaded, and brought in anew for each pass.",
                        "Choose another one, or load the model without offloading.")  # fmt: skip
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        raise UserError(f"The parameter {edit.parameter!r} cannot be changed.", "Its values are packed (quantised).",
                        "Choose another one, or load the model in full precision.")  # fmt: skip
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


def check_fired(fired: Sequence[Fired], idle: bool = False) -> None:
    """Refuse a table of effects about nothing.

    Args:
        idle: it is enough that each of them ran.

    Raises:
        WorkError: an edit never ran, or changed no element.
    """
    for one in fired:
        if one.n_calls == 0 or (int(one.n_elements) == 0 and not idle):
            raise WorkError(
                f"Edit {one.name!r} changed nothing ({one.n_calls} calls, {int(one.n_elements)} elements).",
                do="Check its site and what it matches: a table of its effect would be about nothing.",
            )
