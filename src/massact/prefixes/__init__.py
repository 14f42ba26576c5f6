"""Folding: a token in front takes the massive activation over, and its keys and values become slots of every block.

Takes a causal language model, the scan of it and its text; gives a `Fold`: the model with slots, the proof that it is
the model with the prefix in front, the search that chose the prefix, and what it changes. Knows which tokens take a
massive activation over, how their keys and values are caught and where positions stand. Must not know files of results,
figures, or what a family of models looks like.
"""
