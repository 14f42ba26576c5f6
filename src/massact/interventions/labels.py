"""Classes of the images of a corpus, as the model numbers them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from massact.corpora import Corpus, Pictures, read_csv
from massact.interventions.zero_shot import spoken
from massact.models import Model
from massact.records.errors import UserError

_FORMS = "a folder of class folders, or a CSV with the columns path and label"


def labels_of(model: Model, corpus: Corpus, given: Sequence[int] | str) -> list[int]:
    """The class index of every image.

    Class names (folders, or words in a CSV) are looked up in the model's `label2id`. If it does not have them all,
    their place in alphabetical order is the index (as torchvision's ImageFolder), but only if there are as many
    names as the model has classes: with fewer, the order says nothing about the model's.

    Args:
        model: with a classification head.
        corpus: images.
        given: the labels; 'auto' for those that the corpus came with; or a CSV, whose rows are found by file name.

    Raises:
        UserError: there are none, an image has none, names that cannot be matched, a label out of range.
    """
    if isinstance(given, str):
        labels = _numbered(model, labelled(corpus, given))
    else:
        labels = [int(x) for x in given]
        if len(labels) != corpus.n_sequences:
            raise UserError(
                f"labels has {len(labels)} entries for {corpus.n_sequences} sequences.",
                do="Give one for each sequence.",
            )
    _in_range(model, corpus, labels)
    return labels


def labelled(corpus: Corpus, given: str) -> Pictures:
    """The images of a corpus with labels: those that they came with ('auto'), or those of a CSV.

    Raises:
        UserError: there are none, or an image has none.
    """
    return _own(corpus) if given == "auto" else _listed(corpus, Path(given))


def _own(corpus: Corpus) -> Pictures:
    pictures = corpus.pictures
    if pictures is None or pictures.labels is None:
        what = "It was not read from images." if pictures is None else f"It is a {pictures.form} without labels."
        raise UserError(f"The corpus {corpus.name!r} has no labels.", what, f"Give {_FORMS}, or --labels FILE.csv.")
    return pictures


def _listed(corpus: Corpus, file: Path) -> Pictures:
    """The labels of a CSV in the order of the corpus."""
    if corpus.pictures is None:
        raise UserError(f"The corpus {corpus.name!r} was not read from images.", do="Labels are found by file name.")
    if not file.is_file():
        raise UserError(f"There is no file {str(file)!r}.", do="Give auto, or a CSV with the columns path and label.")
    table = read_csv(file, find=False)
    if table.labels is None:
        raise UserError(f"{str(file)!r} has no labels.", do="It needs a column label (or ending in _label, _class).")
    whole = _unique(file, [_clean(name) for name in table.names])
    last = Counter(PurePosixPath(name).name for name in whole)
    short = {PurePosixPath(name).name: row for name, row in whole.items() if last[PurePosixPath(name).name] == 1}
    rows = []
    for name in corpus.pictures.names:
        row = whole.get(_clean(name), short.get(PurePosixPath(_clean(name)).name))
        if row is None:
            raise UserError(f"{str(file)!r} has no label for the image {name!r}.", do="Name it as the corpus does.")
        rows.append(row)
    labels = tuple(table.labels[row] for row in rows)
    return Pictures(corpus.pictures.names, labels, table.classes, form="csv")


def _clean(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _unique(file: Path, names: list[str]) -> dict[str, int]:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"{str(file)!r} names {twice[0]!r} more than once.", do="Keep one row for each image.")
    return {name: row for row, name in enumerate(names)}


def n_classes(model: Model) -> int | None:
    """How many classes a model tells apart, where its head or its configuration says."""
    if model.head is not None:
        return int(model.head.n_classes)
    bare = getattr(model.module, "base_model", None) is model.module  # its configuration counts classes all the same
    n = None if bare else getattr(getattr(model.module, "config", None), "num_labels", None)
    n = getattr(model.module, "num_classes", None) if n is None else n  # timm
    return n if isinstance(n, int) and n > 0 else None


def _numbered(model: Model, pictures: Pictures) -> list[int]:
    assert pictures.labels is not None
    if pictures.classes is None:
        return list(pictures.labels)
    names, known = _by_name(model, pictures.classes)
    odd = [name for name in names if name not in known]
    if not odd:
        return [int(known[names[label]]) for label in pictures.labels]
    n = n_classes(model)
    if (n is not None and n != len(names)) or len(odd) < len(names):
        raise UserError(
            f"There are {len(names):,} class names, and the model has {n or len(known):,} classes.",
            f"It does not know them all by name (for example {odd[0]!r}), and their order is not that of its classes.",
            "Give the numbers: --labels FILE.csv with the columns path and label.",
        )
    return list(pictures.labels)


def _by_name(model: Model, classes: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names of the images as the model would write them, and the numbers that it has for names."""
    if model.head is None:
        return classes, getattr(getattr(model.module, "config", None), "label2id", None) or {}
    known = {name: i for i, name in enumerate(model.head.classes or ())}
    return tuple(spoken(name) for name in classes), known


def _in_range(model: Model, corpus: Corpus, labels: list[int]) -> None:
    n = n_classes(model)
    for i, label in enumerate(labels):
        if label < 0 or (n is not None and label >= n):
            which = corpus.pictures.names[i] if corpus.pictures is not None else f"sequence {i}"
            known = f"The model has classes 0 to {n - 1}." if n is not None else "Classes are counted from 0."
            raise UserError(f"The label of {which!r} is {label}.", known, "Number classes as the model does.")
