"""Folding: a token in front takes the massive activation over, and its keys and values become slots of every block.

Takes a causal language model, the scan of it and its text; gives a `Fold`: the model with slots, the proof that it is
the model with the prefix in front, the search that chose the prefix, and what it changes. Knows which tokens take a
massive activation over, how their keys and values are caught and where positions stand. Must not know files of results,
figures, or what a family of models looks like.
"""

from massact.prefixes.construction import Folded, build
from massact.prefixes.equality import prove_equal
from massact.prefixes.job import fold, folded_of
from massact.prefixes.prefix_files import save_folded
from massact.prefixes.pruning import super_weights_of
from massact.prefixes.refusals import check_foldable
from massact.prefixes.search import Search, search_prefix

__all__ = [
    "Folded",
    "Search",
    "build",
    "check_foldable",
    "fold",
    "folded_of",
    "prove_equal",
    "save_folded",
    "search_prefix",
    "super_weights_of",
]
