"""Attention taps: see what every attention call is given and gives, with the model's own kernel left in place.

Three ways, tried in this order; outputs stay bit-identical in all of them. Keys and values can be replaced before the
kernel in the first two:

* a `TorchFunctionMode` sees `F.scaled_dot_product_attention`, whoever calls it (transformers, timm, Falcon, one's
  own module), and asks the same fused kernel for its log-sum-exp as well;
* the registered attention function of transformers stands in front of every other implementation (eager with
  soft-capping or learned sinks, flex, flash) and hands the call on to the model's own function; a function that has an
  attribute `reads` says by it what else is in the softmax (an extra slot), and by `has_slot` that what it gives the
  kernel is not to be looked at (the slot may be one more key there). In 16 bits such a function rounds its
  scores before the softmax: then these are what counts, and they are taken from its softmax as well;
* where attention is written out, the same mode sees the softmax over (batch, heads, queries, keys) and the product
  with the values that follows. This gives logits and values, but no queries and keys.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from massact.records.anatomy import AttentionPlace
from massact.stats.attention_call import Attended, fused_attention

Seen = Callable[["AttentionCall"], Tensor | None]  # gives None to leave the output, or a new one (B, H, T, F)
Replace = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keys (B, K, S, E) and values (B, K, S, F): new ones
Key = tuple[str, int]  # module, which attention call inside it in one forward pass

# torch hands its own attention layer to a mode as one call, and what it calls is hidden: here it goes on as written.
_WHOLE = F.multi_head_attention_forward
_INSIDE = FunctionType(_WHOLE.__code__, {**vars(F), "has_torch_function": lambda _: False}, argdefs=_WHOLE.__defaults__)
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a batch; see `Attended` for the fields. `via` says how it was seen.

    A slot's value is (B or 1, H, T or 1, F): one for all queries, or one for each.
    """

    via: str
    q_BHTE: Tensor | None
    k_BKSE: Tensor | None
    v_BKSF: Tensor | None
    out_BHTF: Tensor | None
    lse_BHT: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None
    causal: bool = False
    cap: float | None = None
    sink_H: Tensor | None = None
    scores_BHTS: Tensor | None = None
    slot_logit_BHT: Tensor | None = None
    slot_value_BHTF: Tensor | None = None

    @property
    def has_slot(self) -> bool:
        """Whether something that is no key is in the denominator, so that rows over the keys sum to less than 1."""
        return self.sink_H is not None or self.slot_logit_BHT is not None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, T, S)."""
        if self.scores_BHTS is not None:
            return tuple(self.scores_BHTS.shape)
        assert self.q_BHTE is not None and self.k_BKSE is not None
        return *self.q_BHTE.shape[:3], self.k_BKSE.shape[2]

    def of(self, b: int, place: AttentionPlace) -> Attended:
        """The call of one sequence of the batch; what its mask means was found out when the place was."""

        def one(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[b]

        value = self.slot_value_BHTF
        value = value if value is None else value[b if len(value) > 1 else 0]
        mask = self.mask
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            mask = mask[b if len(mask) > 1 else 0]
        return Attended(
            one(self.q_BHTE), one(self.k_BKSE), one(self.v_BKSF), one(self.out_BHTF), one(self.lse_BHT),
            self.scale, mask, place.binary, self.causal, place.forward, self.cap, self.sink_H, one(self.scores_BHTS),
            one(self.slot_logit_BHT), value,
        )  # fmt: skip

    def split(self, n_sequences: int) -> AttentionCall:
        """The call with its sequences apart, where they and the heads were one axis."""
        if self.scores_BHTS is None or self.q_BHTE is not None or len(self.scores_BHTS) == n_sequences:
            return self
        parts = {k: getattr(self, k) for k in ("scores_BHTS", "v_BKSF", "out_BHTF")}
        return replace(self, **{k: x.reshape(n_sequences, -1, *x.shape[2:]) for k, x in parts.items()})


class _Taps(TorchFunctionMode):
    """Sees attention calls and says which module they belong to."""

    def __init__(
        self,
        on_call: Callable[[Key, AttentionCall], Tensor | None],
        wanted: set[str] | None,
        replace_keys: Callable[[Key, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.on_call, self.wanted, self.replace_keys = on_call, wanted, replace_keys
        self.inside: list[str] = []
        self.counts: dict[str, int] = defaultdict(int)
        self.unread: dict[str, tuple[int, ...]] = {}  # module -> shape of a softmax that no product was seen to follow
        self._pending: tuple[Tensor, Tensor] | None = None  # keys and values before they were repeated for GQA
        self._within = False  # inside an attention function of transformers' registry
        self._muted = False  # inside one that gives the kernel a slot as one more key, and tells by itself
        self._rounded: Tensor | None = None  # what its softmax was given, in 16 bits
        self._n_seen = 0
        self._probs: tuple[Tensor, Tensor, set[int]] | None = None  # logits, probabilities, where these may lie

    def begin(self) -> None:
        """Before every forward pass."""
        self.counts.clear()
        self.inside.clear()
        self._probs = None

    def emit(self, call: AttentionCall) -> Tensor | None:
        name = self.inside[-1] if self.inside else ""
        number = self.counts[name]
        self.counts[name] += 1
        self.unread.pop(name, None)
        self._n_seen += 1
        return self.on_call((name, number), call)

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the next attention call of the module that runs is given in place of its keys and values."""
        if self.replace_keys is None:
            return key, value
        name = self.inside[-1] if self.inside else ""
        return self.replace_keys((name, self.counts[name]), key, value)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.wanted is not None and not self.inside:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is _WHOLE:
            with self:
                return _INSIDE(*args, **kwargs)
        out = func(*args, **kwargs)
        if self._within:  # an implementation of transformers: of its softmax only rounded scores are looked at
            if func in _SOFTMAX:
                given = args[0] if args else kwargs["input"]
                self._rounded = given if given.dtype in (torch.float16, torch.bfloat16) else None
            return out
        if func in _SOFTMAX and isinstance(out, Tensor):
            self._softmax(args[0] if args else kwargs["input"], out)
        elif self._probs is not None:
            return self._after_softmax(func, args, out)
        return out

    # ---- the fused kernel
    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if not self._within and query.ndim == 4:  # otherwise it was done where the interface gave them
            key, value = self.before(key, value)
        mask = _additive(attn_mask, query.dtype)
        given, grouped = None, key.ndim == 4 and key.shape[1] != query.shape[1]
        on_cpu = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if query.ndim == 4 and dropout_p == 0.0 and on_cpu and (enable_gqa or not grouped):
            # On a CPU this is the kernel that SDPA itself chooses. (Autocast casts what SDPA is given, not this.)
            given = fused_attention(query, key, value, mask, is_causal, factor)
        lse = None
        if given is None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            if query.ndim == 4:
                with torch.no_grad():
                    second = fused_attention(query, key, key, mask, is_causal, factor)
                lse = None if second is None else second[1]
        else:
            out, lse = given
        if query.ndim == 4 and not self._muted:
            k, v = self._pending if self._pending is not None else (key, value)
            new = self.emit(AttentionCall("sdpa", query, k, v, out, lse, factor, mask, is_causal))
            out = out if new is None else new
        return out

    # ---- the registered function of transformers
    def through(self, original: Callable[..., Any] | None) -> Callable[..., Any]:
        """A function of transformers' attention interface that hands a call on and looks at what went through."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any
        ) -> Any:
            own = original or _eager_of(module)
            if own is None:
                raise RuntimeError(f"{type(module).__name__} has no attention function of its own.")
            if not self.inside and self.wanted is not None:
                return own(module, query, key, value, attention_mask, *args, **kw)
            key, value = self.before(key, value)
            # A function with `reads` may change keys and values before it gives them to the kernel.
            self._pending = None if hasattr(own, "reads") else (key, value)
            self._within, self._rounded, seen = True, None, self._n_seen
            self._muted = getattr(own, "has_slot", lambda _: False)(module)
            try:
                result = own(module, query, key, value, attention_mask, *args, **kw)
            finally:
                self._pending, self._within, self._muted = None, False, False
            if self._n_seen == seen:  # it did not come to the fused kernel of torch
                call = _interface_call(own, module, (query, key, value, attention_mask), args, kw, result[0])
                if hasattr(own, "reads"):
                    with torch._C.DisableTorchFunction():  # a softmax over slots is no attention
                        fields = own.reads(module, query, key, value, attention_mask, *args, **kw)
                    call = replace(call, **fields)
                elif self._rounded is not None:
                    call = _with_scores(call, self._rounded)
                self._rounded = None
                new = self.emit(call)
                return result if new is None else (new.transpose(1, 2).contiguous(), *result[1:])
            return result

        return attend

    # ---- attention that is written out
    def _softmax(self, logits: Tensor, probs: Tensor) -> None:
        square = probs.ndim == 4 or (probs.ndim == 3 and probs.shape[1] == probs.shape[2])
        if self.inside and probs.ndim >= 4:
            self.unread[self.inside[-1]] = tuple(probs.shape)
        if square and self.inside:
            self._probs = (logits, probs, {probs.data_ptr()})

    def _after_softmax(self, func: Any, args: tuple, out: Any) -> Any:
        assert self._probs is not None
        logits, probs, addresses = self._probs
        contracted = func is torch.einsum and len(args) == 3
        first = args[int(contracted)] if args else None
        if not isinstance(first, Tensor) or not isinstance(out, Tensor) or first.data_ptr() not in addresses:
            return out
        if contracted or (func in _PRODUCTS and len(args) > 1):
            self._probs = None
            value, seen = _of_einsum(args[0], args[2], out) if contracted else (args[1], out)
            if value is not None:
                heads = _heads(value, seen, logits)
                new = self.emit(AttentionCall("softmax", None, None, heads[1], heads[2], scores_BHTS=heads[0]))
                if new is not None:
                    seen.copy_(new.reshape(seen.shape))  # a view of what the product gave
        elif out.numel() == probs.numel():
            addresses.add(out.data_ptr())
        return out


def _heads(value: Tensor, out: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and output of attention that is written out; (B * H, ...) becomes (1, B * H, ...)."""
    if logits.ndim == 3:
        logits = logits[None]
    B, H = logits.shape[:2]
    value, out = (x.reshape(B, -1, *x.shape[-2:]) if x.ndim == 3 else x for x in (value, out))
    return logits, value, out


def _of_einsum(equation: str, value: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor]:
    """Values and output of probabilities times values as (B, H, S, F) and (B, H, T, F); None where it is not that."""
    inputs, _, given = equation.replace(" ", "").partition("->")
    probs, _, values = inputs.partition(",")
    width = set(values) - set(probs)
    if len(probs) != 4 or len(width) != 1 or not set(probs[:2]) <= set(given):
        return None, out
    f = width.pop()
    wanted = probs[:2] + probs[3] + f, probs[:3] + f
    if sorted(values) != sorted(wanted[0]) or sorted(given) != sorted(wanted[1]):
        return None, out
    return value.permute(*map(values.index, wanted[0])), out.permute(*map(given.index, wanted[1]))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function beside the class of an attention module."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _interface_call(
    own: Callable[..., Any], module: nn.Module, given: tuple[Any, ...], args: tuple, kw: dict, out: Tensor
) -> AttentionCall:
    """What an implementation other than SDPA was given, in one form."""
    query, key, value, mask = given
    named = dict(kw)
    names = list(inspect.signature(own).parameters)[5:]
    named |= dict(zip(names, args, strict=False))
    scale = named.get("scaling")
    eager = not any(word in getattr(own, "__name__", "") for word in ("flash", "flex"))
    said = named.get("is_causal")
    said = bool(getattr(module, "is_causal", False) if said is None else said)
    windowed = None if eager or isinstance(mask, Tensor) and mask.ndim == 4 else named.get("sliding_window")
    mask, bias = _additive(_mask_of(mask, query, key, windowed, said), query.dtype), named.get("position_bias")
    if isinstance(bias, Tensor):
        mask = bias if mask is None else mask + bias
    causal = said and mask is None and not eager and query.shape[2] > 1
    sinks = named.get("s_aux", getattr(module, "sinks", None))
    cap = named.get("softcap")
    return AttentionCall(
        "interface", query, key, value, out.transpose(1, 2), None, query.shape[-1] ** -0.5 if scale is None else scale,
        mask, causal, cap, sinks if isinstance(sinks, Tensor) else None,
    )  # fmt: skip


def _mask_of(mask: Any, query: Tensor, key: Tensor, window: int | None, causal: bool) -> Tensor | None:
    """The mask that an implementation lays over its logits, (B or 1, 1, T, S), however it was told of it.

    Eager attention is given it; flex attention a function of positions; flash attention the width of a window, which
    has so many keys on each side of the query, itself among them. (Padding, which flash attention leaves out, is left
    out of what is measured.)
    """
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask
    T, S = query.shape[2], key.shape[2]
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import create_mask

        with torch._C.DisableTorchFunction():
            return create_mask(mask.mask_mod, len(query), 1, T, S, device=str(query.device))
    if window is None or window >= S:
        return None
    # Flash attention counts queries from the end of the keys.
    behind_TS = torch.arange(S - T, S, device=query.device)[:, None] - torch.arange(S, device=query.device)
    seen_TS = behind_TS.abs() < window
    return (seen_TS & (behind_TS >= 0) if causal else seen_TS)[None, None]


def _with_scores(call: AttentionCall, given: Tensor) -> AttentionCall:
    """The call with its scores as a softmax was given them, where these are of its keys, and of a learned sink."""
    B, H, T, S = call.shape
    if given.shape == (B, H, T, S) and call.sink_H is None:
        return replace(call, scores_BHTS=given)
    if given.shape == (B, H, T, S + 1) and call.sink_H is not None:
        # The sink is the last column. Rows may have been shifted, by their maximum say: back to where it is.
        shift_BHT1 = call.sink_H.float()[:, None, None] - given[..., S:].float()
        return replace(call, scores_BHTS=given[..., :S].float() + shift_BHT1)
    return call


class Attending:
    """Attention calls of the forward passes inside a `with`; `fired` counts the calls of each place since `begin`."""

    def __init__(self, taps: _Taps, places: Mapping[Key, int]) -> None:
        self._taps, self._modules = taps, dict.fromkeys(module for module, _ in places)
        self.fired, self._earlier = [0] * len(places), [False] * len(places)

    @property
    def calls(self) -> dict[str, int]:
        """ "attention:module" -> how often it has attended in this forward pass, of every module with a place."""
        return {f"attention:{name}": self._taps.counts[name] for name in self._modules}

    @property
    def complete(self) -> bool:
        """Whether every place has been seen in this forward pass."""
        return all(self.fired)

    def begin(self) -> None:
        """To be called before every forward pass."""
        self._taps.begin()
        self._earlier = self.ever()
        self.fired = [0] * len(self.fired)

    def ever(self) -> list[bool]:
        """Which places have been seen in any forward pass."""
        return [earlier or now > 0 for earlier, now in zip(self._earlier, self.fired, strict=True)]


@contextmanager
def attending(
    root: nn.Module, taps: Mapping[AttentionPlace, Seen], before: Mapping[AttentionPlace, Replace] | None = None
) -> Iterator[Attending]:
    """See the attention calls at some places for the length of a `with`.

    Args:
        root: the model that the places were found in.
        taps: places, each with the function that sees its call.
        before: of some of them, what replaces its keys and values before the kernel gets them.
    """
    keys = {(place.module, place.number): change for place, change in (before or {}).items()}
    order = {(place.module, place.number): i for i, place in enumerate(taps)}
    functions = list(taps.values())
    state: Attending

    def on_call(key: Key, call: AttentionCall) -> Tensor | None:
        i = order.get(key)
        if i is not None:
            state.fired[i] += 1
            with torch._C.DisableTorchFunction():  # what looks at attention may use torch as it likes
                return functions[i](call)
        return None

    def replace_keys(key: Key, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if key not in keys:
            return k, v
        with torch._C.DisableTorchFunction():
            return keys[key](k, v)

    seen = _Taps(on_call, {module for module, _ in order}, replace_keys if keys else None)
    state = Attending(seen, order)
    if not order:
        yield state
        return
    with _installed(root, seen):
        yield state


@contextmanager
def watching_attention(
    root: nn.Module, on_call: Callable[[Key, AttentionCall], Tensor | None]
) -> Iterator[dict[str, tuple[int, ...]]]:
    """See every attention call of one pass, with the innermost module that makes it; yields `_Taps.unread`."""
    taps = _Taps(on_call, None)
    with _installed(root, taps):
        yield taps.unread


@contextmanager
def _installed(root: nn.Module, taps: _Taps) -> Iterator[None]:
    """Hooks that say which module runs, the registered functions, and the mode; all gone afterwards."""
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: taps.inside.append(name)

    def leave(*_: Any) -> None:
        if taps.inside:
            taps.inside.pop()

    try:
        for name, module in root.named_modules():
            # Those inside as well: what they attend is not the outer one's, and must not be counted as its.
            if taps.wanted is None or not taps.wanted.isdisjoint(_around(name)):
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave, always_call=True))
        with ExitStack() as stack:
            stack.enter_context(_registered(taps))
            stack.enter_context(taps)
            taps.begin()
            yield
    finally:
        for handle in handles:
            handle.remove()


def _around(name: str) -> list[str]:
    """A module and those that it lies in, the root ("") first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


@contextmanager
def _registered(taps: _Taps) -> Iterator[None]:
    """Our function in front of every attention function that transformers knows, "eager" included."""
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
    except ImportError:
        yield
        return
    before = dict(functions._local_mapping)
    try:
        for name in {*functions, "eager"}:
            functions[name] = taps.through(functions.get(name))
        yield
    finally:
        for name in list(functions._local_mapping):
            del functions[name]
        for name, function in before.items():
            functions[name] = function
