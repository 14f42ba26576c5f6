"""Attention variants and other changes of an architecture, one small function each, and how a model gets them.

Takes a live transformers model and the name of a change; gives the same model, changed, its configuration saying so,
and makes the changes again that a checkpoint tells of. Knows every change by its formula and its paper. Must not know
how a model is read or trained.
"""
