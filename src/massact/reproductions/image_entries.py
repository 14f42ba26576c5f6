"""E19 and E21 to E23: vision transformers, and registers as biases (Sun 2024, Section 5 and App. C)."""

from __future__ import annotations

from functools import partial

import numpy as np

from massact.reproductions.attention_claims import ON_REGISTERS
from massact.reproductions.effect_claims import FIXED
from massact.reproductions.effect_entries import ACCURACY
from massact.reproductions.entries import Entry, Finished, Nothing, Row, answers, at, plain, row
from massact.reproductions.place_claims import OF_IMAGES
from massact.reproductions.place_entries import curves
from massact.reproductions.variation_claims import ON_ONE_REGISTER

HOWS = {"mean": "Fix-Reg-Mean", "noise": "mean and noise", "shuffle": "those of another image", "zero": "zero"}


def magnitudes_of_images(f: Finished) -> list[Row]:
    """E19: whether, where and at which layers; the curve of every layer."""
    rows = []
    for s in answers(f.scan):
        here = at(f.scan.findings, stack=s.stack, site=s.site)
        line = partial(row, stack=s.stack)
        rows.append(line("massive activations", s.n_findings, unit="count", headline=True))
        if s.n_findings:
            peak = at(here, layer=s.shown_layer)
            n = max(int(f.scan.info.corpus.get("n_sequences") or 0), 1)
            rows += [
                line("first layer", s.onset or 0, unit="layer", headline=True),
                line("last layer", s.offset or 0, unit="layer", headline=True),
                line("dims", text=plain(here["dim"]), headline=True),
                line(
                    "images with any", peak["sequence"].nunique() / n, unit="share", layer=s.shown_layer, headline=True
                ),
                line("different tokens", peak["pos"].nunique(), unit="count", layer=s.shown_layer, headline=True),
            ]
        elif s.largest is not None:
            rows.append(
                line("largest ratio", s.largest.ratio, layer=s.largest.layer, unit="|h| / median", headline=True)
            )
    return rows + curves(f)


def register_means(f: Finished) -> list[Row]:
    """E21: largest mean of every block's input at the registers, and the published places."""
    mean_LRD = f.means["mean"]
    rows = []
    for key, mean_RD in enumerate(np.abs(mean_LRD)):
        register, dim = np.unravel_index(int(mean_RD.argmax()), mean_RD.shape)
        rows.append(row("largest mean of a register", mean_LRD[key, register, dim], layer=key, unit="h",
                        text=f"reg{register + 1}, dim {dim}", headline=key in (1, len(mean_LRD) - 1)))  # fmt: skip
    if mean_LRD.shape[1:] == (4, 1536):  # DINOv2-reg ViT-G, where a second dim is published
        rows += [
            row("mean at reg3, dim 999", mean_LRD[key, 2, 999], layer=key, unit="h") for key in range(len(mean_LRD))
        ]
    return rows


def fixed_registers(f: Finished) -> list[Row]:
    """E22: what overwriting the registers before every block does, by their means and by the controls."""
    if f.registers is None:
        raise Nothing("Registers were not overwritten.")
    effects = at(f.registers.effects, group="all")
    metric = "accuracy" if (effects["metric"] == "accuracy").any() else "top1_agreement"
    mine, rows = at(effects, metric=metric), []
    unit = "% top-1" if metric == "accuracy" else "% same first guess"
    why = "" if metric == "accuracy" else "there are no labels: agreement with the model as it is"
    rows.append(row("original", 100 * mine["baseline"].iloc[0], unit=unit, headline=True, reason=why))
    for r in mine.itertuples():
        how = str(r.edit).removeprefix("registers ")
        rows.append(row(HOWS.get(how, how), 100 * r.edited, unit=unit, headline=True))
    rows += [row(f"KL, {HOWS.get(h, h)}", x, unit="nats")
             for h, x in zip(at(effects, metric="kl")["edit"].str.removeprefix("registers "),
                             at(effects, metric="kl")["edited"], strict=True)]  # fmt: skip
    return rows


def register_attention(f: Finished) -> list[Row]:
    """E23: what class token and patches attend to, by layer."""
    if f.shares is None or not len(f.shares):
        raise Nothing("The explanation holds no attention between tokens of an image.")
    if not (f.shares["key"] == "registers").any():
        raise Nothing("The attention on registers was not seen.")
    last = int(f.shares["layer"].max())
    return [
        row(f"attention of {r.query} on {r.key}", r.mass, stack=str(r.stack), layer=r.layer, unit="share",
            headline=r.layer == last and r.query in ("class", "patches") and r.key == "registers")
        for r in f.shares.itertuples() if r.query in ("class", "patches")
    ]  # fmt: skip


IMAGES = (
    Entry("E19", "5.1, Figs. 11 and 12, App. C", "Vision transformers", "image", ("scan",),
          "E1, E3 and E4 on the tokens of images.",
          "In many but not all: fixed dims, tokens that vary with the image, in the later layers only.",
          magnitudes_of_images, OF_IMAGES, ("figures/layers.png", "figures/magnitudes.png", "figures/census.png")),
    ACCURACY,
    Entry("E21", "5.2", "Register means", "image", ("scan", "registers"),
          "Mean over images of the input of every block at the registers.",
          "The massive activations sit on one fixed register.", register_means, ON_ONE_REGISTER),
    Entry("E22", "5.2, Table 5", "Fix-Reg-Mean", "image", ("scan", "registers", "fixed"),
          "Registers overwritten by their means at the input of every block; top-1, or agreement without labels.",
          "Accuracy does not change: registers are biases.", fixed_registers, FIXED),
    Entry("E23", "5.2, Fig. 13, App. C.3", "Attention on registers", "image", ("scan", "explain", "registers"),
          "Probability of class token and patches on registers, mean over heads and images, by layer.",
          "Class token and patches attend to the register with massive activations.", register_attention,
          ON_REGISTERS),
)  # fmt: skip
