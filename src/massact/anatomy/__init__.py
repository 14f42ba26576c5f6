"""What a model nobody has seen before is made of: found by watching it run, read, and proved.

Takes a live module and one short example input, or makes the example; gives an `Anatomy` whose every site fires and
whose sums hold, or a refusal with its reason. Knows how blocks are built and what a configuration says of inputs. Must
not know where a model came from, or what is measured on it.
"""

from massact.anatomy.discovery import discover
from massact.anatomy.equations import Off, equations_of
from massact.anatomy.examples import example_inputs
from massact.anatomy.norms import norms_of
from massact.anatomy.proof import Proof, prove

__all__ = ["Off", "Proof", "discover", "equations_of", "example_inputs", "norms_of", "prove"]
