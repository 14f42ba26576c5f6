"""The experiments E1 to E25 of the founding paper (Sun 2024), and X1, ... beyond it, each a declared entry.

Takes one model (or the directory of a scanned run), a corpus, and what only some experiments need (labels, tasks, a
tuned model, trainings); gives a `Reproduction`. Knows what each experiment is made of, which passes it shares with
others, and what was published of which model, with how that is known. Must not know how anything is measured, which
the verbs' own rooms do, nor how results are put into words or drawn.
"""

from massact.reproductions.entries import Entry
from massact.reproductions.experiments import ENTRIES
from massact.reproductions.job import listing, reproduce
from massact.reproductions.judgement import KNOWN, Published, judged
from massact.reproductions.register_values import REGISTER_MEANS, check_published
from massact.reproductions.values import PUBLISHED

__all__ = [
    "ENTRIES",
    "KNOWN",
    "PUBLISHED",
    "REGISTER_MEANS",
    "Entry",
    "Published",
    "check_published",
    "judged",
    "listing",
    "reproduce",
]
