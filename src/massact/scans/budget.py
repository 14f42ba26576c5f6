"""How many sequences a scan reads where nobody says: on a CPU as many as take about a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from massact.models import Model
from massact.records.runinfo import duration
from massact.scans.job import Text
from massact.verbs.scan import ScanConfig

SECONDS = 60.0
LEAST = 4  # sequences, however long they take
OVERHEAD = 1.3  # of a scan over its forward passes: statistics, controls
CLOSE = 1.5  # nothing is left out for less than this


def within_a_minute(
    model: Model, text: Text, config: ScanConfig, say: Callable[[str], None], seconds: float = SECONDS
) -> tuple[Text, ScanConfig]:
    """The same text and options, with fewer sequences where the model is slow here; says so, and what all would cost.

    One sequence is run to see how long it takes. Nothing is changed on another device than a CPU, where a number was
    asked for, or where the corpus is not of tokens alone.

    Args:
        say: is told a line.
        seconds: that a scan may take.
    """
    corpus = text.ready
    asked = config.n_sequences is not None or isinstance(text.source, type(corpus))
    n = corpus.n_sequences
    if asked or model.device.type != "cpu" or set(corpus.inputs) != {"input_ids"} or n <= LEAST:
        return text, config
    began = time.perf_counter()
    with torch.inference_mode():
        last = [stack.blocks[-1].places["resid_post"] for stack in model.anatomy.stacks]
        model.run({"input_ids": corpus.inputs["input_ids"][:1]}, places=last)
    each = OVERHEAD * (time.perf_counter() - began)
    if each * n <= CLOSE * seconds:
        return text, config
    fits = max(LEAST, int(seconds / each))
    if fits >= n:
        return text, config
    say(f"Scanning {fits} of {n} sequences, about {duration(fits * each)} on this CPU; all of them would take "
        f"{duration(n * each)}: --n-sequences {n}.")  # fmt: skip
    return replace(text, ready=corpus.head(fits)), config.changed(n_sequences=fits)
