"""Load a model; find its anatomy; prove it.

Takes a Hub id, a folder or a live module; gives a `Model` whose every site is proved. Knows how
transformers are built. Must not know statistics, criteria or corpora.
"""

from massact.models.attention import projection_of, with_attention
from massact.models.discovery import discover
from massact.models.equations import Off, equations_of
from massact.models.inputs import example_inputs, token_types
from massact.models.loading import EMBEDDED, Model, check_finite, load, random_twin, weights_hash
from massact.models.norms import norms_of
from massact.models.proof import Proof, prove
from massact.models.speech import decoder_context, first_ids

__all__ = [
    "EMBEDDED",
    "Model",
    "Off",
    "Proof",
    "check_finite",
    "decoder_context",
    "discover",
    "equations_of",
    "example_inputs",
    "first_ids",
    "load",
    "norms_of",
    "projection_of",
    "prove",
    "random_twin",
    "token_types",
    "weights_hash",
    "with_attention",
]
