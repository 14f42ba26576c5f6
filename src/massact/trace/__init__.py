"""The only hooks in the library, and `measure`, which everything else calls.

Takes a model with its anatomy, batches, probes and edits; gives measurements. Knows where tensors pass and
how a forward pass is watched. Must not know criteria, findings, files or what a statistic computes.
"""

from massact.trace.as_found import unchanged
from massact.trace.as_proved import BATCH_FIRST, Checker
from massact.trace.edits import AddedTokens, AttentionEdit, Edit, Fired, InputEdit, Together, WeightEdit, edited
from massact.trace.hooks import Taps, tapped
from massact.trace.measurements import Measurements, Probe, feed, measure, plan
from massact.trace.watch import Watch, follow, tensors_in

__all__ = [
    "BATCH_FIRST",
    "AddedTokens",
    "AttentionEdit",
    "Checker",
    "Edit",
    "Fired",
    "InputEdit",
    "Measurements",
    "Probe",
    "Taps",
    "Together",
    "Watch",
    "WeightEdit",
    "edited",
    "feed",
    "follow",
    "measure",
    "plan",
    "tapped",
    "tensors_in",
    "unchanged",
]
