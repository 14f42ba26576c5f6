"""`massact scan`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import field_validator

from massact.records.errors import UserError
from massact.verbs.inputs import CHAT, COLUMN, IMAGES, OfModel
from massact.verbs.options import BatchSize, Options, Preprocess, Thresholds, option
from massact.verbs.verb import Verb

PROMPT = "The kettle sings. The lamp is low.\n"
MOST_KEPT = 1 << 16  # of the greatest |h| of one hidden state
GENERATE = (
    "Let the model go on with each sequence by so many tokens, and scan both; `origin` tells them apart. Of a text 8 "
    "prompts of 32 tokens, unless --n-sequences and --seq-len say more."
)
THRESHOLD = "Override a constant of the criterion: name=value. Can be repeated."


class ScanConfig(Options):
    """The options of a scan.

    seq_len, n_sequences, bos and seed are of a corpus that is not tokenised yet, see `corpora`; None: as that says.
    `top_k` is raised by itself where all that were kept pass. `rank_sequences` are sorted for the lower ranks of
    Table 2 (the greatest are kept for all).
    """

    VERB: ClassVar[str] = "scan"

    criterion: str = option("sun2024", "Published rule for what is massive, see docs/reference.md.")
    thresholds: Thresholds = option({}, THRESHOLD, "--threshold")
    seq_len: int | None = option(None, "Tokens per sequence.", least=1)
    n_sequences: int | None = option(None, "Number of sequences.", least=1)
    bos: str | None = option(None, "auto (as the tokenizer does), always or never (as the paper).", typed="auto")
    chat_template: bool = option(False, f"{CHAT} With --against of that model alone.")
    generate: int | None = option(None, GENERATE, least=1)
    temperature: float = option(0.0, "Of --generate: 0 takes the likeliest token, more draws from softmax(z / T).",
                                least=0)  # fmt: skip
    seed: int | None = option(None, "Seed of everything random.", typed=0)
    batch_size: BatchSize = option("auto", "Sequences per forward pass, or auto.")
    top_k: int = option(16, "Greatest |h| kept per sequence and layer.", least=3)
    prompt: str = option(PROMPT, "Prompt of the 3-D figure and Table 1.")
    rank_sequences: int = option(4, "Sequences that are sorted for Table 2.", shown=False)
    null: bool | str = option("auto", "Also scan a random-init twin (default: up to 500M parameters).")
    bos_contrast: bool = option(
        True,
        "Also scan a few sequences with and without BOS (default: yes). Of several checkpoints this and --null are of "
        "the last, and off unless given.",
    )
    pictures: bool = option(True, "Keep small pictures of the first 8 images in --out, for its figures.")
    preprocess: Preprocess = option({}, IMAGES)
    text_column: str | None = option(None, COLUMN)
    by: str | dict[str, list[float]] | None = option(
        None, "An input with one number for each sequence (a timestep), or a name with such numbers.", shown=False
    )

    @field_validator("top_k")
    @classmethod
    def _kept(cls, top_k: int) -> int:
        if top_k > MOST_KEPT:
            raise UserError(f"top_k is {top_k}.", do=f"Keep 3 to {MOST_KEPT:,} values of each hidden state.")
        return top_k

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int | None) -> int | None:
        if not 0 <= (seed or 0) < 1 << 32:
            raise UserError(f"The seed is {seed}.", do="Use a number from 0 to 4,294,967,295.")
        return seed


class OfOneOrSeveral(OfModel):
    """What a scan is given."""

    model: str | None = option(
        None, "Hub id, local folder, GGUF file or timm:NAME; nothing: the embedded model.", argument=True
    )
    out: Path | None = option(None, "Run directory for tables and figures.")
    against: str | None = option(
        None, "A second model, scanned too and put beside the first: a chat model beside its base, for example."
    )
    corpus: str | None = option(
        None,
        "Text, Markdown, JSONL, CSV or parquet file, a folder of them, or a data set name (wikitext-2, c4, pg19, "
        "redpajama, any Hub id); for models of images or sound (wav, flac): a folder of them, a CSV with a column "
        "path; for images with text: a JSONL file with columns image and text; nothing: the embedded text.",
    )
    dtype: str = option("auto", "auto (as stored), float32, bfloat16 or float16.", last=True)
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.", last=True)
    revisions: str | None = option(
        None,
        "Scan several revisions of a Hub model, each into its folder in --out, and draw the trajectory: "
        "step1000,step2000 or FIRST:LAST:STEP (step1000:step10000:1000).",
        last=True,
    )
    checkpoints: bool = option(False, "The same for a folder whose subfolders are checkpoints.", last=True)
    resume: bool = option(False, "Go on with the interrupted scan in --out.", last=True)


VERB = Verb(
    "scan",
    "Has this model massive activations: where, how large, how constant, how close to overflow?",
    OfOneOrSeveral,
    ScanConfig,
    run="massact.cli.against:run",
    check="massact.scans.verb:check",
    noun="A scan",
    place=1,
)
