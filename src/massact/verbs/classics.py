"""`massact classics`: its options."""

from __future__ import annotations

from typing import ClassVar

from massact.verbs.inputs import OfScanOrModel
from massact.verbs.options import Options, option
from massact.verbs.verb import Verb


class ClassicsConfig(Options):
    """The options of the classics."""

    VERB: ClassVar[str] = "classics"

    which: tuple[str, ...] = option((), "One of those that --list prints. Can be repeated; default: all.")
    n_sequences: int | None = option(None, "Sequences, from the start; nothing: all.", least=1)
    batch_size: int = option(1, "Sequences per forward pass of paired runs.", least=1)
    seed: int = option(0, "Seed of pairs and random controls.")


class Given(OfScanOrModel):
    """What classics are given."""

    listed: bool = option(False, "Print all entries with their sources.", "--list")


VERB = Verb(
    "classics",
    "What do the classic outlier works find on this model: outlier features, rogue dims, bias roles, ...?",
    Given,
    ClassicsConfig,
    job="massact.classics:classics",
    check="massact.classics:check_which",
    lists="massact.classics:listed",
    place=4,
)
