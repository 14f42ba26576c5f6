"""The only hooks in the library, and `observing`, which everything else runs under (`measure`: over a corpus).

Takes a model with its anatomy, batches, probes and edits; gives measurements. Knows where tensors pass and
how a forward pass is watched. Must not know criteria, findings, files or what a statistic computes.
"""

from massact.trace.call_inputs import recorded
from massact.trace.conformance import BATCH_FIRST, Checker
from massact.trace.edits import (
    AddedTokens,
    AttentionEdit,
    Edit,
    Fired,
    InputEdit,
    KeyValueEdit,
    Together,
    WeightEdit,
)
from massact.trace.hooks import Taps, tapped
from massact.trace.integrity import unchanged
from massact.trace.measurements import measure
from massact.trace.observation import Measurements, Probe, Seen, edited, observing, plan
from massact.trace.updates import feed
from massact.trace.watch import Watch, follow, tensors_in

__all__ = [
    "BATCH_FIRST",
    "AddedTokens",
    "AttentionEdit",
    "Checker",
    "Edit",
    "Fired",
    "InputEdit",
    "KeyValueEdit",
    "Measurements",
    "Probe",
    "Seen",
    "Taps",
    "Together",
    "Watch",
    "WeightEdit",
    "edited",
    "feed",
    "follow",
    "measure",
    "observing",
    "plan",
    "recorded",
    "tapped",
    "tensors_in",
    "unchanged",
]
