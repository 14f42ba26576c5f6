"""Default probes and criteria give findings.

Takes a model and a corpus; gives a `ScanResult`. Knows what counts as massive and by whose rule. Must not
know how tensors are caught, what a family of models looks like, or how results are drawn.
"""

from massact.scans.criteria import CRITERIA, Criterion, Evidence, criterion
from massact.scans.job import PROMPT, ScanConfig, scan

__all__ = ["CRITERIA", "PROMPT", "Criterion", "Evidence", "ScanConfig", "criterion", "scan"]
