"""Registers as biases: their means over images, and what a model does with nothing but these (Sun 2024, 5.2).

Shapes: L layers, R registers, D dims, K images whose values are kept, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.models import Model
from massact.positions import image_stack, read_layout
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats.positions import PositionMoments
from massact.trace import Edit, Probe, Together, measure

CONTROLS = ("mean", "noise", "shuffle", "zero")


@dataclass(frozen=True)
class Registers:
    """What stands at the register positions at the input of every block, over images.

    Args:
        stack: name of the stack.
        positions: R positions.
        mean, std: (L, R, D) float64, over images; entry l is the input of block l + 1 (0-based: of block l, which is
            the key of the published means). std is NaN where it is not known.
        n_images: how many; 0 where that is not known.
        kept: (K,) images whose values are kept.
        values: (K, L, R, D) float32, their values: what a shuffle draws from.
    """

    stack: str
    positions: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    n_images: int
    kept: np.ndarray
    values: np.ndarray

    @classmethod
    def of_means(cls, means_LRD: np.ndarray, positions: Sequence[int], stack: str = "") -> Registers:
        """Registers of which nothing but the means is known, as from a file.

        Raises:
            UserError: the shape does not fit the positions.
        """
        means = np.asarray(means_LRD, np.float64)
        if means.ndim != 3 or means.shape[1] != len(positions):
            raise UserError(f"Means of shape {means.shape} are not (layers, {len(positions)} registers, dims).")
        none = np.zeros((0, *means.shape), np.float32)
        return cls(stack, tuple(positions), means, np.full_like(means, np.nan), 0, np.zeros(0, np.int64), none)


def collect_registers(
    model: Model,
    corpus: Corpus,
    positions: Sequence[int] | None = None,
    *,
    stack: str | None = None,
    keep: int = 64,
    batch_size: int | str = "auto",
) -> Registers:
    """Mean and standard deviation over images of the input of every block at the registers (E21), streamed in float64.

    Args:
        model: an image model.
        corpus: images.
        positions: of the registers; None: as `read_layout` finds them.
        stack: of several, which.
        keep: so many of the first images are kept as they are, for the shuffle.

    Raises:
        UserError: the model has no registers and no positions were given.
    """
    name = image_stack(model, stack).name
    at = read_layout(model, corpus, stack=name).registers if positions is None else tuple(positions)
    if not at:
        raise UserError(
            "The model has no registers.",
            "None of its learned tokens that is called one stands at a position without pixels.",
            "Give the positions that you want treated as such: positions=[...].",
        )
    layers = range(model.anatomy.stack(name).n_layers)
    probes = [Probe("registers", str(_input(name, layer)), partial(PositionMoments, at, keep)) for layer in layers]
    measured = measure(model, corpus, probes, batch_size=batch_size)
    found = [measured.result("registers", _input(name, layer)) for layer in layers]
    return Registers(
        name, at, np.stack([f.mean for f in found]), np.stack([f.std for f in found]), found[0].n, found[0].kept,
        np.stack([f.values for f in found], axis=1),
    )  # fmt: skip


def register_means(
    model: Model, corpus: Corpus, positions: Sequence[int] | None = None, *, stack: str | None = None
) -> np.ndarray:
    """Mean over images of the input of every block at the register positions: (L, R, D) float64.

    See `collect_registers`.
    """
    return collect_registers(model, corpus, positions, stack=stack, keep=0).mean


def _input(stack: str, layer: int) -> Site:
    """The input of block `layer` + 1."""
    return Site(stack, layer, "resid_post")


def fix_registers(registers: Registers, how: str = "mean", *, seed: int = 0) -> Together:
    """Overwrite the registers at the input of every block (E22, Fix-Reg-Mean), or control for doing so.

    mean: h = mean over images. noise: mean + std x standard normal, entry by entry, anew for every image and block.
    shuffle: what one other of the kept images had there, the same image in all blocks. zero: h = 0, which overstates
    what the registers are needed for (Parodi 2026), because no image has zeros there.

    Evaluate it with `interventions.evaluate`: top-1 with labels, else KL and agreement with the unedited model.
    With a corpus other than the one that they were collected on, no value of an image comes back to itself by index;
    an image is never given the kept values of its own index.

    Args:
        registers: what was collected, or `Registers.of_means`.
        how: one of `CONTROLS`.
        seed: of noise and shuffle, together with the index of the image.

    Raises:
        UserError: an unknown `how`, or one that needs more than the means that are known.
    Source: Sun 2024, Table 5; Parodi 2026.
    """
    if how not in CONTROLS:
        raise UserError(f"There is no control {how!r}.", do=f"One of: {', '.join(CONTROLS)}.")
    if how == "noise" and np.isnan(registers.std).any():
        raise UserError("Noise needs the spread over images, which is not known.", do="Use collect_registers.")
    if how == "shuffle" and len(registers.kept) < 2:
        raise UserError("A shuffle needs the values of two images at least.", do="collect_registers(keep=64).")
    values: dict[str, Callable[[int, Batch], np.ndarray]] = {
        "mean": lambda layer, batch: registers.mean[layer][None],
        "zero": lambda layer, batch: np.zeros_like(registers.mean[layer])[None],
        "noise": lambda layer, batch: np.stack([_noisy(registers, layer, s, seed) for s in batch.sequences]),
        "shuffle": lambda layer, batch: np.stack([_other(registers, layer, s, seed) for s in batch.sequences]),
    }
    name = f"registers {how}"
    edits = [_overwritten(name, registers, layer, values[how]) for layer in range(len(registers.mean))]
    return Together(name, tuple(edits))


def _noisy(registers: Registers, layer: int, sequence: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng((seed, sequence, layer))
    return registers.mean[layer] + registers.std[layer] * draw.standard_normal(registers.std[layer].shape)


def _other(registers: Registers, layer: int, sequence: int, seed: int) -> np.ndarray:
    others = np.flatnonzero(registers.kept != sequence)
    return registers.values[np.random.default_rng((seed, sequence)).choice(others), layer]


def _overwritten(name: str, registers: Registers, layer: int, new: Callable[[int, Batch], np.ndarray]) -> Edit:
    at = list(registers.positions)

    def apply(h_BTD: Tensor, batch: Batch) -> Tensor:
        h_BTD = h_BTD.clone()
        h_BTD[:, at] = torch.from_numpy(new(layer, batch)).to(h_BTD)
        return h_BTD

    # The input of the first block holds the same registers for every image: nothing differs there, all is written.
    def writes(h_BTD: Tensor, batch: Batch) -> Tensor:
        return torch.ones_like(h_BTD[:, at], dtype=torch.bool)

    return Edit(name, str(_input(registers.stack, layer)), apply, writes)
