"""Find every attention call of a proved model, and prove that we read it right: P V is the output, rows sum to one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from massact.anatomy.discovery import run_example
from massact.anatomy.projections import sizes_of
from massact.corpora import Corpus
from massact.models.attention_windows import Windows, order_of, windows_from
from massact.models.linear_maps import linear_part
from massact.models.loading import Model
from massact.records.anatomy import AttentionPlace, Block, Place, Stack
from massact.records.errors import ProofError, class_and_line
from massact.records.sites import Site
from massact.stats.attention_call import Attended, hides_only, rounding_allowed
from massact.trace import tensors_in
from massact.trace.attention import AttentionCall, Key, watching_attention
from massact.trace.hooks import tapped
from massact.trace.integrity import unchanged
from massact.trace.windows import whole


@dataclass
class _Event:
    """One attention call of the example: where, in which block, and how it reads."""

    key: Key
    stack: Stack
    block: Block
    call: AttentionCall
    shape: tuple[int, ...]  # of the block's input: (B, T, D)
    reads: list[Place] = field(default_factory=list)  # projections that read its output
    tokens: Tensor | None = None  # (B, T, D) that the sublayer reads, in the order of the sequence
    inputs: list[Tensor] = field(default_factory=list)  # what projections of the block have read before the call
    added: Tensor | None = None  # (B, T, D) that the sublayer adds


def with_attention(model: Model) -> Model:
    """The same model with the place of every attention call in its anatomy, each proved on a short input.

    For every call the probabilities are written out from what was seen (queries, keys, scale, mask, cap, extra
    slot), and P V with what the slot adds must be the output of the model's own kernel, to the rounding of its dtype
    and of its scores, however large these are (`rounding_allowed`). Where it is not, or where no call is seen, the
    site is unavailable, with the reason.

    Raises:
        ProofError: the model's outputs change while its attention is watched.
    """
    if model.anatomy.attentions or model.anatomy.no_attention:
        return model
    events, calls, unread = _events(model)
    places: dict[Site, AttentionPlace] = {}
    unavailable: dict[Site, str] = {}
    for stack in model.anatomy.stacks:
        for block in stack.blocks:
            mine = [e for e in events if e.block is block]
            if stack.stream_of is not None:
                why = f"it is of stack {stack.stream_of!r}, which reads the streams"
                unavailable[Site(stack.name, block.layer, "attention")] = why
                continue
            if not mine:
                site = Site(stack.name, block.layer, "attention")
                why = next(
                    (w for name, w in unread.items() if f"{name}.".startswith(f"{block.module}.") or not name), ""
                )
                unavailable[site] = block.unavailable.get("attn_out") or why or "no attention call was seen in it"
            made = [_place(event, model.module) for event in mine]
            for place in (m for m in made if isinstance(m, AttentionPlace)):
                point = "cross_attention" if place.cross else "attention"
                places[_fresh(stack.name, block.layer, point, places)] = place
            for why in (m for m in made if isinstance(m, str)):  # one for all (windows); seen calls have the plain name
                unavailable[_fresh(stack.name, block.layer, "attention", places)] = why
    anatomy = replace(model.anatomy, attentions=places, no_attention=unavailable)
    return replace(model, anatomy=anatomy, proof=replace(model.proof, calls=model.proof.calls | calls))


def with_attention_for(model: Model, corpus: Corpus) -> Model:
    """The same for a corpus: a tower of packed patches attends once for each image, so that of several images in a
    sequence its attention is not the call that was proved, and unavailable.

    Raises:
        ProofError: see `with_attention`.
    """
    found = with_attention(model)
    if "image_grid_thw" not in corpus.packed:
        return found
    anatomy = found.anatomy
    towers = {s.name for s in anatomy.stacks if found.reads(s) == "pixel_values"}
    lost = {site: "it is one call for each of several images" for site in anatomy.attentions if site.stack in towers}
    left = {site: place for site, place in anatomy.attentions.items() if site not in lost}
    return replace(found, anatomy=replace(anatomy, attentions=left, no_attention=anatomy.no_attention | lost))


def _fresh(stack: str, layer: int, point: str, taken: Collection[Site]) -> Site:
    names = (point, *(f"{point}_{i}" for i in range(2, 99)))
    return next(site for name in names if (site := Site(stack, layer, name)) not in taken)


def _events(model: Model) -> tuple[list[_Event], dict[str, int], dict[str, str]]:
    """Every attention call of one pass over the example, how many each module makes, and by module ("": all of them)
    why none was seen.
    """
    module, events = model.module, cast(list[_Event], [])
    calls: dict[str, int] = {}
    current: list[tuple[Stack, Block, tuple[int, ...]] | None] = [None]
    before: list[Tensor] = []  # what projections of the block have read so far
    tokens: dict[int, Tensor] = {}  # id of the block -> what its attention sublayer reads

    def enter(stack: Stack, block: Block) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            current[0] = (stack, block, tuple(h.shape if h.ndim == 3 else h[None].shape))
            before.clear()
            tokens.clear()

        return see

    def take(block: Block) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            tokens[id(block)] = h.clone()

        return see

    def add(block: Block) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            for event in [e for e in events[-1:] if e.block is block and e.tokens is not None]:
                event.added = h.clone()

        return see

    def leave(_: Tensor) -> None:
        current[0] = None

    def on_call(key: Key, call: AttentionCall) -> None:
        calls[f"attention:{key[0]}"] = key[1] + 1
        if current[0] is not None:
            shape = call.split(current[0][2][0]).shape
            event = _Event(key, *current[0][:2], call, current[0][2])
            if (shape[0], shape[2]) != event.shape[:2]:  # windows: only there it is asked where rows stand
                event.tokens, event.inputs = tokens.get(id(event.block)), list(before)
            events.append(event)

    def reads(name: str, number: int) -> Callable[[Tensor], None]:
        def see(h: Tensor) -> None:
            before.append(h.clone())
            event = events[-1] if events else None
            if event is not None and current[0] is not None and _same(event, h):
                event.reads.append(Place(name, "in", (0,), number))

        return see

    taps: list[tuple[Place, Callable[[Tensor], None]]] = []
    for stack in model.anatomy.stacks:
        for block in stack.blocks:
            taps.append((block.places["resid_pre"], enter(stack, block)))
            taps += [(block.places[p], see(block)) for p, see in (("attn_in", take), ("attn_out", add))
                     if p in block.places]  # fmt: skip
            taps.append((block.places["resid_post"], leave))
            if block.call == 0:
                taps += [(Place(n, "in", (0,), c), reads(n, c)) for n in _projections(module, block.module) for c in
                         range(sum(b.module == block.module for b in stack.blocks))]  # fmt: skip
    with torch.inference_mode(), unchanged(module):
        bare = [t.clone() for _, t in tensors_in(run_example(module, model.example))]
        try:
            with tapped(module, taps) as state, watching_attention(module, on_call) as softmaxes:
                state.begin()
                seen = [t.clone() for _, t in tensors_in(module(**model.example))]
        except Exception as error:
            why = f"the model does not run while its attention is watched ({class_and_line(error)})"
            return [], {}, {"": why}
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(bare, seen, strict=True)):
        raise ProofError(
            "The model's outputs change while its attention is watched.",
            "It is not deterministic, or its attention takes another path under a function mode.",
            "Load it with another attention implementation: options={'attn_implementation': 'eager'}."
            if hasattr(module, "set_attn_implementation")
            else "Take out what is random in evaluation mode or asks which kernel runs; `scan` needs no attention.",
        )
    unread = {name: f"its softmax is over {shape[-1]} entries in {tuple(shape)}, and no product with the values of all "
              "tokens follows it: windows, chunks or blocks" for name, shape in softmaxes.items()}  # fmt: skip
    return events, calls, unread


def _projections(module: nn.Module, block: str) -> list[str]:
    """Modules inside a block that hold a matrix."""
    inside = module.get_submodule(block)
    return [f"{block}.{name}" for name, m in inside.named_modules()
            if name and sizes_of(m)]  # fmt: skip


def _same(event: _Event, h: Tensor) -> bool:
    """Whether a tensor is the output of all heads side by side."""
    outs = (event.call.split(event.shape[0]).out_BHTF, event.call.out_BHTF)  # of windows the rows are as they came
    return any(out is not None and h.numel() == out.numel() and out.ndim == 4
               and torch.equal(out.transpose(1, 2).reshape(-1), h.reshape(-1)) for out in outs)  # fmt: skip


def _place(event: _Event, module: nn.Module) -> AttentionPlace | str:
    """The place of one call, or why it cannot be read."""
    B, T = event.shape[:2]
    call, windows = event.call.split(B), cast(Windows, ())
    if call.shape[0] != B or call.shape[2] != T:
        windows = windows_from(event.tokens, event.inputs, event.call.shape, B) or ()
        if not windows or not _back(event, module, windows):
            rows, queries = event.call.shape[0], event.call.shape[2]
            return (
                f"its queries are {queries} x {rows} for {T} x {B} tokens: windows, chunks or a subset, whose rows are "
                "not the tokens of a sequence, each of them once"
            )
        call = whole(event.call, windows)
    other = event.block.places.get("cross_attn_out")  # tells them apart where both sequences are of one length
    cross = call.shape[3] != T or other is not None and f"{event.key[0]}.".startswith(f"{other.module}.")
    if cross and call.via == "softmax" and not any(point.startswith("cross_attn") for point in event.block.places):
        return f"its softmax is over {call.shape[3]} entries for {T} tokens, in a block that reads no other sequence"
    K = call.k_BKSE.shape[1] if call.k_BKSE is not None else (call.v_BKSF.shape[1] if call.v_BKSF is not None else 0)
    reads = event.reads[0] if event.reads else None
    guess = AttentionPlace(*event.key, call.via, call.shape[1], K, False, True, cross, reads, windows=windows)
    forward, binary, error, row_sum, size = not cross, True, 0.0, 0.0, 0.0
    with torch.inference_mode():
        for b in range(B):
            a = call.of(b, guess)
            s_HTS, p_HTS = a.dense()
            forward = forward and T > 1 and not bool(p_HTS.triu(1).any())
            binary = binary and (call.via == "softmax" or a.mask_HTS is None or hides_only(a.mask_HTS))
            error, size = max(error, _off(a, p_HTS)), max(size, float(a.score_size(p_HTS)))
            row_sum += float(p_HTS.sum(-1).mean()) / B
    known = {x.dtype for x in (call.q_BHTE, call.scores_BHTS, call.out_BHTF) if x is not None}
    tolerance = rounding_allowed(known, size)
    if not error <= tolerance:
        return (
            f"its output is not softmax(scale q.k + mask) v as massact reads it (off by {error:.2g} of the output; "
            f"rounding would explain {tolerance:.1g}, with scores of the size of {max(1.0, size):.3g})"
        )
    if not call.has_slot and abs(row_sum - 1) > tolerance:
        return f"its rows sum to {row_sum:.3g}: it is not normalised over the keys"
    return replace(guess, forward=forward, binary=binary, error=error, allowed=tolerance, row_sum=row_sum)


def _back(event: _Event, module: nn.Module, windows: Windows) -> bool:
    """Whether what attention gives goes back to the tokens that its queries are of, as far as its rows can be followed:
    where what the sublayer adds are the rows of its output projection, they are those of the windows.
    """
    out, reads = event.call.out_BHTF, event.reads
    if out is None or not reads or event.added is None or event.added.ndim != 3:
        return True
    with torch.inference_mode():
        rows = module.get_submodule(reads[0].module)(out.transpose(1, 2).flatten(2))
    order = order_of(event.added, rows) if isinstance(rows, Tensor) else None
    return order is None or order == sum(windows, ())


def _off(a: Attended, p_HTS: Tensor) -> float:
    """Greatest |P V - output| over the greatest |output|."""
    if a.v_KSF is None or a.out_HTF is None:
        return 0.0
    if a.v_KSF.shape[1] != p_HTS.shape[2] or len(p_HTS) % len(a.v_KSF):
        return float("inf")  # a softmax over features (linear attention): its columns are no keys
    every = torch.arange(a.v_KSF.shape[1], device=a.device)
    out = a.out_HTF.float()
    written = torch.matmul(p_HTS, a.values(every)) + a.slot_update()
    return float((written - out).abs().max() / out.abs().max().clamp(min=1e-30))


def projection_of(model: Model, place: AttentionPlace) -> Callable[[Tensor], Tensor] | None:
    """The output projection W_O without its bias, float32 (R, H * F) -> (R, D); None where it was not found."""
    if place.projection is None:
        return None
    return partial(linear_part, model.module.get_submodule(place.projection.module))
