"""Accumulators: what is measured of a tensor, streamed and merged.

Takes the (T, D) values of one sequence at one site at a time, and where they come from.
Gives named NumPy results per sequence, per token and per dim, whatever the split and the order of merges.
Knows arithmetic: order statistics exactly, moments without cancellation, NaN and Inf counted and left out.
Must not know models, sites, layers, criteria, or files.
"""

from massact.stats.dims import DimMoments, DimResult
from massact.stats.dynamics import Dynamics, fit_dynamics
from massact.stats.hidden_states import HiddenResult, HiddenStats
from massact.stats.primitives import Keep, KeepResult, Ranks, RanksResult, TokenMax, TokenMaxResult
from massact.stats.protocol import Columned, PerSequence, Resumable, Statistic, Where

__all__ = [
    "Columned",
    "DimMoments",
    "DimResult",
    "Dynamics",
    "HiddenResult",
    "HiddenStats",
    "Keep",
    "KeepResult",
    "PerSequence",
    "Ranks",
    "RanksResult",
    "Resumable",
    "Statistic",
    "TokenMax",
    "TokenMaxResult",
    "Where",
    "fit_dynamics",
]
