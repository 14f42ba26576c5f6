"""What massive activations cost in low precision: schemes, the loss of each, whose error it is, and what to run.

Takes a model, a corpus and the scan of it; gives a `Quantisation`. Knows number formats, which entries share a scale,
what is left out of it, and how a scheme is written for other libraries. Must not know how numbers are rounded (torchao
does), how tensors are caught, nor how results are drawn.
"""

from massact.quantisation.job import quantise
from massact.quantisation.schemes import Scheme, scheme

__all__ = ["Scheme", "quantise", "scheme"]
