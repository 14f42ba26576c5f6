"""Load a model, and hand it out only when it is proved.

Takes a Hub id, a folder or a live module; gives a `Model` whose every site is proved. Knows how
transformers are built. Must not know statistics, criteria or corpora.
"""

from massact.models.attention_proof import projection_of, with_attention
from massact.models.loading import EMBEDDED, Model, check_finite, load, random_twin, weights_hash
from massact.models.speech import decoder_context, first_ids

__all__ = [
    "EMBEDDED",
    "Model",
    "check_finite",
    "decoder_context",
    "first_ids",
    "load",
    "projection_of",
    "random_twin",
    "weights_hash",
    "with_attention",
]
