"""Train transformers into and out of massive activations: attention variants, Trainer glue, a monitor, a toy lab.

Takes a model or a configuration, text and options; gives a trained model and its run directory. Knows every remedy by
its formula and its paper, and how a training is resumed exactly. Must not know criteria, findings, explanations or how
results are drawn.
"""
