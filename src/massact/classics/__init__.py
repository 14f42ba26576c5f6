"""The outlier works that the paper grew from, each one declared entry that runs on any model.

Takes a model, its text and the scan of it; gives `Classics`. Knows each work's definition, protocol and constants.
Must not know how tensors are caught, nor how results are told or drawn.
"""

from massact.classics.job import CLASSICS, check_which, classics, listed
from massact.classics.works import Classic, Ground, Outcome, Unavailable

__all__ = ["CLASSICS", "Classic", "Ground", "Outcome", "Unavailable", "check_which", "classics", "listed"]
