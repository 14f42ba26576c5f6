"""Number formats: how a tensor is rounded, and which of its entries share a scale.

Fake quantisation: Q(x) = dequantise(quantise(x)), in float32. All rounding is compressed-tensors' (integers, FP8) and
torchao's (MXFP4, NVFP4); what is said here is which blocks of a tensor have one scale.

Shapes: N tokens, F features, O outputs of a weight, K key-value heads, E width of a head.
"""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from massact.records.errors import UserError, near

INSTALL = "pip install 'massact[quant]'"
FP8_MOST = 448.0  # e4m3
MX_BLOCK, NV_BLOCK = 32, 16
MICROSCALED = frozenset({"mxfp4", "nvfp4"})
SHARINGS = ("tensor", "token", "channel", "group", "head")


@dataclass(frozen=True)
class Format:
    """A number format, and which entries share a scale.

    Integers are symmetric: scale = amax / (2^(bits - 1) - 1/2), one more negative number than positive, so that the
    greatest value may saturate. FP8 is e4m3: amax / 448. MXFP4: blocks of 32 with a power of two. NVFP4: blocks of 16
    with an e4m3 scale, over one float32 scale of the tensor.

    Args:
        kind: int, fp8, mxfp4 or nvfp4.
        bits: of integers.
        sharing: tensor, token, channel, group, head; block of the microscaled kinds; none: FP8 without a scale.
        group: entries of a group.
        static: the scale is of other text, measured before; else of what is quantised.
    """

    kind: str
    bits: int = 8
    sharing: str = "tensor"
    group: int = 0
    static: bool = False

    @property
    def name(self) -> str:
        """int8, fp8-e4m3, mxfp4, nvfp4."""
        return f"int{self.bits}" if self.kind == "int" else "fp8-e4m3" if self.kind == "fp8" else self.kind

    def spelled(self, row: str = "token") -> str:
        """As the name of a scheme has it: int8-token, int4-group64, nvfp4-static; with the word for what is one row."""
        kind = f"int{self.bits}" if self.kind == "int" else self.kind
        sharing = {"block": "", "group": f"-group{self.group}", "token": f"-{row}"}.get(
            self.sharing, f"-{self.sharing}"
        )
        return kind + sharing + "-static" * self.static

    def shared(self, row: str) -> str:
        """' by tensor, static', with the word for what is one row."""
        named = {"block": "", "none": " without a scale", "group": f" by groups of {self.group}", "token": f" by {row}"}
        return named.get(self.sharing, f" by {self.sharing}") + ", static" * self.static

    @property
    def block(self) -> int:
        """Entries along the last axis that must divide it; 1: any width will do."""
        return {"mxfp4": MX_BLOCK, "nvfp4": NV_BLOCK}.get(self.kind, self.group if self.sharing == "group" else 1)

    @property
    def steps(self) -> float:
        """Scale = amax / this, of integers and FP8; NaN of the microscaled kinds."""
        return {"int": 2 ** (self.bits - 1) - 0.5, "fp8": FP8_MOST}.get(self.kind, float("nan"))

    @property
    def smallest(self) -> float:
        """An entry below this many scales is rounded to 0: half of a step, in FP8 half of the least subnormal."""
        return {"int": 0.5, "fp8": 2.0**-10}.get(self.kind, float("nan"))

    def check(self, width: int, where: str) -> None:
        """Refuse a width that its blocks do not divide.

        Raises:
            UserError: says which widths would do.
        """
        if width % self.block:
            fits = [g for g in (16, 32, 48, 64, 96, 128) if width % g == 0]
            raise UserError(
                f"Groups of {self.block} do not divide the {width} entries of {where}.",
                "Every group needs its scale, and a last one of another size is no format that a kernel has.",
                f"Of the usual sizes {', '.join(map(str, fits)) or 'none'} would.",
            )


def blocks_of(sharing: str, shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """How many entries along each axis share a scale.

    Tokens of activations (N, F) and of keys or values (K, N, E) are the axis before the last; a channel is one place of
    the last axis (of keys, of each head), a token one place of the other axes.
    """
    *heads, n, width = shape
    ones = (1,) * len(heads)
    return {
        "tensor": shape,
        "head": (*ones, n, width),
        "token": (*ones, 1, width),
        "channel": (*ones, n, 1),
        "group": (*ones, 1, group),
    }[sharing]


def fake_quantised(x: Tensor, form: Format, amax: Tensor | None = None) -> Tensor:
    """Q(x), in the dtype of x.

    Args:
        x: (N, F), (O, F) with a row for each output, or (K, N, E).
        form: of which weights have sharing "token" for what is called a channel of them: a row.
        amax: greatest |x| of the static scale, one number (or (F,) by channel, (K,) by head); None: of x.
    """
    if not x.numel() or not bool(x.any()):
        return x.clone()
    wide = x.detach().float()
    if form.kind in ("int", "fp8"):
        y = _rounded(wide, form, amax)
    elif form.kind == "mxfp4":
        y = _mxfp4(wide)
    else:
        y = _nvfp4(wide, wide.abs().amax() if amax is None else amax.float())
    return y.to(x.dtype)


def scale_of(form: Format, amax: Tensor) -> Tensor:
    """The scale of each greatest |x|; NaN of the microscaled kinds."""
    if form.kind not in ("int", "fp8"):
        return torch.full_like(amax, torch.nan)
    if form.sharing == "none":
        return torch.ones_like(amax)
    made: Tensor = quant_module("compressed_tensors.quantization.utils").calculate_qparams(
        -amax, amax, _arguments(form)
    )[0]
    return made


def _rounded(x: Tensor, form: Format, amax: Tensor | None) -> Tensor:
    """By compressed-tensors, with every block of the tensor as an axis of its own."""
    block = blocks_of("tensor" if form.sharing == "none" else form.sharing, tuple(x.shape), form.group)
    split = x.reshape([m for n, b in zip(x.shape, block, strict=True) for m in (n // b, b)])
    within = tuple(range(1, split.ndim, 2))
    greatest = split.abs().amax(within, keepdim=True) if amax is None else (
        amax.float().reshape([m for n, b in zip(x.shape, block, strict=True) for m in (n // b, 1)]))  # fmt: skip
    scale = scale_of(form, greatest)
    library = quant_module("compressed_tensors.quantization.lifecycle.forward")
    made: Tensor = library.fake_quantize(split, scale, torch.zeros_like(scale), _arguments(form))
    return made.reshape(x.shape)


@cache
def _arguments(form: Format) -> Any:
    """As compressed-tensors names it; the strategy says how a scale lies, which is given with its axes here."""
    kind = "int" if form.kind == "int" else "float"
    made = quant_module("compressed_tensors.quantization").QuantizationArgs
    return made(num_bits=form.bits, type=kind, symmetric=True, strategy="channel")


def _mxfp4(x: Tensor) -> Tensor:
    made: Tensor = quant_module("torchao.prototype.mx_formats.mx_tensor").MXTensor.to_mx(
        x.contiguous(), torch.float4_e2m1fn_x2, MX_BLOCK
    ).dequantize(torch.float32)  # fmt: skip
    return made


def _nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    torchao = quant_module("torchao.prototype.mx_formats.nvfp4_tensor")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    made: Tensor = torchao.NVFP4Tensor.to_nvfp4(
        flat, NV_BLOCK, per_tensor_scale=torchao.per_tensor_amax_to_scale(amax.reshape(()))
    ).dequantize(torch.float32)  # fmt: skip
    return made.reshape(x.shape)


def preset(name: str) -> Any:
    """Weights and activations of a preset of compressed-tensors, such as W8A8.

    Raises:
        UserError: no such preset.
    """
    schemes = quant_module("compressed_tensors.quantization")
    known = quant_module("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    if name.upper() not in known:
        raise UserError(f"{name!r} is no preset.", do=near(name.upper(), known))
    return schemes.preset_name_to_scheme(name.upper(), ["Linear"])


def of_arguments(args: Any, of_weights: bool) -> Format:
    """The format of a preset's `QuantizationArgs`.

    Raises:
        UserError: a format that is none of ours (asymmetric integers, blocks).
    """
    strategy, bits = str(getattr(args.strategy, "value", args.strategy)), int(args.num_bits)
    kind = str(getattr(args.type, "value", args.type))
    dynamic = args.dynamic is True or str(getattr(args.dynamic, "value", args.dynamic)) == "local"
    if kind == "float" and bits == 8 and str(getattr(args, "scale_dtype", None)) == "torch.uint8":
        raise UserError("Presets in MXFP8 are not measured.", "Their scales are powers of two, those of fp8 are not.",
                        "Choose one of symmetric integers, FP8, MXFP4 or NVFP4.")  # fmt: skip
    if kind == "float" and bits == 4:
        made = Format("nvfp4" if strategy == "tensor_group" else "mxfp4", 4, "block")
        return replace(made, static=made.kind == "nvfp4" and not of_weights)
    known = {"tensor": "tensor", "token": "token", "channel": "token", "group": "group", "attn_head": "head"}
    if (
        strategy not in known
        or not args.symmetric
        or (kind, bits) not in {("int", b) for b in range(2, 9)} | {("float", 8)}
    ):
        raise UserError(f"Presets with {kind}{bits} by {strategy}{'' if args.symmetric else ', asymmetric,'} are not "
                        f"measured.",
                        do="Choose one of symmetric integers, FP8, MXFP4 or NVFP4.")  # fmt: skip
    static = not dynamic and not of_weights
    return Format("int" if kind == "int" else "fp8", bits, known[strategy], args.group_size or 0, static)


@cache
def quant_module(name: str) -> Any:
    """A module of the extra `quant`; what it prints while it is read is about kernels that are not run here.

    Raises:
        UserError: it is not installed.
    """
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise UserError(f"Quantisation needs {package}.", str(error), f"Install it: {INSTALL}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
