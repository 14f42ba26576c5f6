"""Heads for models without one: a linear head from a file, on [CLS] or on [CLS] and the mean of the patches.

Shapes: B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.examples import to_device
from massact.corpora import Corpus
from massact.corpora.packing import Request
from massact.corpora.tensors import from_tensors
from massact.interventions.zero_shot import ZeroShot, zero_shot_head
from massact.models import Model
from massact.positions import place_names
from massact.records.anatomy import Place
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.records.user_files import refuse_special
from massact.stats import Keep
from massact.trace import Probe, measure

_READS = {1: "[CLS]", 2: "[CLS], mean of the patches"}
_WANTED = "Give a file with weight (classes, width) or (classes, 2 width), and bias (classes) if there is one."


def head_of(model: Model, corpus: Corpus, asked: ZeroShot | str | Path, classes: tuple[str, ...] | None) -> nn.Module:
    """The head that was asked for: called with a model and inputs, it gives logits (B, C).

    Args:
        corpus: images, of the size that matters.
        asked: class names and templates, or the file of a linear head.
        classes: class names that the images came with.

    Raises:
        UserError: it does not fit the model; see `zero_shot_head` and `linear_head`.
    """
    if isinstance(asked, ZeroShot):
        return zero_shot_head(model, asked, classes)
    return linear_head(model, corpus, Path(asked))


class LinearHead(nn.Module):
    """logits = W x + b, with x = [CLS] or [CLS; mean of the patches], after the final norm.

    Args:
        weight: (C, D) or (C, 2 D).
        bias: (C,).
        last: where the last block gives its hidden state.
        cls: position of [CLS]. patches: positions of the patches.
        record: what is told of it in intervene.json.
    """

    classes = None  # its classes have numbers, no names

    def __init__(
        self, weight: Tensor, bias: Tensor, last: Place, cls: int, patches: list[int], record: dict[str, Any]
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.last, self.cls, self.patches, self.record, self.n_classes = last, cls, patches, record, len(weight)

    def forward(self, model: Model, inputs: dict[str, Tensor]) -> Tensor:
        hidden_BTD = last_hidden(model, inputs, self.last)
        read = hidden_BTD[:, self.cls]
        if self.weight.shape[1] > read.shape[1]:
            read = torch.cat([read, hidden_BTD[:, self.patches].mean(1)], -1)
        return nn.functional.linear(read.float(), self.weight, self.bias)


def last_hidden(model: Model, inputs: dict[str, Tensor], last: Place) -> Tensor:
    """What the part of a model that holds its last block gives, (B, T, D): behind the last norm, as a rule.

    Raises:
        UserError: it gives no such thing.
    """
    features = getattr(model.module, "forward_features", None)  # timm
    if features is not None:
        out = features(*to_device(inputs, model.device, model.dtype).values())
    else:
        out = getattr(model.run(inputs, places=[last]), "last_hidden_state", None)
    if not isinstance(out, Tensor) or out.ndim != 3:
        raise UserError(f"{type(model.module).__name__} gives no last hidden states that a linear head could read.")
    return out


def linear_head(model: Model, corpus: Corpus, file: Path) -> LinearHead:
    """A linear head of a file; its width says what it reads: [CLS], or [CLS; mean of the patches] (Oquab 2023).

    Args:
        model: a model of images with a [CLS] token. corpus: images.
        file: safetensors, or a PyTorch file (read with weights_only=True), with one matrix and at most one vector.

    Raises:
        UserError: the file cannot be read or holds something else, another width, or where [CLS] and the patches are
            cannot be told; hidden states that went through no norm behind the last block; masked patches.
    Source: Oquab 2023, DINOv2, Section 7.1 (linear evaluation); dinov2_*_linear_head files have this form.
    """
    weight, bias = _read(file)
    if getattr(getattr(model.module, "config", None), "mask_ratio", 0):
        raise UserError(
            f"{type(model.module).__name__} sees only some of the patches, drawn at random.",
            "A linear head was trained on whole images.",
            'Set "mask_ratio": 0 in its config.json, and scan again.',
        )
    stack = next((s for s in model.anatomy.stacks if model.reaches(s, set(corpus.inputs))), None)
    names = None if stack is None else place_names(model, corpus, stack.name)
    if stack is None or names is None or "[CLS]" not in names:
        raise UserError(
            f"{model.name or 'The model'} has no [CLS] token that a linear head could read.",
            "Its positions were named by experiment: " + ("none could be." if not names else f"{names[0]}, ..."),
        )
    width = stack.d_model
    if weight.shape[1] not in (width, 2 * width):
        raise UserError(
            f"The head of {file.name!r} reads {weight.shape[1]} numbers, and the model is {width} wide.",
            f"{width} would be [CLS], {2 * width} would be [CLS] and the mean of the patches.",
            "Give a head that was trained on this model.",
        )
    patches = [t for t, name in enumerate(names) if name.startswith("patch (")]
    last = stack.blocks[-1].places["resid_post"]
    _after_a_norm(model, corpus, (Site(stack.name, stack.n_layers, "resid_post"), last), len(names))
    record = {
        "kind": "linear", "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "reads": _READS[weight.shape[1] // width], "n_classes": len(weight),
    }  # fmt: skip
    return LinearHead(weight, bias, last, names.index("[CLS]"), patches, record).to(model.device)


def _after_a_norm(model: Model, corpus: Corpus, at: tuple[Site, Place], n_tokens: int) -> None:
    """Heads read what a norm gave: where the model gives the residual stream itself, the numbers would be others."""
    site, last = at
    one = {name: x[:1] for name, x in corpus.inputs.items()}
    with torch.inference_mode():
        hidden_BTD = last_hidden(model, one, last)
    measured = measure(model, from_tensors(one, None, Request()), [Probe("last", str(site), Keep)])
    stream_TD = torch.as_tensor(measured.result("last", site).values[0])
    if hidden_BTD.shape[1] != n_tokens or torch.equal(hidden_BTD[0].float().cpu(), stream_TD.float()):
        raise UserError(
            f"{type(model.module).__name__} gives its last hidden states without a final norm.",
            "A linear head reads what is behind it.",
        )


def _read(file: Path) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,), float32; the bias is 0 where there is none."""
    refuse_special(file)
    if not file.is_file():
        raise UserError(f"There is no file {str(file)!r}.", do=_WANTED)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged or foreign file makes of the reader
        why = "It holds more than tensors, or it is damaged."
        raise UserError(f"The head {str(file)!r} cannot be read.", why, _WANTED) from None
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    matrices = [x for x in tensors.values() if x.ndim == 2 and x.is_floating_point()]
    vectors = [x for x in tensors.values() if x.ndim == 1 and x.is_floating_point()]
    fits = len(matrices) == 1 and len(vectors) <= 1 and len(tensors) == len(matrices) + len(vectors)
    if not fits or any(len(x) != len(matrices[0]) for x in vectors):
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in list(tensors.items())[:4]) or "no tensors"
        raise UserError(f"{str(file)!r} is no linear head: it holds {shapes}.", do=_WANTED)
    weight = matrices[0].float()
    bias = vectors[0].float() if vectors else torch.zeros(len(weight))
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise UserError(f"The head {str(file)!r} holds values that are NaN or Inf.", do=_WANTED)
    return weight, bias
