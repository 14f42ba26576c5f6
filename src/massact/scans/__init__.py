"""Default probes and criteria give findings.

Takes a model and a corpus; gives a `ScanResult`. Knows what counts as massive and by whose rule. Must not
know how tensors are caught, what a position is (it asks), what a family of models looks like, or how results are drawn.
"""

from massact.scans.checkpoint_names import Checkpoint, checkpoints_in, revisions_of, step_of
from massact.scans.criteria import CRITERIA, Criterion, Evidence, criterion
from massact.scans.earlier_scan import (
    Reopened,
    check_text,
    check_weights,
    reopen,
    scan_first,
    scanned_corpus,
    scanned_inputs,
)
from massact.scans.image_maps import (
    PatchMaps,
    marked,
    massive_patches,
    neighbour_cosines,
    norm_histograms,
    outlier_patches,
    patch_maps,
)
from massact.scans.job import scan
from massact.scans.length_proof import AtLength, prove_at_length, proved_at
from massact.scans.prompt import prompt_corpus
from massact.scans.revisions import scan_checkpoints, told

__all__ = [
    "CRITERIA",
    "AtLength",
    "Checkpoint",
    "Criterion",
    "Evidence",
    "PatchMaps",
    "Reopened",
    "check_text",
    "check_weights",
    "checkpoints_in",
    "criterion",
    "marked",
    "massive_patches",
    "neighbour_cosines",
    "norm_histograms",
    "outlier_patches",
    "patch_maps",
    "prompt_corpus",
    "prove_at_length",
    "proved_at",
    "reopen",
    "revisions_of",
    "scan",
    "scan_checkpoints",
    "scan_first",
    "scanned_corpus",
    "scanned_inputs",
    "step_of",
    "told",
]
