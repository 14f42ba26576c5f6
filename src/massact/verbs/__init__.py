"""What can be asked of massact: one file a verb, with its options, its words in `--help`, and what does it.

Takes what a user gives, on the command line or in Python. Gives checked options, and `verbs()`: all verbs there are,
those of other packages too; the command line is generated from them. Knows names, types and bounds of options. Must not
know torch, models, or how anything is measured: what does the work is named, and imported when a verb runs.
"""

from massact.verbs.inputs import OfModel, OfScan
from massact.verbs.options import Options, option
from massact.verbs.verb import Call, Done, Verb, verbs

__all__ = ["Call", "Done", "OfModel", "OfScan", "Options", "Verb", "option", "verbs"]
