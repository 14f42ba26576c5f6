"""The data sets of the paper, each with its exact protocol, as one table.

Source: the official code, lib/load_data.py, as recorded in section 2.1 of the paper's digest. A protocol says
which documents, what joins them, and whether the tokenizer's special tokens are on while the joined text is
tokenised once. The paper then takes consecutive windows from the start: all of WikiText-2, the first 100 of
the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from massact.records.errors import near


@dataclass(frozen=True)
class Preset:
    """One data set and its protocol.

    Args:
        dataset: id on the Hub.
        split: which split.
        join: what stands between two documents.
        special_tokens: what bos='auto' means here: 'never', or 'stream' (on, so once around the whole text).
        config: configuration of the data set.
        column: which column holds the text.
        first: take only the first documents.
        random: take so many documents at random instead.
        random_seed: NumPy seed of that draw, to which the user's seed is added (0 is the paper's draw).
        streaming: read only what is needed (the data set is far larger than its first documents).
        files: JSONL files, read in this order, for a data set whose loading script no longer runs.
    """

    dataset: str
    split: str
    join: str
    special_tokens: Literal["never", "stream"]
    config: str | None = None
    column: str = "text"
    first: int | None = None
    random: int | None = None
    random_seed: int = 1
    streaming: bool = False
    files: tuple[str, ...] = ()


# `datasets` 4 dropped loading scripts. The script of this data set read its files one after the other in this
# order, which fixes the document numbers that the random draw refers to.
_REDPAJAMA_FILES = tuple(
    f"{name}_sample.jsonl"
    for name in (
        "arxiv", "book", "c4", "cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06",
        "github", "stackexchange", "wikipedia",
    )
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "wikitext-2": Preset("Salesforce/wikitext", "test", "\n\n", "never", config="wikitext-2-raw-v1"),
    "c4": Preset("NeelNanda/c4-10k", "train", " ", "stream", first=5000),
    "pg19": Preset("emozilla/pg19", "validation", " ", "stream", first=5, streaming=True),
    "redpajama": Preset(
        "togethercomputer/RedPajama-Data-1T-Sample",
        "train",
        "\n\n",
        "never",
        random=500,
        files=_REDPAJAMA_FILES,
    ),
}


def named_corpora(name: str = "") -> str:
    """Say which named corpora resemble `name`, and which there are."""
    listed = near(name, [*PRESETS, "embedded"], "Named corpora")
    return f"{listed.removesuffix('.')}; of these, embedded needs no network."
