"""Do patches of large norm arise in tiny vision transformers, and do registers or a slot take their place? They do not.

    python recipes/toy_vit.py                                    # seed 0: about two minutes of processor time
    python recipes/toy_vit.py --seeds 3                          # the table of docs/log.md, 2026-11-25
    python recipes/toy_vit.py --attention softmax kv-bias --registers 8 --background plain --steps 2000

The question is that of Darcet et al. (2023) and of Sun et al. (2024, Section 5). The images are drawn here: one
coloured shape on a background that says nothing, whose class is shape and colour (16; chance is 2.77 nats). The model
is a small DINOv2 whose head reads the class token alone, so that patches without any part of the shape are free for
something else. The first --attention is trained with registers as well. Of the held-out images massact measures:

    loss, top1              nats, and share of images whose class is named
    max|h|, ratio, massive  of `massact.scan`: greatest |h|, greatest mean ratio of a layer, number of findings
    patch, reg, class       norm of the largest patch, the largest register and the class token over the median patch,
                            mean over images, greatest of the layers
    outliers                share of patches above 4 x the median norm, greatest of the layers
    p>reg, p>slot, p>top    attention of the patches on all registers, on the slot, and on the patch that gets most;
                            c>...: of the class token; mean over blocks and heads
    top bg                  share of images in which the patch that gets most holds no part of the shape
    ... to zero, to mean    change of the loss (nats, 95 % interval over images) when states after the middle block are
                            set to that; "other": as many patches of the same kind (of registers: of the background)

The most attended of 36 patches is above the mean by its choice alone: compare arms. Intervals are of one training;
seeds differ by more. A dash is what an arm does not have.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

import massact as ma
from massact.models import with_attention
from massact.stats import Keep
from massact.training import apply_variant

# B images, H and W pixels, P patches, T tokens (class token, registers, patches), D width, C positions that are edited.
COLOURS = np.array([(0.85, 0.15, 0.15), (0.15, 0.75, 0.2), (0.2, 0.25, 0.9), (0.9, 0.85, 0.15)])
N_CLASSES = 4 * len(COLOURS)  # of a disc, a square, a triangle or a cross each
SHOWN = {"plain": 0.0, "mixed": 0.5, "textured": 1.0}  # share of the images with waves over their background
AHEAD = 640  # images: one draw for many steps costs less than one for each
OUTLIER = 4.0
DEFAULTS = {"size": 30, "patch": 5, "layers": 4, "heads": 4, "width": 64, "position_scale": 0.3, "rate": 1e-3,
            "weight_decay": 0.05, "steps": 500, "batch": 32, "held_out": 512, "registers": 4}  # fmt: skip
COLUMNS = ("loss", "top1", "max|h|", "ratio", "massive", "patch", "reg", "class", "outliers", "p>reg", "p>slot",
           "p>top", "c>reg", "c>slot", "c>top", "top bg")  # fmt: skip


# -------------------------------------------------------------------------------------------- images
def draw(n: int, c: Any, random: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
    """Pixel values from -1 to 1 (B, 3, H, W), classes (B,), and which patches (B, P) hold no pixel of the shape."""
    labels_B = random.integers(N_CLASSES, size=n)
    radius_B = random.uniform(0.2, 0.3, n) * c.size
    centre_2B11 = random.uniform(radius_B, c.size - radius_B, (2, n))[..., None, None]
    dy, dx = (np.arange(c.size) + 0.5)[:, None] - centre_2B11[0], np.arange(c.size) + 0.5 - centre_2B11[1]
    r, least, most = radius_B[:, None, None], np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    covered_BHW = np.choose((labels_B // len(COLOURS))[:, None, None], (
        dy**2 + dx**2 < r**2, most < 0.85 * r, (dy < 0.8 * r) & (abs(dx) < 0.55 * (dy + r)),
        (least < 0.35 * r) & (most < r)))  # fmt: skip
    shade_BC = COLOURS[labels_B % len(COLOURS)] + random.uniform(-0.08, 0.08, (n, 3))
    grey_BHW = random.uniform(0.25, 0.75, (n, 1, 1))
    angle, phase = random.uniform(0, 2 * np.pi, (2, n, 1, 1))
    length = random.uniform(3, c.size / 2, (n, 1, 1))  # pixels of a wave
    y, x = np.mgrid[: c.size, : c.size]
    waved = random.random((n, 1, 1)) < SHOWN[c.background]
    grey_BHW = grey_BHW + waved * 0.15 * np.sin(2 * np.pi * (np.cos(angle) * y + np.sin(angle) * x) / length + phase)
    x_BHWC = np.where(covered_BHW[..., None], shade_BC[:, None, None], grey_BHW[..., None])
    x_BHWC = x_BHWC + random.normal(0, 0.02, x_BHWC.shape)
    levels_BCHW = (x_BHWC.clip(0, 1) * 255).round().transpose(0, 3, 1, 2)  # as of 8-bit pictures
    tiles = covered_BHW.reshape(n, c.size // c.patch, c.patch, c.size // c.patch, c.patch)
    values_BCHW = torch.from_numpy(levels_BCHW.astype(np.float32) / 127.5 - 1)
    return values_BCHW.contiguous(), torch.from_numpy(labels_B), ~tiles.any((2, 4)).reshape(n, -1)


# -------------------------------------------------------------------------------------------- models
def built(c: Any, registers: int, seed: int) -> nn.Module:
    """The model before training; registers are drawn last, so that all other weights are the same without them."""
    module = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(
        hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads, image_size=c.size,
        patch_size=c.patch, num_register_tokens=registers, num_labels=N_CLASSES))  # fmt: skip
    embeddings, random = module.dinov2_with_registers.embeddings, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.dinov2_with_registers.encoder.layer.parameters():
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=random)
        module.classifier.weight.normal_(0, c.width**-0.5, generator=random)
        module.classifier.weight[:, c.width :] = 0  # the mean of the patches is of no use to the head
        patches = embeddings.patch_embeddings.projection.weight
        patches.normal_(0, patches[0].numel() ** -0.5, generator=random)
        for p in (embeddings.position_embeddings, embeddings.cls_token, embeddings.register_tokens):
            p.normal_(0, c.position_scale, generator=random)
    return module


class KeySquares:
    """Mean square of an entry of the keys."""

    def __init__(self) -> None:
        self.squares: list[float] = []

    def update(self, a: Any, where: Any) -> None:
        self.squares.append(float(a.k_KSE.square().mean()))

    def merge(self, other: KeySquares) -> None:
        self.squares += other.squares

    def result(self) -> float:
        return float(np.mean(self.squares))


def changed(module: nn.Module, attention: str, x_BCHW: Tensor) -> nn.Module:
    """With an attention variant; k' is drawn at the scale of real keys, for else its slot draws no attention."""
    if attention not in ("kv-bias", "k-bias"):
        return apply_variant(module, attention)
    seen = ma.measure(with_attention(ma.load(module)), ma.corpus({"pixel_values": x_BCHW}),
                      [ma.Probe("keys", "*.attention", KeySquares)], batch_size=64)  # fmt: skip
    std = float(np.mean([seen.result("keys", site) ** 0.5 for site in seen.sites("keys")]))
    return apply_variant(module, attention, std=round(std, 3))


def train(module: Any, c: Any, seed: int) -> None:
    """AdamW on images of which none is seen twice."""
    random = np.random.default_rng([seed, 1])
    weights = [p for p in module.parameters() if p.ndim >= 2]
    rest = {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([{"params": weights, "weight_decay": c.weight_decay}, rest], c.rate, (0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 50))
    ahead = max(1, AHEAD // c.batch)
    module.train()
    for step in range(c.steps):
        if step % ahead == 0:
            x_BCHW, labels_B, _ = draw(ahead * c.batch, c, random)
        now = slice(step % ahead * c.batch, (step % ahead + 1) * c.batch)
        cross_entropy(module(pixel_values=x_BCHW[now]).logits, labels_B[now]).backward()
        module.classifier.weight.grad[:, c.width :] = 0
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
    module.eval()


# -------------------------------------------------------------------------------------------- what is measured
class Received:
    """What every token, and the slot (NaN: none), get from the class token and from the patches: (B, 2, T + 1).

    Mean over heads; of the patches, over all of them.
    """

    def __init__(self, first: int) -> None:
        self.first, self.rows = first, {}

    def update(self, a: Any, where: Any) -> None:
        p_TS, slot = a.probs(torch.arange(a.shape[2])).mean(0), a.slot_HT
        slot_T = torch.full((len(p_TS),), torch.nan) if slot is None else slot.mean(0)
        p_TS = torch.cat([p_TS, slot_T[:, None]], 1)
        self.rows[where.sequence] = torch.stack([p_TS[0], p_TS[self.first :].mean(0)])

    def merge(self, other: Received) -> None:
        self.rows |= other.rows

    def result(self) -> np.ndarray:
        return torch.stack([self.rows[i] for i in sorted(self.rows)]).double().numpy()


@torch.no_grad()
def scored(module: nn.Module, x_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats, and whether the class is named: (B,) each."""
    logits_BV = torch.cat([module(pixel_values=x).logits for x in x_BCHW.split(128)])
    return cross_entropy(logits_BV, labels_B, reduction="none").double(), (logits_BV.argmax(1) == labels_B).double()


def looked_into(model: Any, held: Any, c: Any, registers: int, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """The row of an arm, and the effects of its edits."""
    x_BCHW, labels_B, background_BP = held
    corpus, first, every = ma.corpus({"pixel_values": x_BCHW}), 1 + registers, np.arange(len(labels_B))
    scan = ma.scan(model, corpus, null=False)
    behind = scan.layers[scan.layers["layer"] >= 1]
    nats_B, hits_B = scored(model.module, x_BCHW, labels_B)
    row = {"loss": float(nats_B.mean()), "top1": float(hits_B.mean()), "massive": len(scan.findings),
           "max|h|": behind["max"].max(), "ratio": behind["ratio"].max()}  # fmt: skip
    probes = [ma.Probe("h", "*.resid_post", Keep), ma.Probe("got", "*.attention", lambda: Received(first))]
    seen = ma.measure(model, corpus, probes, batch_size=64)
    h = {site.layer: np.stack(seen.result("h", site).values) for site in seen.sites("h") if site.layer}
    sizes = [norms_over_median(np.linalg.norm(h_BTD, axis=-1), registers) for h_BTD in h.values()]
    row |= dict(zip(("patch", "reg", "class", "outliers"), np.max(sizes, axis=0), strict=True))

    got = {site.layer: seen.result("got", site) for site in seen.sites("got")}
    top = {layer: (a[:, 0] + background_BP.shape[1] * a[:, 1])[:, first:-1].argmax(1) for layer, a in got.items()}
    for i, query in enumerate("cp"):
        shares = [(a[:, i, 1:first].sum(1).mean() if registers else np.nan, a[:, i, -1].mean(),
                   a[every, i, first + top[layer]].mean()) for layer, a in got.items()]  # fmt: skip
        row |= dict(zip((f"{query}>reg", f"{query}>slot", f"{query}>top"), np.mean(shares, axis=0), strict=True))
    row["top bg"] = np.mean([background_BP[every, patch_B].mean() for patch_B in top.values()])
    middle, effects = max(1, c.layers // 2), {}
    if middle in h and middle + 1 in top:
        for name, at_BC in targets(background_BP, top[middle + 1], middle, registers, seed).items():
            h_BCD = torch.from_numpy(h[middle][every[:, None], at_BC])
            for to, new_CD in (("zero", torch.zeros_like(h_BCD[0])), ("mean", h_BCD.mean(0))):
                if to == "zero" or not name.startswith("other"):
                    change_B = with_states(model, f"{middle}.resid_post", at_BC, new_CD, x_BCHW, labels_B) - nats_B
                    half = 1.96 * float(change_B.std()) / len(change_B) ** 0.5
                    effects[f"{name} to {to}"] = f"{float(change_B.mean()):+.3f} +- {half:.3f}"
    return row, effects


def norms_over_median(norms_BT: np.ndarray, registers: int) -> tuple[float, ...]:
    """Largest patch, largest register and class token over the median patch; share of outliers."""
    norms_BP = norms_BT[:, 1 + registers :]
    usual_B = np.median(norms_BP, 1)
    register = (norms_BT[:, 1 : 1 + registers].max(1) / usual_B).mean() if registers else np.nan
    outliers = (norms_BP > OUTLIER * np.median(norms_BP)).mean()
    return (norms_BP.max(1) / usual_B).mean(), register, (norms_BT[:, 0] / usual_B).mean(), outliers


def targets(
    background_BP: np.ndarray, top_B: np.ndarray, layer: int, registers: int, seed: int
) -> dict[str, np.ndarray]:
    """Positions (B, C) that are edited, each followed by as many others of the same kind to compare with."""
    order_BP = np.random.default_rng([seed, 3, layer]).random(background_BP.shape)
    every, first, found = np.arange(len(top_B)), 1 + registers, {}
    if registers:
        found["registers"] = np.tile(np.arange(1, first), (len(every), 1))
        found["other patches"] = first + (order_BP + ~background_BP).argsort(1)[:, :registers]
    order_BP = order_BP + (background_BP != background_BP[every, top_B][:, None])
    order_BP[every, top_B] = np.inf
    return found | {"top patch": first + top_B[:, None], "other patch": first + order_BP.argmin(1)[:, None]}


def with_states(model: Any, site: str, at_BC: np.ndarray, new_CD: Tensor, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """Loss (B,) with the states at some positions of each image set to something."""
    parts = []
    for x, labels, at in zip(x_BCHW.split(128), labels_B.split(128), torch.from_numpy(at_BC).split(128), strict=True):
        rows = torch.arange(len(at))[:, None]

        def put(h_BTD: Tensor, batch: Any, place: Any = (rows, at)) -> Tensor:
            return h_BTD.index_put(place, new_CD.to(h_BTD))

        def written(h_BTD: Tensor, batch: Any, place: Any = (rows, at)) -> Tensor:
            return torch.zeros(h_BTD.shape, dtype=torch.bool).index_put(place, torch.tensor(True))

        with ma.edited(model, ma.Edit("put", site, put, writes=written)):
            parts.append(scored(model.module, x, labels)[0])
    return torch.cat(parts)


# -------------------------------------------------------------------------------------------- all arms
def arm_of(c: Any, attention: str, registers: int, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """Train one model and look into it; the same every time for a seed."""
    torch.manual_seed(seed)
    held = draw(c.held_out, c, np.random.default_rng([seed, 2]))
    module = built(c, registers, seed)
    if attention != "softmax":
        module = changed(module, attention, held[0][:64])
    train(module, c, seed)
    return looked_into(with_attention(ma.load(module)), held, c, registers, seed)


def main(arguments: list[str] | None = None) -> None:
    """Print a line for every arm of every seed, and below it what the edits change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", default=["softmax", "kv-bias", "softmax-off-by-one"])
    parser.add_argument("--background", choices=SHOWN, default="mixed")
    parser.add_argument("--seeds", type=int, default=1)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    c = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one thread sums in one order, and operations this small only wait for others
    arms = [(name, 0) for name in c.attention] + ([(c.attention[0], c.registers)] if c.registers else [])
    print(f"{'arm':20}seed" + "".join(f"{name:>9}" for name in COLUMNS))
    for seed in range(c.seeds):
        for attention, registers in arms:
            row, effects = arm_of(c, attention, registers, seed)
            cells = ["-" if np.isnan(row[name]) else f"{row[name]:.4g}" for name in COLUMNS]
            print(f"{attention + '+registers' * bool(registers):20}{seed:4}" + "".join(f"{x:>9}" for x in cells))
            print("".join(f"    {name} {change}" for name, change in effects.items()), flush=True)


if __name__ == "__main__":
    main()
