"""Load a model, and hand it out only when it is proved.

Takes a Hub id, a folder or a live module; gives a `Model` whose every site is proved. Knows how
transformers are built. Must not know statistics, criteria or files of text.
"""

from massact.models.attention_proof import projection_of, with_attention, with_attention_for
from massact.models.linear_maps import matrix_of
from massact.models.loading import EMBEDDED, Model, load
from massact.models.offloading import held
from massact.models.random_twins import random_twin
from massact.models.speech import first_ids
from massact.models.weight_values import check_finite, unpacked, weights_hash

__all__ = [
    "EMBEDDED",
    "Model",
    "check_finite",
    "first_ids",
    "held",
    "load",
    "matrix_of",
    "projection_of",
    "random_twin",
    "unpacked",
    "weights_hash",
    "with_attention",
    "with_attention_for",
]
