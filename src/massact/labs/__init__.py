"""The toy lab: small models trained side by side, in which a sink grows within minutes, and what is seen in them.

Takes attention variants and a preset; gives a `Lab`. Knows the task (bigram-backcopy), its losses and its oracles. Must
not know criteria, other verbs, or how results are drawn.
"""

from massact.labs.job import run_lab, train_toy
from massact.labs.toy import LabConfig

__all__ = ["LabConfig", "run_lab", "train_toy"]
