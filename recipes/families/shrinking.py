"""A tiny configuration of any family of transformers, from the defaults of its class and rules on names and values.

No family is named here. An integer is what its name says (layers, heads, widths, experts, places, tokens of a
vocabulary); numbers that are equal stay equal, products that are equal stay equal, lists with an entry for each layer
are cut to the layers that are kept, of which there are some of every kind.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

VOCABULARY = 99
WIDTH, HEADS, HEAD = 64, 4, 16
_MOST_LAYERS = 6
_SMALL = 1e-3  # a parameter that begins below this is a gate that is shut


def _word(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|_)(?:{pattern})(?:_|$)")


_TOKEN = re.compile(r"(_token_ids?|_token_index|^token_id|_tok_id|^(bos|eos|pad|unk|mask|sep|cls)_index|_token)$")
_NO_SIZE = _word(
    "kernel|kernels|stride|strides|dilation|padding|ratio|factor|window|rate|seed|coef|coefficient|cost|weight|iters?|"
    "scale|patch|channels?_in|num_channels|in_channels|out_channels_image|group|groups|n_group|period|temperature|"
    "offset|theta|base|loss|steps|mult|bins_min|min|sampling|hop|beta|expand|expansion|type|d_conv|labels|queries|"
    "levels|points|frames|bits|divisor|version"
)
_LAYERS = re.compile(r"(^|_)(layers?|depth|n_layer|blocks|layer_num)($|_)")
_NO_LAYERS = _word("feat|max|min|head|window|per|type|types|interval|period|frequency|pattern|shared|dense|postnet|"
                   "predictor|adapter_rank|wise|lstm|res|query|iou|scaling|id|ids|indexes|indices|idxs|names|upsampling|"
                   "upscale|mlp|random|image|summary|up|down|fuser|c2f|size|nextn|mtp|predict")  # fmt: skip
_PERIOD = _word("period|interval|frequency|sparse_step|every|sliding_window_pattern")
_HEADS = re.compile(r"(^|_)(heads?|n_head|num_key_value|kv_heads)($|_)")
_HEAD_DIM = re.compile(
    r"(head_dim|headdim|head_size|d_head|dim_head|d_kv|kv_channels|rotary_dim|qk_dim|dim_per_head|d_rel)$|^head_.*dim$"
)
_EXPERTS = _word("experts|num_experts|expert_num")
_CHOSEN = re.compile(
    r"(experts?_per_tok|experts_per_token|moe_k$|moe_topk|top_k_experts|num_selected|_topk_experts|moe_top_k)"
)
_VOCABULARY = re.compile(r"(vocab|num_embeddings$|num_embeds$|codebook_size|max_2d_position)")
_PLACES = re.compile(
    r"(max_position|n_positions|position_embeddings|max_seq|seq_len|n_ctx|context_length|max_pos_emb|max_.*length$|"
    r"max_.*positions|max_rel|model_max|block_size|position_embedding_size)"
)
_WINDOW = re.compile(r"^(sliding_window|attention_window|local_attention|attention_chunk_size|sliding_window_size)$")
_WIDTH = re.compile(
    r"(hidden|dim|size|width|channels?|rank|features?|filters|inner|embd|d_model|d_latents|d_ff|ffn|units|n_inner|d_embed|length_dim)"
)
_MAIN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "emb_dim", "embedding_size")
_IMAGE = re.compile(r"(image_size|img_size|input_size|resolution|crop_size|spec_size)$")


_FILL = [
    (re.compile(r"^vocab_size$"), VOCABULARY),
    (re.compile(r"^pad_token_id$"), 0),
    (re.compile(r"^head_dim$"), HEAD),
    (re.compile(r"^num_key_value_heads$"), HEADS),
    (re.compile(r"^topk_group$"), 1),
    (re.compile(r"shared_experts$"), 1),
    (re.compile(r"(experts_per_tok|experts_per_token|moe_topk|^n_group)$"), 2),
    (re.compile(r"(experts)$"), 4),
    (re.compile(r"^prediction_length$"), 8),
]


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to shrink: the first one fits most families, others are tried where it does not build or run.

    Args:
        flat: every width becomes one of two numbers, rather than in proportion.
        heads: numbers of heads stay as they are (and widths allow for them).
        image: edge of an image in patches.
        mild: only layers, experts, vocabularies and places are fewer; widths stay as they are.
        head: the width of a head stays as it is, and there are two of them.
        fill: what has no default is given, where its name says what it is.
    """

    flat: bool = False
    heads: bool = False
    image: int = 4
    mild: bool = False
    fill: bool = False
    head: bool = False


POLICIES = (Policy(), Policy(fill=True), Policy(head=True), Policy(flat=True), Policy(image=8), Policy(image=16),
            Policy(heads=True), Policy(mild=True), Policy(mild=True, fill=True, image=16))  # fmt: skip


def shrunk(config: PreTrainedConfig, policy: Policy = POLICIES[0]) -> dict[str, Any]:
    """Arguments of a configuration class that make a tiny one, to be given to it: `type(config)(**shrunk(config))`.

    Args:
        config: with the defaults of its class.
    """
    return _Shrinking(policy, list(holders(config))).of(config)


def holders(config: PreTrainedConfig) -> Iterable[PreTrainedConfig]:
    """A configuration and, one after another, all those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from holders(value)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration declares itself, with the values that it has."""
    common = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    names = [f.name for f in dataclasses.fields(config) if f.name not in common]
    return {n: vars(config)[n] for n in names if n in vars(config)}  # an attribute that differs by layer cannot be got


def _own(config: PreTrainedConfig) -> dict[str, Any]:
    """What a part says otherwise than the defaults of its class."""
    usual = vars(type(config)())
    said = {n: v for n, v in _fields(config).items() if v != usual.get(n) and not isinstance(v, PreTrainedConfig)}
    return {n.removeprefix("_"): v for n, v in said.items() if not n.startswith("_") or n == "_out_indices"}


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _main(fields: dict[str, Any]) -> int:
    if "depths" in fields and _int(fields.get("embed_dim")):  # of the first of its stages
        return fields["embed_dim"]
    return next((fields[n] for n in _MAIN if _int(fields.get(n)) and fields[n] > 0), WIDTH)


class _Shrinking:
    """One configuration with its sub-configurations: equal numbers become equal numbers everywhere in it."""

    def __init__(self, policy: Policy, holders: list[PreTrainedConfig]) -> None:
        self.policy = policy
        self.tokens: dict[int, int] = {}
        self.widths: dict[int, int] = {}
        for holder in holders:
            if _convolves(_fields(holder)):  # it stays as it is: what reads it has its widths
                self.widths |= {w: w for v in _fields(holder).values() for w in _numbers(v) if w >= HEAD}
        for holder in holders:
            fields = _fields(holder)
            self.widths.setdefault(_main(fields), self._main_width(fields))
        for holder in holders:
            for name, value in _fields(holder).items():
                if not _convolves(_fields(holder)) and _rows_of_widths(name, value):
                    self._stages(value)

    def _main_width(self, fields: dict[str, Any]) -> int:
        if self.policy.mild:
            return _main(fields)
        heads = [v for n, v in fields.items() if _int(v) and _HEADS.search(n) and not _HEAD_DIM.search(n)]
        rows = [v for n, v in fields.items() if isinstance(v, list | tuple) and _HEADS.search(n) and v]
        if rows and _int(rows[0][0]):  # numbers of heads by stage stay
            return HEAD * rows[0][0]
        if self.policy.head and heads:
            return 2 * max(HEAD, _main(fields) // heads[0])
        if not self.policy.heads:
            return WIDTH
        return max(WIDTH, math.lcm(*heads[:1]) * HEAD)

    def _stages(self, widths: list[int]) -> None:
        """Widths of stages keep their proportions: numbers of heads have them too."""
        wide = [w for w in widths if w >= HEAD]
        for w in wide:
            least = min(wide)
            if self.widths.get(w) == w:
                continue
            self.widths[w] = w if self.policy.mild else max(HEAD, round(2 * HEAD * w / least))

    # ---- one configuration
    def of(self, config: PreTrainedConfig) -> dict[str, Any]:
        fields = _fields(config)
        if _convolves(fields):
            return {}
        layers = [v for n, v in fields.items() if _int(v) and _is_layers(n)]
        kept = {n: self._kept(fields, n) for n in set(layers)}
        given = {}
        for name, value in fields.items():
            new = self._value(name, value, fields, kept)
            if (
                not name.startswith("_")
                and name != "per_layer_config"
                and (new != value or isinstance(value, PreTrainedConfig))
            ):
                given[name] = new
        stages = vars(config).get("_out_indices")
        if stages and "depths" not in fields and len(layers) == 1:  # layers whose outputs a head takes
            given["out_indices"] = list(range(1, len(stages) + 1))
        return self._products(fields, given)

    def _kept(self, fields: dict[str, Any], n_layers: int) -> list[int]:
        """Which of so many layers are kept: one of every kind, and two at least."""
        rows = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == n_layers]
        marked = [set(v) for n, v in fields.items() if _marks_layers(n, v, n_layers)]
        kinds = {}
        for i in range(n_layers):
            kind = (*(str(row[i]) for row in rows), *(i in marks for marks in marked))
            kinds.setdefault(kind, []).append(i)
        several = len(fields.get("_out_indices") or ()) if "depths" not in fields else 2
        several = 4 if any(_PERIOD.search(n) and _int(v) and v > 1 for n, v in fields.items()) else max(2, several)
        each = 2 if len(kinds) == 2 else 1
        few = {i for marks in marked if len(marks) <= 4 for i in marks}  # layers whose states a head takes
        kept = sorted(few | {i for k in kinds.values() for i in k[:each]})[:_MOST_LAYERS]
        spare = [i for i in range(n_layers) if i not in kept]
        return sorted(kept + spare[: max(0, several - len(kept))])

    def _value(self, name: str, value: Any, fields: dict[str, Any], kept: dict[int, list[int]]) -> Any:
        if isinstance(value, PreTrainedConfig):
            return {**_own(value), **self.of(value), "model_type": value.model_type}
        if isinstance(value, list | tuple):
            return self._list(name, value, kept, _main(fields))
        if isinstance(value, dict):
            return self._sections(value, fields)
        if value is None and self.policy.fill:
            return next((few for pattern, few in _FILL if pattern.search(name)), None)
        if not _int(value) or value < 2:
            return value
        return self._int(name, value, fields, kept)

    def _sections(self, rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters whose sections add up to what they are of a head now."""
        sections = rope.get("mrope_section")
        if not sections or self.policy.mild or self.policy.head:
            return rope
        head = fields.get("head_dim") or _main(fields) // fields["num_attention_heads"]
        total = round(sum(sections) * HEAD / head)
        new = [max(1, total * s // sum(sections)) for s in sections]
        new[0] += total - sum(new)
        return {**rope, "mrope_section": type(sections)(new)}

    def _int(self, name: str, value: int, fields: dict[str, Any], kept: dict[int, list[int]]) -> int:
        for pattern, rule in self._rules(fields, kept):
            if pattern.search(name):
                return rule(value)
        if _is_layers(name):
            return len(kept[value])
        if _HEADS.search(name) and not _HEAD_DIM.search(name) and value <= 256:
            return self._heads(value, fields)
        if _NO_SIZE.search(name):
            return value
        if _HEAD_DIM.search(name):
            return self._head_dim(value, fields)
        if _WIDTH.search(name) and value >= 16:
            return self._width(value, fields)
        return value

    def _rules(
        self, fields: dict[str, Any], kept: dict[int, list[int]]
    ) -> list[tuple[re.Pattern[str], Callable[[int], int]]]:
        """What a name says, the first one that fits; before layers, heads and widths."""
        patch = next((v for n, v in fields.items() if n.endswith("patch_size") and _int(v)), 8)
        image = max(32, self.policy.image * patch) if "depths" not in fields else 16 * self.policy.image
        layers = max((len(k) for k in kept.values()), default=2)
        few = re.compile(r"(max_window_layers|first_k_dense|num_hash_layers|first_last|n_dense|dense_layers)")
        return [
            (_TOKEN, lambda v: v if v < VOCABULARY // 2 else self._token(v)),
            (_CHOSEN, lambda v: min(v, 2)),
            (re.compile(r"(^|_)(n_groups?|topk_group)$"), lambda v: 2 if v > 1 else v),
            (re.compile(r"_feature_layers?$"), lambda v: 1),
            (re.compile(r"shared_experts?$|num_shared_expert"), lambda v: 1),
            (re.compile(r"(experts$|num_experts|n_routed|expert_num)"), lambda v: min(v, 4)),
            (re.compile(r"_offset$"), lambda v: 1),
            (_PERIOD, lambda v: 2),
            (few, lambda v: 1),
            (re.compile(r"shared_layers$"), lambda v: layers // 2),
            (re.compile(r"codebook_size"), lambda v: min(v, 64)),
            (_VOCABULARY, lambda v: min(v, VOCABULARY)),
            (_IMAGE, lambda v: min(v, image)),
            (_WINDOW, lambda v: min(v, 8)),
            (_PLACES, lambda v: min(v, 64)),
            (re.compile(r"topk$"), lambda v: min(v, 8)),
        ]

    def _token(self, value: int) -> int:
        """A token id of the small vocabulary; of equal ids equal ones."""
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens) % (VOCABULARY // 2))

    def _heads(self, value: int, fields: dict[str, Any]) -> int:
        if self.policy.heads or self.policy.mild:
            return value
        most = max(
            v for n, v in fields.items() if _int(v) and _HEADS.search(n) and not _HEAD_DIM.search(n) and v <= 256
        )
        few = 2 if self.policy.head else HEADS
        return max(1, min(value, round(few * value / most))) if most > few else value

    def _head_dim(self, value: int, fields: dict[str, Any]) -> int:
        return value if self.policy.mild or self.policy.head or value <= HEAD else max(HEAD, 4 * round(value / 8 / 4))

    def _width(self, value: int, fields: dict[str, Any]) -> int:
        if self.policy.mild:
            return value
        if value not in self.widths:
            wide = 8 * round(value * self.widths[_main(fields)] / _main(fields) / 8)
            self.widths[value] = WIDTH if self.policy.flat and value <= _main(fields) else min(max(HEAD, wide), 128)
        return self.widths[value]

    def _list(self, name: str, value: Any, kept: dict[int, list[int]], main: int) -> Any:
        if not value or name in ("depths", "num_block_repeats", "blocks_per_stage", "stage_num_blocks"):
            return type(value)(min(v, 2) if _int(v) else v for v in value)
        if re.search(r"_feature_layers?$", name):
            return type(value)(1 if _int(v) and v > 1 else v for v in value)
        if _TOKEN.search(name):
            return type(value)(self._token(v) if _int(v) and v >= VOCABULARY // 2 else v for v in value)
        for n_layers, chosen in kept.items():
            if len(value) == n_layers and not _rows_of_widths(name, value):
                return type(value)(value[i] for i in chosen)
            if _marks_layers(name, value, n_layers):
                marked = [k for k, i in enumerate(chosen) if i in value]
                return type(value)(marked or [len(chosen) - 1])
        if all(map(_int, value)) and sum(value) == main and not self.policy.mild:  # parts of a width
            return type(value)(v * self.widths[main] // main for v in value)
        if _rows_of_widths(name, value):
            return type(value)(self.widths.get(v, v) for v in value)
        if _IMAGE.search(name) and all(map(_int, value)):
            return type(value)(min(v, 64) for v in value)
        return value

    def _products(self, fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Heads times their width stays what it is of the main width: 1, 2 or 4 times as much."""
        main = _main(fields)
        heads = {n: v for n, v in fields.items() if _int(v) and _HEADS.search(n) and not _HEAD_DIM.search(n)}
        sizes = {n: v for n, v in fields.items() if _int(v) and _HEAD_DIM.search(n) and v > 1}
        for (h, n), (d, size) in itertools.product(heads.items(), sizes.items()):
            alike = h.split("_")[0] == d.split("_")[0] or h in ("num_attention_heads", "num_heads", "n_heads")
            times = n * size / main
            if alike and times in (1, 2, 3, 4) and "kv" not in h and "key_value" not in h:
                wide = times * self.widths[main] / given.get(h, n)
                if wide == int(wide) and wide > 1:
                    given[d] = int(wide)
        return given


def _convolves(fields: dict[str, Any]) -> bool:
    """Whether a configuration is of convolutions alone: stages or channels, and nothing with heads or tokens."""
    staged = {"depths", "hidden_sizes", "stem_channels", "stage_out_channels", "block_configs"} & set(fields)
    return bool(staged) and not any(_HEADS.search(n) or "vocab" in n for n, v in fields.items() if v is not None)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [n for v in value for n in _numbers(v)]
    return [value] if _int(value) else []


def _is_layers(name: str) -> bool:
    return bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name.replace("num_hidden_layers", "layers"))


def _marks_layers(name: str, value: Any, n_layers: int) -> bool:
    """Whether a list holds numbers of layers."""
    named = re.search(r"(index|indexes|indices|idxs|_ids|layers|blocks)$", name) and not _TOKEN.search(name)
    return (
        bool(named)
        and isinstance(value, list | tuple)
        and len(value) > 0
        and all(_int(v) and 0 <= v < n_layers for v in value)
    )


def _rows_of_widths(name: str, value: Any) -> bool:
    """Whether a list holds the widths of stages."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(_int(v) and v > 0 for v in value)
        and max(value) > 15
        and bool(re.search(r"(hidden|dims?$|channels|embed_dim|sizes$|conv_dim|width)", name))
        and not re.search(r"(kernel|patch|feat_sizes|image)", name)
    )


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model with random values where its parameters begin at zero or next to it, or were never set.

    Gates and scales of layers that begin shut would make a proof about zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and not float(p.abs().max()) > _SMALL:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
            elif p.is_floating_point() and p.numel() and not float(p.abs().max()) < 1e3:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model
