"""Zero-shot classification: class names become prompts, prompts become the rows of a head (CLIP, SigLIP).

Shapes: B images, C classes, P prompts, D width of the space that images and texts share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from massact.anatomy.examples import to_device
from massact.models import Model
from massact.records.errors import UserError, first_line
from massact.records.user_files import read_given
from massact.trace import unchanged

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close view of a {}.",
    "an image in which there is a {}.",
)
BATCH = 256  # prompts per forward pass of the text tower
_ROUNDINGS = 64  # of the model's dtype, that two ways to the same cosine may differ by


@dataclass(frozen=True)
class ZeroShot:
    """What a zero-shot head is made of.

    Args:
        classes: names, the number of each is its place; None: those that the images came with.
        templates: prompts with {} where the name goes.
    """

    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"The prompt {template!r} has no single {{}} for the class name.",
                                do="For example: a photo of a {}.")  # fmt: skip
        if not self.templates:
            raise UserError("There is no prompt.", do="For example: a photo of a {}.")

    @classmethod
    def read(cls, classes: Path | None = None, prompts: Path | None = None) -> ZeroShot:
        """From files of class names and of prompts, one a line.

        Raises:
            UserError: a file cannot be read, an empty line between others, or a prompt without {}.
        """
        given = {} if prompts is None else {"templates": _lines(prompts)}
        return cls(None if classes is None else _lines(classes), **given)


def _lines(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in read_given(file).decode("utf-8-sig").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read.", str(error), "Give a text file, one entry a line.") from None
    if not all(lines):
        number = lines.index("") + 1
        raise UserError(f"Line {number} of {str(file)!r} is empty.", "The place of a line is its number.")
    return tuple(lines)


class ZeroShotHead(nn.Module):
    """logits = exp(logit_scale) cos(image, text of the class) + logit_bias, with frozen texts.

    Args:
        text: (C, D) of norm 1, float32.
        scale, bias: of the cosines.
        classes: names by number.
        record: what is told of it in intervene.json.
    """

    def __init__(
        self, text: Tensor, scale: float, bias: float, classes: tuple[str, ...], record: dict[str, Any]
    ) -> None:
        super().__init__()
        self.register_buffer("text", text)
        self.scale, self.bias, self.classes, self.record, self.n_classes = scale, bias, classes, record, len(text)

    def forward(self, model: Model, inputs: dict[str, Tensor]) -> Tensor:
        given = to_device(inputs, model.device, model.dtype)
        image_BD = _normed(model.module.get_image_features(**given))
        return self.scale * image_BD @ self.text.T + self.bias


def spoken(name: str) -> str:
    """A class name as it goes into a prompt: folders have underscores where words have spaces."""
    return name.replace("_", " ").strip()


def zero_shot_head(model: Model, asked: ZeroShot, known: tuple[str, ...] | None) -> ZeroShotHead:
    """A head whose rows are the normalised means over templates of the normalised text features of each class.

    w_c = m_c / |m_c|, m_c = mean over templates of t / |t|; logits = exp(logit_scale) w_c . x / |x| + logit_bias.
    What the model itself gives for two images and the prompts of one template must be the same.

    Args:
        model: with an image and a text tower, and a tokenizer.
        asked: templates, and classes.
        known: class names that the images came with.

    Raises:
        UserError: a model without the two towers or a tokenizer, no class names, two of one name, a prompt longer than
            the context; or the model's own logits are others.
    Source: Radford 2021, Section 3.1.4 (ensembles in embedding space).
    """
    module = model.module
    if not all(hasattr(module, name) for name in ("get_image_features", "get_text_features", "logit_scale")):
        raise UserError(
            f"{model.name or 'The model'} cannot classify without examples: {type(module).__name__} has no image and "
            "text features to compare.",
            do="Use a model such as CLIPModel or SiglipModel, or a model with a classification head.",
        )
    if model.tokenizer is None:
        raise UserError(
            "Class names are text, and the model has no tokenizer.",
            do="Save the tokenizer in the model's folder, or give it: load(..., tokenizer=...).",
        )
    names = asked.classes if asked.classes is not None else known
    if names is None:
        raise UserError("The images have no class names.", "Their labels are numbers, or there are none.",
                        "Give them: --classes FILE, one a line.")  # fmt: skip
    classes = tuple(spoken(name) for name in names)
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None or len(classes) < 2:
        what = f"Two classes are called {twice!r}." if twice is not None else "There is one class."
        raise UserError(what, "Nothing would tell them apart.", "Give every class a name of its own: --classes FILE")
    prompts = [template.replace("{}", name) for template in asked.templates for name in classes]
    with torch.no_grad():
        parts = [_encoded(model, prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        each_PD = torch.cat([_normed(module.get_text_features(**part)) for part in parts])
        text_CD = nn.functional.normalize(each_PD.unflatten(0, (len(asked.templates), -1)).mean(0), dim=-1)
    scale, bias = module.logit_scale.exp().item(), getattr(module, "logit_bias", None)
    bias = 0.0 if bias is None else bias.item()
    record = {
        "kind": "zero-shot", "templates": list(asked.templates), "n_classes": len(classes),
        "classes_sha256": hashlib.sha256(json.dumps(classes).encode()).hexdigest(), "classes": list(classes[:20]),
    }  # fmt: skip
    _prove(model, parts[0], ZeroShotHead(each_PD[: len(parts[0]["input_ids"])], scale, bias, (), {}))
    return ZeroShotHead(text_CD, scale, bias, classes, record)


def _normed(features: Any) -> Tensor:
    """Features of norm 1, float32: a tensor, or what transformers calls the pooled output."""
    vector = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(vector.float(), dim=-1)


def _encoded(model: Model, prompts: list[str]) -> dict[str, Tensor]:
    """Token ids of prompts, padded as the model was trained: SigLIP to its whole context, and it reads the padding."""
    whole = getattr(model.module.config, "model_type", "").startswith("siglip")
    room = model.context
    try:
        tokens = model.tokenizer(
            prompts, padding="max_length" if whole else True, max_length=room if whole else None,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        why = first_line(error, "")
        raise UserError("The model's tokenizer cannot read the prompts.", why, "Give it a padding token.") from None
    used = tokens["attention_mask"].sum(1)
    if room is not None and int(used.max()) > room:
        raise UserError(f"The prompt {prompts[int(used.argmax())]!r} has {int(used.max())} tokens.",
                        f"The text tower reads {room}.", "Shorten the class name or the template.")  # fmt: skip
    names = ("input_ids",) if whole else ("input_ids", "attention_mask")
    return {name: tokens[name].to(model.device) for name in names}


def _prove(model: Model, tokens: dict[str, Tensor], head: ZeroShotHead) -> None:
    """Compare with the model's own logits, for images of noise and the first prompts."""
    name = str(model.image_input)
    images = {name: model.example[name]}
    with torch.no_grad(), unchanged(model.module):
        theirs = getattr(model.module(**images, **tokens), "logits_per_image", None)
        ours = head(model, images)
    most = _ROUNDINGS * torch.finfo(model.dtype).eps * head.scale
    if theirs is None or theirs.shape != ours.shape or float((theirs - ours).abs().max()) > most:
        raise UserError(
            f"{type(model.module).__name__} does not compare images with texts by a scaled cosine.",
            "Its own logits are others than those of the head that was built.",
        )
