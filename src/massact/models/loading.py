"""Load a model from a name, a folder or a live module, and hand it out only when it is proved."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.discovery import discover, run_example
from massact.anatomy.examples import (
    device_of,
    example_variants,
    fixed_arguments,
    float_dtype,
    placeholders_of,
    timm_cfg,
    to_device,
    whole_images,
)
from massact.anatomy.proof import Proof, prove
from massact.anatomy.rows import proved_rows
from massact.corpora import Prompt
from massact.models.adapters import (
    adapter_config,
    adapter_notes,
    adapter_record,
    local_adapter,
    options_of,
    read_adapter,
)
from massact.models.checkpoint_formats import packing_record
from massact.models.failures import failure_of
from massact.models.gguf_header import in_folder, is_gguf
from massact.models.heap import give_back
from massact.models.names import short_name
from massact.models.offloading import dispatched
from massact.models.requests import checked_example, live_name, paths_of, request_of
from massact.models.speech import prompt_of
from massact.models.timm_models import TIMM, read_timm
from massact.models.weight_values import check_finite, n_parameters, vectors_hash, weights_hash
from massact.models.wrappers import says_inputs, unwrapped
from massact.records.anatomy import Anatomy, Place, Stack
from massact.records.errors import ProofError, UserError
from massact.records.reachability import check_on_hub
from massact.records.runinfo import ModelInfo
from massact.records.weight_types import of_gguf
from massact.trace import unchanged
from massact.trace.compilation import compiled_parts

EMBEDDED = "embedded"
SOUND = ("input_features", "input_values")  # what transformers calls inputs of sound


@dataclass
class Model:
    """A model that massact understands: the module, where everything is in it, and the proof.

    Args:
        module: the live module, left in the mode it came in; it is run in evaluation mode, and never modified.
        anatomy: stacks, blocks and sites.
        proof: what was checked, with the numbers.
        tokenizer: of a text model, or None.
        processor: what prepares images for the model: an image processor of transformers, the fields of its file, or a
            `pretrained_cfg` of timm; of a model of sound its feature extractor; None where nothing says so.
        name: the id, path or class name it was loaded by.
        revision: of a Hub model, or None.
        arguments: of every forward pass. example: a short input that it runs on.
        head: what makes logits (B, classes) of the model and inputs, where the module has no head of its own that
            should; see `massact.interventions.class_heads`.
        asked: options that it was read with.
        taken_off: what was put around the module, and what was done about it, a sentence each; see `unwrapped`.
        compiled: whether torch.compile runs the module or what is around it.
    """

    module: nn.Module
    anatomy: Anatomy
    proof: Proof
    tokenizer: Any = None
    name: str = ""
    revision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    processor: Any = None
    head: Any = None
    asked: dict[str, Any] = field(default_factory=dict)
    taken_off: list[str] = field(default_factory=list)
    compiled: bool = False

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {type(self.module).__name__}, {self.anatomy}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        return float_dtype(self.module)

    @property
    def around(self) -> list[str]:
        """What lies around the weights, as it is now: wrappers that were taken off, adapters; a sentence each."""
        return [*self.taken_off, *adapter_notes(self.module)]

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens, where the configuration says."""
        return context_of(self.module)

    def run(self, inputs: dict[str, Any], *, places: Iterable[Place]) -> Any:
        """One forward pass through the smallest part of the model that reaches all `places`.

        The language-model head is skipped unless a place is in it: it costs 30 % of a GPT-2 forward pass.
        """
        if self.device.type == "cpu":
            give_back()
        part = self._part([p.module for p in places], set(inputs))
        given = to_device(inputs, self.device, self.dtype)
        if "input_ids" in given and "decoder_input_ids" not in given and _needs_decoder(part):
            given["decoder_input_ids"] = self.decoder_ids(given["input_ids"])
        whole = to_device(whole_images(part, given), self.device, self.dtype)
        try:
            with unchanged(part):  # what a short sequence switches must not hold for the next one
                return part(**(given | whole | self._arguments(part)))
        except Exception as error:
            if (told := failure_of(error, part, given)) is None:
                raise
            raise told from error

    def _part(self, modules: list[str], given: set[str]) -> nn.Module:
        if not says_inputs(self.module):  # what a wrapper does before and behind its parts is not known
            return self.module
        names = {id(m): n for n, m in self.module.named_modules()}
        base = getattr(self.module, "base_model", self.module)
        known = isinstance(base, nn.Module) and id(base) in names
        # What DINOv3 calls its base is its encoder, which takes hidden states.
        candidates = [base] if known and _required(base) <= given else []
        for name in {m.split(".")[0] for m in modules}:  # one tower of a two-tower model
            tower = getattr(self.module, name, None)
            main = getattr(tower, "main_input_name", None)
            if main in given and _takes_only(tower, main) and tower is not _decoder(self.module):
                candidates.insert(0, tower)
        if modules and "input_ids" not in given and "input_ids" in self.inputs_accepted():
            candidates = self._towers(modules[0], given) + candidates
        for part in candidates:
            prefix = names[id(part)]
            if prefix and all(m == prefix or m.startswith(prefix + ".") for m in modules):
                return part
        return self.module

    def _towers(self, path: str, given: set[str]) -> list[nn.Module]:
        """The parts of a mixed model around a module that run on these inputs alone."""
        around = [self.module.get_submodule(path[:i]) for i, character in enumerate(path) if character == "."]
        return [
            part
            for part in around
            if (name := getattr(part, "main_input_name", None)) in given
            and given <= set(inspect.signature(part.forward).parameters)
            and _takes_only(part, str(name))
        ]

    def _arguments(self, part: nn.Module) -> dict[str, Any]:
        if part is self.module:
            return self.arguments
        return fixed_arguments(part) if hasattr(part, "config") else {}

    @property
    def image_input(self) -> str | None:
        """Name of the input that takes pixels; None where the model takes none."""
        if "pixel_values" in self.inputs_accepted():
            return "pixel_values"
        pixels = [k for k, v in self.example.items() if isinstance(v, Tensor) and v.ndim == 4 and v.shape[1] == 3]
        return pixels[0] if len(pixels) == 1 else None

    @property
    def sound_input(self) -> str | None:
        """Name of the input that takes sound; None where the model takes none."""
        return self.main_input if self.main_input in SOUND else None

    @property
    def prompt(self) -> Prompt | None:
        """What the decoder of a model of sound reads first; None for any other model."""
        takes = self.inputs_accepted()
        if "decoder_input_ids" not in takes or self.sound_input is None or "input_ids" in takes:
            return None
        return prompt_of(self.module, self.tokenizer)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding, for models of tokens."""
        try:
            embedding = getattr(self.module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # models of two towers have no embedding that is the one
            embedding = None
        text = getattr(getattr(self.module, "config", None), "text_config", None)
        return getattr(embedding, "num_embeddings", getattr(text, "vocab_size", None))

    @property
    def main_input(self) -> str:
        """Name of the input that the model is about: input_ids, pixel_values, input_features, or one's own."""
        first = next(iter(inspect.signature(self.module.forward).parameters), "inputs")
        return getattr(self.module, "main_input_name", first)

    def inputs_accepted(self) -> set[str]:
        """Names of the inputs that the model's forward takes."""
        return set(inspect.signature(self.module.forward).parameters)

    def reads(self, stack: Stack) -> str | None:
        """Name of the input whose positions a stack has: of the innermost part that holds it and says what it reads."""
        decoder = getattr(self.module, "get_decoder", lambda: None)() if _needs_decoder(self.module) else None
        names = {id(part): name for name, part in self.module.named_modules()}
        if decoder is not None and stack.path.startswith(f"{names.get(id(decoder))}."):
            return "decoder_input_ids"
        said = getattr(self.module, "main_input_name", None)
        vision = getattr(getattr(self.module, "config", None), "vision_config", None)
        for at in [i for i, character in enumerate(stack.path) if character == "."]:
            part = self.module.get_submodule(stack.path[:at])
            said = getattr(part, "main_input_name", said)
            if vision is not None and type(getattr(part, "config", None)) is type(vision):
                said = "pixel_values"  # such a tower may call its pixels hidden states
        return said

    @property
    def placeholders(self) -> dict[int, str]:
        """Token ids that stand for something else than text: id -> image, video or audio, as the configuration says."""
        config = getattr(self.module, "config", None)
        return {} if config is None else placeholders_of(config)

    def decoder_ids(self, ids: Tensor) -> Tensor:
        """What a decoder reads by teacher forcing: the text (B, T) one position later, its start token in front."""
        config: Any = self.module.config
        start = getattr(config, "decoder_start_token_id", None)
        shifted = ids.roll(1, dims=1)
        shifted[:, 0] = start if start is not None else (getattr(config, "pad_token_id", None) or 0)
        return shifted

    def reaches(self, stack: Stack, inputs: Iterable[str]) -> bool:
        """Whether inputs of these names run through a stack (one tower of two needs only its own)."""
        given = set(inputs) | {name.replace("inputs_embeds", "input_ids") for name in inputs}
        needed = getattr(self._part([stack.path], given), "main_input_name", None)
        if self.reads(stack) == "pixel_values" and not any(name.startswith("pixel_values") for name in given):
            return False  # the tower of a mixed model, which reads text alone
        return needed is None or needed in given

    def info(self) -> ModelInfo:
        config = getattr(self.module, "config", None)
        stacks = self.anatomy.stacks
        return ModelInfo(
            id=self.name,
            name=short_name(self.name),
            revision=self.revision,
            architecture=type(self.module).__name__,
            model_type=getattr(config, "model_type", None),
            n_layers={s.name: s.n_layers for s in stacks},
            d_model={s.name: s.d_model for s in stacks},
            stacks={s.name: s.path for s in stacks},
            post_norm={s.name: s.post_norm for s in stacks},
            streams={s.name: list(s.streams) for s in stacks if s.streams},
            dtype=str(self.dtype).removeprefix("torch."),
            n_parameters=n_parameters(self.module),
            weights_sha256=weights_hash(self.module),
            vectors_sha256=vectors_hash(self.module),
            proof=self.proof.as_dict(),
            attention=getattr(config, "_attn_implementation", None),
            gguf=self.gguf,
            quantised=self.quantised,
            adapters=adapter_record(self.module),
            asked={k: True for k in ("allow_pickle", "trust_remote_code") if self.asked.get(k)},
        )

    @property
    def gguf(self) -> dict[str, Any] | None:
        """What a run keeps of the GGUF file that the model was read from, see `massact.models.gguf_models`."""
        return getattr(self.module, "massact_gguf", None)

    @property
    def quantised(self) -> dict[str, Any] | None:
        """How the weights were quantised, see `massact.records.weight_types`; None where they were not."""
        return of_gguf(self.gguf) or packing_record(self.module)


def context_of(module: nn.Module) -> int | None:
    """Longest sequence in tokens that a module says it takes."""
    config = getattr(module, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                # RoBERTa keeps two positions for padding: its table is longer than its context.
                offset = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
                return value - offset
    return None


def load(
    spec: str | os.PathLike[str] | nn.Module | None = None,
    *,
    tokenizer: Any = None,
    blocks: str | Iterable[str] | None = None,
    inputs: dict[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    processor: Any = None,
    **pretrained: Any,
) -> Model:
    """Load a model, find its anatomy and prove it.

    Args:
        spec: a Hub id, a local folder, a GGUF file (a path, or owner/name/file.gguf of the Hub), a name of timm
            ("timm:vit_tiny_patch16_224", see `massact.models.timm_models.read_timm`), a live module, or None for the
            embedded model.
        tokenizer: of a live module; loaded beside the weights otherwise.
        blocks: dotted path(s) of the list(s) of blocks, where the search does not find them.
        inputs: one short example input (name -> tensor) for a module that is not from transformers or timm.
        device: "auto" (CUDA where there is one), or any torch device.
        dtype: "auto" (as stored; of GGUF float32, which holds all of its values), "float32", "float16", "bfloat16", or
            one of torch (torch.bfloat16); torch_dtype is another name for it.
        revision: of a Hub model; an error for a local folder, which has none.
        options: more keyword arguments for `from_pretrained` (for example trust_remote_code=True,
            allow_pickle=True to read `.bin` weights with weights_only=True, or gguf_file="NAME.gguf").
        processor: of images or sound, for a live module; read beside the weights otherwise.
        **pretrained: the usual ones of `options` by name: torch_dtype, device_map, trust_remote_code,
            attn_implementation, ... (see `massact.models.requests.PRETRAINED`).

    A live module stays where and as it is; it is called by its `name_or_path`, where it has one.

    Raises:
        UserError: the model cannot be found or read, or an option means nothing for it.
        ProofError: the model was read but cannot be proved to be understood.
    """
    request = request_of(device, dtype, revision, options, pretrained)
    if isinstance(spec, nn.Module):
        request.refuse_of_live()
        given, name = spec, ""
    else:
        asked = dict(request.options)
        name = in_folder(EMBEDDED if spec is None else os.fspath(spec), asked.pop("gguf_file", None))
        given, found, known = _read(name, request.dtype, revision, asked)
        placed = dispatched(given) or "device_map" in asked
        given = (given if placed else given.to(request.device)).eval()
        tokenizer, processor = tokenizer or found, known if processor is None else processor
    module, around = unwrapped(given, inputs)
    name = name or live_name(module)
    processor = timm_cfg(module) if processor is None else processor
    check_finite(module)
    with unchanged(module, values=True):
        anatomy, proof, arguments, example = proved(module, blocks, inputs)
    compiled = bool(compiled_parts(given))
    made = Model(module, anatomy, proof, tokenizer, name, revision, arguments, example, processor, None,
                 request.options, around, compiled)  # fmt: skip
    return replace(made, anatomy=proved_rows(module, anatomy, example, made.reads))


def proved(
    module: nn.Module, blocks: str | Iterable[str] | None, inputs: dict[str, Any] | None
) -> tuple[Anatomy, Proof, dict[str, Any], dict[str, Any]]:
    """The anatomy of a module and its proof, arguments of every forward pass, and the example it was proved on."""
    paths = paths_of(blocks)
    arguments = fixed_arguments(module) if inputs is None and hasattr(module, "config") else {}
    place = _placer(module)
    if inputs is None:
        pairs = _own_examples(module)
    else:
        pairs = [(checked_example(inputs), inputs)]
    refused: UserError | None = None
    for first, second in pairs:
        try:
            anatomy = discover(module, place(first), paths)
        except ProofError:
            raise
        except UserError as error:  # it does not run on this one
            refused = refused or error
            continue

        def run(given: dict[str, Any]) -> Any:
            with torch.inference_mode():
                return run_example(module, given)

        proof = prove(module, anatomy, place(second), run)
        return anatomy, proof, arguments, place(second)
    assert refused is not None  # there is always a first example
    raise refused


def _read(
    name: str, dtype: torch.dtype | str, revision: str | None, options: dict[str, Any]
) -> tuple[nn.Module, Any, Any]:
    """A model by name, its tokenizer and its processor, where it has them."""
    if name.startswith(TIMM):
        return read_timm(name, dtype, revision, options), None, None
    # transformers is slow to import
    if is_gguf(name):
        from massact.models.gguf_models import read_gguf

        return (*read_gguf(name, dtype, revision, options), None)
    from massact.models.transformers_models import (
        looks_local,
        read_extractor,
        read_pretrained,
        read_processor,
        read_tokenizer,
    )

    folder = location_of(name)
    if revision is not None and os.path.isdir(folder):
        what = "The embedded model" if name == EMBEDDED else f"The local folder {name!r}"
        raise UserError(f"{what} has no revisions.", f"--revision {revision!r} would change nothing.",
                        "Leave it out, or give the Hub id of the model.")  # fmt: skip
    if not looks_local(folder):
        check_on_hub(folder, cache=options.get("cache_dir"))
    folder = local_adapter(folder, options, revision)
    adapter = adapter_config(folder, bool(options.get("allow_pickle")))
    if adapter is not None:
        whole = read_adapter(folder, adapter, lambda base, given: read_pretrained(base, dtype, None, given),
                             options_of(options), lambda place: read_tokenizer(place, None, options))  # fmt: skip
        return *whole, None
    module, tokenizer = read_pretrained(folder, dtype, revision, dict(options))
    if "pixel_values" in inspect.signature(module.forward).parameters:
        return module, tokenizer, read_processor(name, revision, options)
    if getattr(module, "main_input_name", None) in SOUND:
        return module, tokenizer, read_extractor(name, revision, options)
    return module, tokenizer, None


def _own_examples(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Examples to watch, each with another one to prove on, in the order in which they should be tried."""
    try:
        return list(zip(example_variants(module, 0), example_variants(module, 1), strict=True))
    except UserError:
        raise
    except Exception as error:  # configurations hold anything: lists of sizes, strings, objects of their own
        raise UserError(
            f"massact cannot make an example input for {type(module).__name__}.",
            f"Its configuration is unusual ({type(error).__name__}: {error}).",
            "Give one short example: load(model, inputs={'name': tensor, ...}).",
        ) from error


def _placer(module: nn.Module) -> Any:
    device, dtype = device_of(module), float_dtype(module)
    return lambda given: to_device(given, device, dtype)


def location_of(name: str) -> str:
    """Where the files of a model lie: the folder of the embedded one, else its name itself."""
    if name != EMBEDDED:
        return name
    return str(resources.files("massact.models") / "embedded")


def _decoder(module: nn.Module) -> nn.Module | None:
    """The half of a model that is nothing without the other: its decoder, where it has an encoder too."""
    both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return getattr(module, "decoder", None) if both else None


def _takes_only(part: nn.Module, name: str) -> bool:
    """Whether a part of a model can be run on one input: Swin's encoder calls itself a tower, and is none."""
    return _required(part) <= {name}


def _required(part: nn.Module) -> set[str]:
    """Names of the arguments that a module cannot do without."""
    parameters = inspect.signature(part.forward).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _needs_decoder(part: nn.Module) -> bool:
    return bool(getattr(getattr(part, "config", None), "is_encoder_decoder", False))
