"""`massact train`: its options. What is trained is a `massact.training.TrainConfig`."""

from __future__ import annotations

from pathlib import Path

from massact.verbs.inputs import Inputs
from massact.verbs.options import Options, option
from massact.verbs.verb import Verb


class Asked(Options):
    """What is trained."""

    config: str | None = option(
        None,
        "gpt2-124m, llama-60m, vit-tiny or tiny (default); see --list. Of a task: story (default), or guo for the "
        "published sizes.",
    )
    start: str | None = option(
        None,
        "Folder or Hub id of a language model to go on from (one that massact fold saved, say), with its tokenizer.",
    )
    task: str | None = option(
        None, "A toy lab of small models, one for each --attention, side by side: bigram-backcopy."
    )
    data: str | None = option(
        None,
        "Text, Markdown or JSONL file, a folder of them, the name of a data set (streamed), or an .npz file of images "
        "and labels; nothing: the embedded text.",
    )
    attention: tuple[str, ...] = option(
        (),
        "Attention variant, see --list; nothing: softmax. Of a task it can be repeated; nothing: softmax, kv-bias and "
        "softmax-off-by-one.",
    )
    steps: int | None = option(None, "Optimizer steps.", least=1)
    sets: tuple[str, ...] = option(
        (), "Field of the configuration: lr=1e-3, model.n_layer=4, ... Can be repeated.", "--set"
    )
    seed: int | None = option(None, "Seed of the weights and of the order of the data.")
    scan: bool = option(True, "Scan and explain the trained model over held-out windows, into OUT/scan.")


class Given(Inputs):
    """Where a training goes."""

    out: Path | None = option(None, "Run directory for model, checkpoints and tables.")
    resume: bool = option(False, "Go on with the interrupted training in --out.", last=True)
    listed: bool = option(False, "Show configurations and attention variants.", "--list", last=True)


VERB = Verb(
    "train",
    "Train a model, any attention variant, and watch its massive activations appear or not.\n\n"
    "Several processes: accelerate launch -m massact train ...",
    Given,
    Asked,
    run="massact.cli.train:run",
    lists="massact.cli.train:listed",
    noun="A training",
    place=6,
)
