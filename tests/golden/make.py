"""Make small finished runs of every kind: schema_N, explained_N, trained_N, ... Run once for each new version.

python -m tests.golden.make
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import massact as ma
from massact.classics import classics
from massact.corpora import Corpus
from massact.labs.job import run_lab
from massact.prefixes import fold
from massact.quantisation import quantise
from massact.records.kinds.classics import Classics
from massact.records.kinds.explanation import Explanation
from massact.records.kinds.fold import Fold
from massact.records.kinds.intervention import Intervention
from massact.records.kinds.lab import Lab
from massact.records.kinds.quantisation import Quantisation
from massact.records.kinds.reproduction import Reproduction
from massact.records.kinds.scan import ScanResult
from massact.records.kinds.training import Trained
from massact.records.kinds.trajectory import Trajectory
from massact.records.runinfo import SCHEMA_VERSION
from massact.reproductions import reproduce
from massact.scans import checkpoints_in, scan_checkpoints
from massact.training import train
from tests import stepped
from tests.families import build
from tests.planted import Plant, Planted
from tests.training.small import small

EXPLAINED = Path(__file__).parent / f"explained_{Explanation.version()}"
CLASSIC = Path(__file__).parent / f"classics_{Classics.version()}"
INTERVENED = Path(__file__).parent / f"intervened_{Intervention.version()}"
REPRODUCED = Path(__file__).parent / f"reproduced_{Reproduction.version()}"
FOLDED = Path(__file__).parent / f"folded_{Fold.version()}"
QUANTISED = Path(__file__).parent / f"quantised_{Quantisation.version()}"
FOLDER = Path(__file__).parent / f"schema_{SCHEMA_VERSION}"
TRAINED = Path(__file__).parent / f"trained_{Trained.version()}"
STEPPED = Path(__file__).parent / f"stepped_{Trajectory.version()}"
LAB = Path(__file__).parent / f"lab_{Lab.version()}"


def golden_scan() -> ScanResult:
    """A planted model (hand-built, not evidence about real models), the same every time."""
    torch.manual_seed(11)
    module = Planted(4, 10, 12, [Plant(2, 3, 0, 5, 2500.0), Plant(2, 3, 4, 5, -800.0), Plant(3, 3, 7, 1, 90.0)])
    x = 0.02 * torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(5))
    return ma.scan(ma.load(module, inputs={"x": x}), {"x": x})


def golden_text_scan() -> tuple[ma.Model, Corpus, ScanResult]:
    """A tiny random Llama whose embedding of token 0 is made large by hand, its text and the scan."""
    module = build("llama", seed=3)
    ids = torch.randint(1, 99, (3, 40), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    with torch.no_grad():
        module.get_input_embeddings().weight[0, 7] = 900.0
    model, corpus = ma.load(module), ma.corpus(ids)
    return model, corpus, ma.scan(model, corpus, null=False)


def golden_explanation() -> tuple[ScanResult, Explanation]:
    """The explanation of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, ma.explain(model, corpus, result)


def golden_intervention() -> tuple[ScanResult, Intervention]:
    """The quartet of edits of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, ma.intervene(model, corpus, result, repetition=False)  # greedy ties differ between machines


def golden_classics() -> tuple[ScanResult, Classics]:
    """Two entries that say much in few rows, of `golden_text_scan`."""
    model, corpus, result = golden_text_scan()
    return result, classics(model, corpus, result, which=("norm-growth", "streaming"))


def golden_fold() -> tuple[ScanResult, Fold]:
    """The massive token of `golden_text_scan` as a slot, which is massive wherever it is: it stays. No model files."""
    model, corpus, result = golden_text_scan()
    return result, replace(fold(model, corpus, result, prefix=(0,)), write=None)


def golden_quantisation() -> tuple[ScanResult, Quantisation]:
    """Four schemes and a curve of guilty sites of `golden_text_scan`; no file for other libraries."""
    model, corpus, result = golden_text_scan()
    schemes = ("int8-tensor", "int8-tensor+exempt", "kv:int4-token", "W8A8")
    return result, quantise(model, corpus, result, schemes=schemes, guilty="int8-tensor", goal=10.0, export="none")


def golden_reproduction(out: Path) -> Reproduction:
    """Three experiments that need no more than a scan, of `golden_text_scan`, and one that is not run."""
    model, corpus, _ = golden_text_scan()
    return reproduce(model, out=out, corpus=corpus, only=("E4", "E5", "E8", "E25"), scan_options={"null": False})


def golden_training() -> Trained:
    """Twelve steps of a model of two layers."""
    with tempfile.TemporaryDirectory() as place:
        return train(small(), place)


def golden_trajectory() -> Trajectory:
    """Four checkpoints; from the third on there is something massive."""
    with tempfile.TemporaryDirectory() as place:
        heights = {"step1": 0.0, "step10": 50.0, "step100": 101.0, "step1000": 400.0}
        folder = stepped.write_all(Path(place) / "models", heights)
        return scan_checkpoints(checkpoints_in(folder), out=Path(place) / "out", seq_len=16, n_sequences=3)


def golden_lab() -> Lab:
    """Six steps of two variants."""
    tiny = {"steps": 6, "every": 3, "batch": 8, "width": 16, "mlp": 32, "length": 20, "layers": 2, "heads": 2}
    return run_lab(["softmax", "kv-bias"], **tiny)


if __name__ == "__main__":
    if not FOLDER.exists():
        golden_scan().save(FOLDER)
    if not EXPLAINED.exists():
        made = golden_explanation()
        made[1].save(made[0].save(EXPLAINED))
    if not INTERVENED.exists():
        edited = golden_intervention()
        edited[1].save(edited[0].save(INTERVENED))
    if not CLASSIC.exists():
        works = golden_classics()
        works[1].save(works[0].save(CLASSIC))
    if not FOLDED.exists():
        slots = golden_fold()
        slots[1].save(slots[0].save(FOLDED))
    if not QUANTISED.exists():
        low = golden_quantisation()
        low[1].save(low[0].save(QUANTISED))
    if not REPRODUCED.exists():
        golden_reproduction(REPRODUCED)
    for place, make in ((TRAINED, golden_training), (STEPPED, golden_trajectory), (LAB, golden_lab)):
        if not place.exists():
            place.mkdir()
            make().save(place)
