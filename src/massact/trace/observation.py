"""`observing`: see, and change, what passes through a model, under any loop: a training step, a generation, a replay.

Inside the `with` the module is the same object, usable by any other library; on exit it is bit for bit as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from massact.corpora import Batch
from massact.records.anatomy import Anatomy, AttentionPlace, Place
from massact.records.errors import UserError, WorkError, near
from massact.records.sites import Site
from massact.stats import Statistic
from massact.trace.attention import Attending, AttentionCall, Replace, attending
from massact.trace.compilation import originals
from massact.trace.conformance import Checker, Shapes, check_calls
from massact.trace.edits import (
    AddedTokens,
    AnyEdit,
    AttentionEdit,
    Fired,
    InputEdit,
    KeyValueEdit,
    WeightEdit,
    add_tokens,
    change_inputs,
    change_of,
    change_of_call,
    change_of_keys,
    change_weights,
    check_fired,
    check_keys,
    parts_of,
    past_of,
)
from massact.trace.hooks import Taps, tapped
from massact.trace.text_rows import TEXT_POSITIONS, TextRows, positions_like, text_rows
from massact.trace.updates import attended_sequences, feed, moved_batch
from massact.trace.windows import joined, windows_of

Key = tuple[str, Site]  # name of a probe, and where


class Observable(Protocol):
    """What `observing` needs of a model; `massact.models.Model` is one."""

    module: nn.Module
    anatomy: Anatomy
    proof: Any  # its `calls`: how often each border of a module is passed in one pass, and how often it attends


@dataclass(frozen=True)
class Probe:
    """Where to look and what to keep.

    Args:
        name: the key under which the results are found.
        site: a glob over printed site names, such as `*.resid_post`.
        statistic: makes a fresh, empty statistic.
        rows: of every pass only its first so many rows; None for all.
    """

    name: str
    site: str
    statistic: Callable[[], Statistic]
    rows: int | None = None


@dataclass
class Measurements:
    """What was seen: one statistic for each probe and site.

    Args:
        statistics: (probe name, site) -> statistic; call `result` for its numbers.
        edits: what each edit did.
        n_sequences: sequences finished; a resumed run goes on from here.
        batch_size: sequences per forward pass, after any back-off.
        forward_s: seconds spent in forward passes with the taps installed.
        whole: False while a batch is being added, which an interrupt may leave half-done.
    """

    statistics: dict[Key, Statistic]
    edits: list[Fired] = field(default_factory=list)
    n_sequences: int = 0
    batch_size: int = 0
    forward_s: float = 0.0
    whole: bool = True

    def sites(self, probe: str) -> list[Site]:
        return [site for name, site in self.statistics if name == probe]

    def result(self, probe: str, site: Site) -> Any:
        return self.statistics[probe, site].result()


@dataclass
class Plan:
    """Which statistics sit at which places; made once, before anything runs."""

    probes: list[tuple[Key, Place, Probe]]
    attention: list[tuple[Key, AttentionPlace, Probe]]

    def fresh(self) -> dict[Key, Statistic]:
        """Every statistic, empty."""
        return {key: probe.statistic() for key, _, probe in [*self.probes, *self.attention]}

    @property
    def places(self) -> list[Place]:
        """What a forward pass must reach."""
        return [p for _, p, _ in self.probes] + [Place(p.module, "out") for _, p, _ in self.attention]


def plan(model: Observable, probes: Sequence[Probe]) -> Plan:
    """Resolve every selector.

    Raises:
        UserError: a selector matches nothing, or two probes have one name at one site.
    """
    found = Plan([], [])
    for probe in probes:
        attention = model.anatomy.select_attention(probe.site)
        kept: list[Any] = found.attention if attention else found.probes
        taken = {key for key, *_ in (*found.probes, *found.attention)}
        for site, place in (attention or model.anatomy.select(probe.site)).items():
            key = (probe.name, site)
            if key in taken:
                raise UserError(f"Two probes are called {probe.name!r} at site {site}.", do="Name them apart.")
            kept.append((key, place, probe))
    return found


@dataclass
class Seen(Measurements):
    """Measurements of the forward passes inside a `with observing`, so far.

    Args:
        rows: of every pass of tokens, where each stands in the text; where that was asked for.
        places: what a pass must reach for all that is watched or changed.
        taps: installed; `stop` ends a pass when all of them have fired.
        watched: whether a checker looks at this pass.
    """

    rows: list[TextRows] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    taps: Taps = field(default_factory=lambda: Taps(0))
    watched: bool = False


@contextmanager
def observing(
    model: Observable,
    probes: Sequence[Probe] | Plan = (),
    edits: Sequence[AnyEdit] = (),
    *,
    batch: Batch | None = None,
    sequences: Sequence[int] = (),
    text: bool = False,
    first: Callable[[], bool] | None = None,
    lenient: Container[str] = (),
    checker: Checker | None = None,
) -> Iterator[Seen]:
    """Watch, and change, every forward pass of a live model for the length of a `with`, whoever makes it.

    Args:
        model: a loaded model; its `module` is what the loop, or another library, runs.
        probes: what to look at. A pass is one update of a statistic for each of its rows.
        edits: applied in this order where several are at one place, before a probe there sees the tensor; attention
            is seen before its output is changed, and after its keys and values are.
        batch: what is run, where that is one batch: which positions count, and of which sequences; its shapes are
            compared with what was proved. None: any number of passes, whose rows are the sequences 0, 1, ...
        sequences: index in the corpus of every row, for edits that draw at random; nothing: those of the batch.
        text: find out which position of the text every row is, also where an edit moves them: those of `Where`.
        first: look only at passes at whose start this is true, and of every site only at the first of them.
        lenient: "edits" may leave these passes as they are, as long as they run; "sites" may be left out of them.
        checker: looks at more sites, in the passes that it asks for.

    Yields:
        What was seen and what each edit did, so far.

    Raises:
        UserError: a selector or a parameter name matches nothing; with `text`, an edit moves tokens and does not say
            where to.
        WorkError: on leaving (not if the body raised), a site was not seen, an edit did not fire or changed nothing,
            or the model took another path than when it was proved.
    """
    planned = probes if isinstance(probes, Plan) else plan(model, probes)
    seen = Seen(planned.fresh(), [Fired(e.name) for e in edits])
    live = _Live(seen, batch, tuple(sequences), text, first)
    live.shapes = None if batch is None else Shapes(batch, {s.name: s.d_model for s in model.anatomy.stacks})
    if planned.attention:  # it is seen by a function mode, which need not look at what the statistics do
        live.unseen = torch._C.DisableTorchFunction
    with ExitStack() as stack:
        stack.enter_context(originals(model.module, getattr(model, "compiled", False)))
        changes = _change(model, edits, live, stack)
        taps = [*changes.taps, *((key[1], place, _look(live, key, place, p.rows)) for key, place, p in planned.probes)]
        if checker is not None and batch is not None and checker.begin(batch):
            taps += [(s, p, partial(_show, live, checker, s, p)) for s, p in checker.places.items()]
            seen.watched = bool(checker.places)
        calls = _calls(planned, changes, live)
        before = {p: change for p, (_, change) in changes.keys.items()}
        heads = stack.enter_context(attending(model.module, {p: see for p, (_, see) in calls.items()}, before))
        state = stack.enter_context(
            tapped(model.module, [(p, see) for _, p, see in taps], until=lambda: heads.complete)
        )
        seen.taps = state
        seen.places = [p for _, p, _ in taps] + [Place(p.module, "out") for p in calls]
        live.began = state, heads
        if batch is None or text or live.inputs:
            stack.enter_context(_roots(model.module, live))
        live.begin()
        yield seen
    if "sites" not in lenient:
        sites = [*(s for s, *_ in taps), *(s for s, _ in calls.values())]
        _check_sites(seen, dict(zip(sites, [*state.ever(), *heads.ever()], strict=True)), batch is not None)
    for done in seen.edits:
        done.settle()
    check_fired(seen.edits, idle="edits" in lenient)
    if batch is not None:
        check_calls(state.calls | heads.calls, model.proof.calls, whole=seen.watched)
    if checker is not None and seen.watched:
        checker.end()


def _check_sites(seen: Seen, fired: dict[Site, bool], one_pass: bool) -> None:
    """Refuse results of sites that no pass came by; of many passes, an edit need not reach every site that it names.

    Raises:
        WorkError: names the first.
    """
    probed = {site for _, site in seen.statistics}
    silent = [site for site, ever in fired.items() if not ever and (one_pass or site in probed)]
    if silent:
        raise WorkError(
            f"Site {silent[0]} did not fire ({len(silent)} of {len(fired)} sites did not).",
            "The model took another path than when it was proved.",
            "Choose sites of the part of the model that these inputs run through.",
        )


@contextmanager
def edited(model: Observable, *edits: AnyEdit, sequences: Sequence[int] = ()) -> Iterator[list[Fired]]:
    """Patch a live model for the length of a `with`; gives what each edit did so far. See `observing`, without probes.

    Args:
        model: a loaded model; its `module` is what other libraries run.
        edits: applied in this order where several are at one place.
        sequences: index in the corpus of every row, for edits that draw at random; nothing: the rows are counted.
    """
    with observing(model, (), edits, sequences=sequences) as seen:
        yield seen.edits


# -------------------------------------------------------------------------------------------- the pass that goes on
class _Live:
    """What is known of the forward pass that goes on."""

    def __init__(
        self, seen: Seen, batch: Batch | None, sequences: tuple[int, ...], text: bool, first: Callable[[], bool] | None
    ) -> None:
        self.seen, self.given, self.text, self.first = seen, batch, text, first
        self.batch = batch if batch is not None else Batch({}, (), ())
        self.sequences = sequences or self.batch.sequences
        self.inputs: list[tuple[InputEdit, Fired]] = []
        self.began: tuple[Taps | Attending, ...] = ()
        self.depth, self.on = 0, True
        self.looked: set[Key] = set()  # with `first`
        self.moved: TextRows | None = None
        self.shapes: Shapes | None = None
        self.unseen: Callable[[], Any] = nullcontext
        self.n_rows = len(self.batch.sequences)  # of the last hidden state that was seen

    def begin(self) -> None:
        """Before every forward pass."""
        for part in self.began:
            part.begin()

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before a forward pass of the whole model, or of its base alone."""
        self.depth += 1
        if self.depth > 1:
            return None
        self.begin()
        self.on = self.first is None or self.first()
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        changed, known = dict(given), positions_like(given) if self.text else {}
        moved = known.get(TEXT_POSITIONS)
        for edit, done in self.inputs:
            changed = change_inputs(edit, done, changed | ({TEXT_POSITIONS: moved} if moved is not None else {}))
            moved = changed.pop(TEXT_POSITIONS, None)
        if known:
            name = ", ".join(edit.name for edit, _ in self.inputs)
            self.moved = text_rows(given, changed, moved, name)
            self.seen.rows += [] if self.moved is None else [self.moved]
        batch = _batch(changed)
        if len(self.sequences) == len(batch.sequences):
            about = batch if self.given is None or self.inputs else self.given
            batch = replace(about, inputs=batch.inputs, sequences=self.sequences, past=batch.past)
        self.batch = batch
        self.n_rows = len(self.batch.sequences) if self.given is None else self.n_rows
        return ((), changed) if self.inputs else None

    def leave(self, *_: Any) -> None:
        self.depth -= 1

    def skips(self, key: Key) -> bool:
        """Whether a site is not to be looked at in this pass."""
        if self.first is None:
            return False
        if not self.on or key in self.looked:
            return True
        self.looked.add(key)
        return False

    def rows(self, h: Tensor) -> tuple[Batch, Tensor | None]:
        """The batch that a hidden state is of, and where its positions stand in the text, if they may have moved."""
        if self.given is None:
            self.n_rows = len(h) if h.ndim == 3 else self.n_rows or 1
        return self._rows(self.n_rows, h.shape[-2] if h.ndim == 3 else len(h) // self.n_rows)

    def rows_of_call(self, call: AttentionCall, place: AttentionPlace) -> tuple[Batch, Tensor | None]:
        """The same of an attention call."""
        if windows := windows_of(call, place, self.batch):
            return self._rows(call.shape[0] // len(windows), call.shape[2] * len(windows))
        if self.given is not None:
            return self._rows(self.n_rows, call.shape[2])
        call = call.split(self.n_rows or call.shape[0])
        return self._rows(call.shape[0], call.shape[2])

    def _rows(self, n_rows: int, n_positions: int) -> tuple[Batch, Tensor | None]:
        if self.moved is not None and self.moved.positions_BR.shape[1] == n_positions:
            return moved_batch(self.given or self.batch, self.moved), self.moved.positions_BR
        if self.given is not None:
            return self.given, None
        if n_rows == len(self.batch.sequences):
            return self.batch, None
        return Batch({}, tuple(range(n_rows)), (None,) * n_rows, self.batch.past), None


def _batch(inputs: dict[str, Any]) -> Batch:
    """The batch of one live forward pass: where each row begins, and how much a cache already holds."""
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    first = next((v for k, v in tensors.items() if k != "attention_mask"), None)
    n = 0 if first is None or not first.ndim else len(first)
    return Batch(tensors, tuple(range(n)), (None,) * n, past_of(inputs))


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


# -------------------------------------------------------------------------------------------- edits in force
@dataclass
class _Changes:
    """Edits of tensors and of attention calls, by place; all others are in force."""

    taps: list[tuple[Site, Place, Callable[[Tensor], Any]]] = field(default_factory=list)
    calls: dict[AttentionPlace, tuple[Site, Callable[[AttentionCall], Tensor]]] = field(default_factory=dict)
    keys: dict[AttentionPlace, tuple[Site, Replace]] = field(default_factory=dict)


def _change(model: Observable, edits: Sequence[AnyEdit], live: _Live, stack: ExitStack) -> _Changes:
    """Put edits of weights, inputs and added tokens in force; give the others by place.

    Raises:
        UserError: a selector or a parameter name matches nothing.
    """
    found = _Changes()
    parts = [(one, done) for edit, done in zip(edits, live.seen.edits, strict=True) for one in parts_of(edit)]
    for edit, done in parts:
        if isinstance(edit, WeightEdit):
            stack.enter_context(change_weights(model.module, edit, done))
        elif isinstance(edit, AddedTokens):
            alone = all(isinstance(e, AddedTokens) for e, d in parts if d is done)
            stack.enter_context(add_tokens(model.module, model.anatomy.stack(edit.stack), edit, done, alone))
        elif isinstance(edit, InputEdit):
            live.inputs.append((edit, done))
        elif isinstance(edit, AttentionEdit):
            for site, place in _attentions(model, edit.site).items():
                earlier = found.calls[place][1] if place in found.calls else None
                found.calls[place] = site, change_of_call(edit, done, place, (earlier, lambda: live.batch))
        elif isinstance(edit, KeyValueEdit):
            places = _attentions(model, edit.site)
            check_keys(edit, places)
            for site, place in places.items():
                first = found.keys[place][1] if place in found.keys else None
                found.keys[place] = site, change_of_keys(edit, done, first, lambda: live.batch)
        else:
            change = change_of(edit, done, lambda: live.batch)
            found.taps += [(site, place, change) for site, place in model.anatomy.select(edit.site).items()]
    return found


def _attentions(model: Observable, pattern: str) -> dict[Site, AttentionPlace]:
    """The attention calls that an edit names.

    Raises:
        UserError: there is none.
    """
    places = model.anatomy.select_attention(pattern)
    if not places:
        seen = model.anatomy.attentions
        raise UserError(
            f"No attention call matches {pattern!r}.",
            do=near(pattern, [str(s) for s in seen]) if seen else "Look for them first: with_attention(model).",
        )
    return places


# -------------------------------------------------------------------------------------------- what probes are given
def _look(live: _Live, key: Key, place: Place, n: int | None) -> Callable[[Tensor], None]:
    """What gives the tensors of a site to its statistic."""
    statistic, shapes, unseen = live.seen.statistics[key], live.shapes, live.unseen

    def see_batch(shapes: Shapes, h: Tensor) -> None:
        with unseen():
            h = joined(h, live.batch)
            shapes.check(h, key[1], place)
            feed(statistic, h, *live.rows(h), n)

    def see(h: Tensor) -> None:
        if not live.skips(key):
            with torch.no_grad(), unseen():
                feed(statistic, h, *live.rows(h), n)

    return see if shapes is None else partial(see_batch, shapes)


def _show(live: _Live, checker: Checker, site: Site, place: Place, h: Tensor) -> None:
    """Give a tensor to a checker."""
    with live.unseen():
        h = joined(h, live.batch)
        if live.shapes is not None and site.point.startswith("resid"):
            live.shapes.check(h, site, place)
        checker.see(site, h)


def _calls(planned: Plan, changes: _Changes, live: _Live) -> dict[AttentionPlace, tuple[Site, Callable[..., Any]]]:
    """What sees the attention calls at each place, and may change them."""
    keys: dict[AttentionPlace, list[tuple[Key, int | None]]] = {}
    for key, place, probe in planned.attention:
        keys.setdefault(place, []).append((key, probe.rows))
    found: dict[AttentionPlace, tuple[Site, Callable[..., Any]]] = {}
    for place in dict.fromkeys([*keys, *changes.calls, *changes.keys]):
        site, change = changes.calls.get(place, (changes.keys.get(place, (None,))[0], None))
        mine = keys.get(place, [])
        found[place] = site or mine[0][0][1], partial(_look_at_call, live, place, mine, change)
    return found


def _look_at_call(
    live: _Live,
    place: AttentionPlace,
    keys: list[tuple[Key, int | None]],
    change: Callable[..., Tensor] | None,
    call: AttentionCall,
) -> Tensor | None:
    """Give the call of each sequence to its statistics; then apply the edit there, if there is one."""
    wanted = [(live.seen.statistics[key], n) for key, n in keys if not live.skips(key)]
    if wanted:
        most = None if any(n is None for _, n in wanted) else max(n or 0 for _, n in wanted)
        with torch.no_grad():
            batch, text_BT = live.rows_of_call(call, place)
            for b, (attended, where) in enumerate(attended_sequences(call, place, batch, text_BT, most)):
                for statistic, n in wanted:
                    if n is None or b < n:
                        statistic.update(attended, where)
    return None if change is None else change(call)
