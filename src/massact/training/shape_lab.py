"""The vision toy lab: tiny vision transformers on drawn shapes, with and without registers, with other attention.

It asks on a small scale what Darcet et al. (2023) and Sun et al. (2024, Section 5) ask of large ones: do patches of
large norm arise, where, who looks at them, and do registers or an explicit bias take their place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from massact.models import Model
from massact.records.disk import write_atomic
from massact.records.errors import UserError
from massact.records.kinds.shapes import ShapeLab, ShapesInfo
from massact.records.runinfo import git_state
from massact.records.tables import frame
from massact.training.lab import KEYS, STORY, Progress, Row, _claim, _one_thread, _side_by_side, _silent
from massact.training.lab_looks import key_scale, opened
from massact.training.monitor import MASSIVE
from massact.training.shape_looks import OUTLIER, Held, effects_of, layer_rows, scored, seen_in
from massact.training.shape_toy import DRAWN_AT_ONCE, ShapeConfig, arms_of, held_out_shapes, shape_model
from massact.training.shapes import CLASSES, draw_shapes
from massact.training.toy import optimiser_of

N_LOOKED = 64  # images of one look during training; the last is at all of them
# How transformers, and so `massact scan`, makes numbers of an image file, as `Shapes.values` does.
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": True,
             "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
             "image_std": [0.5] * 3}  # fmt: skip
N_SAVED = 256  # held-out images that are written as files


@dataclass
class ShapeRun:
    """What one training showed.

    Args:
        config: as it was resolved.
        module: the trained model.
        curve, layers, effects: rows of the tables "shapes", "shapes_layers", "shapes_effects".
        facts: of this arm: attention, registers, key_std (None unless k' was drawn at the scale of real keys),
            uniform_attention.
    """

    config: ShapeConfig
    module: nn.Module
    curve: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)
    effects: list[Row] = field(default_factory=list)
    facts: Row = field(default_factory=dict)


# -------------------------------------------------------------------------------------------- one training
def train_shapes(config: ShapeConfig, progress: Progress = _silent) -> ShapeRun:
    """Train one model on drawn shapes and measure it; one thread, the same every time for a seed.

    Args:
        config: what to train.
        progress: called at every step with (arm, steps done, steps in all, latest measurement).

    Raises:
        UserError: the variant cannot be had, or the loss is not finite.
    Source: Darcet et al. 2023 (registers); Sun et al. 2024, Section 5 and Fig. 13 (registers as biases).
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        held = Held.of(held_out_shapes(config), config.patch)
        done = _built(config, held)
        model, began, arm = opened(done.module), time.perf_counter(), {"arm": config.arm}
        for step, loss in _steps(done.module, config):
            if not torch.isfinite(loss):
                raise UserError(f"The loss of {config.arm} is not finite at step {step:,}.",
                                do="Set a smaller learning_rate.")  # fmt: skip
            if step % config.every == 0 or step == config.steps:
                done.module.eval()
                rows = layer_rows(seen_in(model, held.first(N_LOOKED), config), held.first(N_LOOKED), config)
                done.curve.append(arm | {"step": step} | _summary(model, held, rows)
                                  | {"wall_s": time.perf_counter() - began})  # fmt: skip
                done.module.train()
            progress(config.arm, step, config.steps, done.curve[-1])
        done.module.eval()
        seen = seen_in(model, held, config)
        done.layers = [arm | row for row in layer_rows(seen, held, config)]
        done.effects = [arm | row for row in effects_of(model, held, seen, config)]
    return done


def _built(config: ShapeConfig, held: Held) -> ShapeRun:
    """The model of an arm before training."""
    from massact.training.applied import apply_variant

    module = shape_model(config)
    facts: Row = {"attention": config.attention, "registers": config.registers, "key_std": None,
                  "uniform_attention": config.uniform_attention}  # fmt: skip
    if config.attention != "softmax":
        options = dict(config.options)
        if config.attention in KEYS and "std" not in options:
            options["std"] = facts["key_std"] = round(
                key_scale(module, {"pixel_values": held.first(N_LOOKED).x_NCHW}), 3
            )
        module = apply_variant(module, config.attention, **options)
    return ShapeRun(config, module, facts=facts)


def _steps(module: Any, config: ShapeConfig) -> Iterator[tuple[int, Tensor]]:
    """Train; after every step give its number, from 0 before the first, and the loss of it."""
    random = np.random.default_rng([config.seed, 1])
    optimiser, schedule = optimiser_of(module, config)
    ahead = max(1, DRAWN_AT_ONCE // config.batch)
    module.train()
    yield 0, torch.zeros(())
    for step in range(config.steps):
        if step % ahead == 0:
            drawn = draw_shapes(ahead * config.batch, config.size, config.background, random)
            x_NCHW, labels_N = torch.from_numpy(drawn.values()), torch.from_numpy(drawn.labels_B)
        now = slice(step % ahead * config.batch, (step % ahead + 1) * config.batch)
        loss = nn.functional.cross_entropy(module(pixel_values=x_NCHW[now]).logits, labels_N[now])
        loss.backward()
        module.classifier.weight.grad[:, config.width :] = 0  # the mean of the patches stays out of the head
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        yield step + 1, loss.detach()


def _summary(model: Model, held: Held, rows: list[Row]) -> Row:
    """One measurement during training: losses, and the greatest of all layers."""
    nats_N, hits_N = scored(model.module, held)
    behind = [row for row in rows if row["layer"] >= 1]
    greatest = {name: max(row[name] for row in behind)
                for name in ("top1", "ratio", "massive", "patch_norm_ratio", "outliers")}  # fmt: skip
    return {"nats": float(nats_N.mean()), "accuracy": float(hits_N.mean())} | greatest


# -------------------------------------------------------------------------------------------- several, side by side
def run_shapes(
    variants: Sequence[str] = STORY, *, out: str | Path | None = None, workers: int = 1, progress: Progress = _silent,
    **options: Any,
) -> ShapeLab:  # fmt: skip
    """Train one tiny vision transformer for each arm, on the same images, and put them side by side.

    Args:
        variants: names of attention variants; the first one is trained with registers as well.
        out: directory for shapes.json, the tables, the trained models (model-ARM) and held-out images as PNG in class
            folders.
        workers: processes; more than one need a main module that can be imported (`if __name__ == "__main__":`).
        progress: called with (arm, steps done, steps in all, latest measurement).
        **options: fields of `ShapeConfig`; `registers` of the second training of the first variant, 0 for none.

    Raises:
        UserError: an unknown variant, option or value; `out` holds a lab, or cannot be written.
    """
    configs = arms_of(variants, options)
    place = None if out is None else Path(out)
    if place is not None:
        _claim(place)
    began, info = time.perf_counter(), ShapesInfo(git=git_state())
    info.config = {k: v for k, v in configs[0].as_dict().items() if k not in ("attention", "options", "registers")}
    held = held_out_shapes(configs[0])
    info.corpus = {"n_held_out": len(held.labels_B), "n_looked": N_LOOKED, "classes": len(CLASSES),
                   "background_share": float(held.background(configs[0].patch).mean()), "outlier": OUTLIER,
                   "massive": list(MASSIVE)}  # fmt: skip
    made = _side_by_side(_one, configs, place, workers, progress) if workers > 1 and len(configs) > 1 else [
        _one(config, place, progress) for config in configs]  # fmt: skip
    info.arms = {config.arm: one["facts"] for config, one in zip(configs, made, strict=True)}
    info.notes = [f"{config.arm}: attention cannot be seen in all of its blocks, so that what gets most of it is not "
                  "known." for config, one in zip(configs, made, strict=True) if not one["attention_seen"]]  # fmt: skip
    info.wall_s = round(time.perf_counter() - began, 1)
    lab = ShapeLab(info, *(frame(table, [row for one in made for row in one[table]])
                           for table in ("shapes", "shapes_layers", "shapes_effects")), directory=place)  # fmt: skip
    if place is not None:
        _write_images(configs[0], place)
        lab.save(place)
    return lab


def _one(config: ShapeConfig, place: Path | None, progress: Progress) -> dict[str, Any]:
    """Train one and save its model; what is left can go from process to process."""
    done = train_shapes(config, progress)
    if place is not None:
        folder = place / f"model-{config.arm}"
        done.module.save_pretrained(folder)  # type: ignore[operator]
        write_atomic(folder / "preprocessor_config.json", lambda p: p.write_text(json.dumps(PROCESSOR, indent=2)))
    seen = not np.isnan([row["class_to_class"] for row in done.layers[1:]]).any()
    return {"shapes": done.curve, "shapes_layers": done.layers, "shapes_effects": done.effects, "facts": done.facts,
            "attention_seen": seen}  # fmt: skip


def _write_images(config: ShapeConfig, place: Path) -> None:
    """Held-out images as PNG in class folders, for `massact scan --corpus`."""
    held = held_out_shapes(config)
    for i, (pixels_HWC, label) in enumerate(zip(held.pixels_BHWC[:N_SAVED], held.labels_B, strict=False)):
        folder = place / "held_out" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HWC).save(folder / f"{i:04d}.png")
