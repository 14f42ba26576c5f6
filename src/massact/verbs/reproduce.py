"""`massact reproduce`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from massact.records.errors import UserError
from massact.verbs.inputs import OfScanOrModel
from massact.verbs.intervene import Heads
from massact.verbs.options import BatchSize, Names, Options, Thresholds, option
from massact.verbs.scan import THRESHOLD
from massact.verbs.verb import Verb


class ReproduceConfig(Options):
    """The options of a reproduction; labels and head are those of an intervention."""

    VERB: ClassVar[str] = "reproduce"

    only: Names = option((), "Experiments, E4,E17: only the steps that they need. Can be repeated.")
    evaluate_on: tuple[str, ...] = option(
        (), "Further text for perplexity (E11): wikitext-2, c4, pg19, ... Can be repeated."
    )
    labels: str | None = option(None, "Classes of images, for top-1 (E20, E22).", shown=False)
    head: Any = option(None, "Of a model of images without one.", shown=False)
    tasks: Names = option((), "lm-eval tasks, with commas (E12; extra: tasks).")
    task_folder: str | None = option(None, "Folder of lm-eval task files; these work offline.")
    limit: int | None = option(None, "Questions of each task.", least=1)
    tuned: str | None = option(None, "A fine-tuned model of the same base (E25).")
    published_as: str | None = option(
        None, "The published model that this is, if its name does not say: LLaMA2-7B.", "--as"
    )
    batch_size: BatchSize = option("auto", "Sequences per forward pass, or auto.")
    seed: int = option(0, "Seed of everything random.")


class Given(Heads, OfScanOrModel):
    """What a reproduction is given."""

    target: str | None = option(
        None,
        "Run directory of a scan, to which everything is added, or a model (Hub id or folder), which is scanned first; "
        "nothing: the embedded model.",
        argument=True,
    )
    out: Path | None = option(None, "Run directory for a model. What is finished there is kept, not done again.")
    listed: bool = option(False, "Print all experiments, and what each still needs.", "--list")
    corpus: str | None = option(None, "Text or images to scan, as of scan; of a run: where these lie now.")
    seq_len: int | None = option(None, "Tokens per sequence (the paper: 4096, Table 3 2048).", least=1)
    n_sequences: int | None = option(None, "Number of sequences (the paper: 100).", least=1)
    threshold: Thresholds = option({}, THRESHOLD)
    bos: str | None = option(None, "never (as the paper; of text the default), auto (as the tokenizer does) or always.")
    labels: str | None = option(
        None, "Classes of images, for top-1 (E20, E22): auto (of the corpus: class folders, CSV), or CSV."
    )
    head: Path | None = option(
        None,
        "Linear head for a model of images without one (DINOv2-reg: Table 5): .safetensors or .pt, see `intervene`.",
    )
    trained: tuple[Path, ...] = option((), "Run of a training (E18). Repeat it for each of two or more.")
    dtype: str | None = option(None, "Of a model: auto (as stored), float32, bfloat16, float16.", last=True)
    resume: bool = option(False, "Go on with what is in --out; it does so by itself.", last=True)

    def refuse_those_of_a_model(self) -> None:
        """Refuse, of a run, what only a model can be given."""
        if self.out is not None or self.dtype is not None or self.asked():
            raise UserError(
                "--out, --dtype and the options of a scan are for a model, not for a run.", do="Leave them out."
            )

    def asked(self) -> dict[str, Any]:
        """What was asked of the scan."""
        asked = {"preprocess": self.preprocess, "thresholds": self.threshold, "seq_len": self.seq_len,
                 "n_sequences": self.n_sequences, "bos": self.bos, "text_column": self.text_column,
                 "chat_template": self.chat_template}  # fmt: skip
        return {name: value for name, value in asked.items() if value}

    def scan_options(self, options: Any) -> dict[str, Any]:
        """Of the scan that comes first."""
        return self.asked() | {"seed": options.seed, "batch_size": options.batch_size}


VERB = Verb(
    "reproduce",
    "Every experiment of the founding paper that applies to a model, beside what was published of it.",
    Given,
    ReproduceConfig,
    run="massact.cli.reproduce:run",
    lists="massact.cli.reproduce:listed",
    noun="A reproduction",
    by_itself=True,
    place=5,
)
