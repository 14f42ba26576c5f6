"""Where images are: a folder, a folder of class folders, a CSV, a list; and how one is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from massact.corpora.files import IMAGE_SUFFIXES, JSONL_SUFFIXES, TEXT_SUFFIXES, files_in, named_file
from massact.corpora.text_tables import csv_rows
from massact.records.errors import UserError, class_and_line

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
# What Pillow may decode, whatever a file is called: raster formats that it reads by itself. EPS, for one, it hands to
# ghostscript, which runs the program in the file; other formats are refused because nobody photographs in them.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
LABEL_COLUMNS = ("label", "labels", "class", "target")
LABEL_ENDINGS = ("_label", "_class")


@dataclass(frozen=True)
class Pictures:
    """Images of a corpus, in order, and their classes.

    Args:
        names: of each image, relative to where they were looked for.
        labels: class index of each, or None.
        classes: class names by index, where the index is only their place in alphabetical order; None where the
            labels were given as numbers.
        images: path of each, or the image itself; empty once they are read.
        form: 'folder', 'classes', 'csv', 'file' or 'list'.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    images: tuple[Any, ...] = field(default=(), repr=False)
    form: str = "list"

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int | None = None) -> Pictures:
        """Those from `start` to before `stop`."""
        labels = None if self.labels is None else self.labels[start:stop]
        return replace(self, names=self.names[start:stop], labels=labels, images=self.images[start:stop])


def is_image_name(name: Any) -> bool:
    """Whether a path or string ends as images do."""
    return isinstance(name, str | os.PathLike) and os.fspath(name).lower().endswith(IMAGE_SUFFIXES)


def is_image(thing: Any) -> bool:
    """Whether something is an image of Pillow."""
    return type(thing).__module__.startswith("PIL.") and hasattr(thing, "convert")


def pictures_of(spec: Any) -> Pictures | None:
    """The images that a path or list means; None where it means something else (text).

    Raises:
        UserError: images and text mixed, a missing file, a CSV without the column.
    """
    if isinstance(spec, Path):
        if spec.is_dir():
            return _folder(spec)
        if spec.suffix.lower() == ".csv" and spec.is_file():
            return read_csv(spec) if _names_images(spec) else None
        if is_image_name(spec) and spec.is_file():
            return Pictures((spec.name,), images=(spec,), form="file")
        return None
    if not isinstance(spec, Sequence) or isinstance(spec, str) or not spec:
        return None
    meant = [is_image(x) or isinstance(x, Path) or is_image_name(x) for x in spec]
    if not any(meant) or (not all(meant) and all(isinstance(x, str) for x in spec) and not _some_exist(spec)):
        return None
    if not all(meant):
        odd = meant.index(False)
        raise UserError(
            f"Entry {odd} of the list is no image: {str(spec[odd])[:60]!r}.",
            f"Other entries are, and a corpus is either images or text. Images end in {' '.join(IMAGE_SUFFIXES)}.",
            "Give two lists.",
        )
    images = tuple(
        x if is_image(x) else named_file("image", Path(x), f"entry {i} of the list") for i, x in enumerate(spec)
    )
    names = tuple(f"image {i}" if is_image(x) else Path(x).name for i, x in enumerate(spec))
    return Pictures(names, images=images)


def _names_images(file: Path) -> bool:
    """Whether a CSV is a list of images: it has a column of paths, and none of text where these are of no images."""
    rows = csv_rows(file)
    head = [cell.strip() for cell in rows[0]] if rows else []
    at = _column(head, PATH_COLUMNS)
    if at is None:
        return not head
    return "text" not in head or any(is_image_name(row[at].strip()) for row in rows[1:2] if len(row) > at)


def _some_exist(spec: Sequence[Any]) -> bool:
    """Whether some strings that end as images do are files: a prompt may end so too."""
    return any(is_image_name(x) and os.path.isfile(x) for x in spec)


def _folder(folder: Path) -> Pictures | None:
    shown = files_in(folder)
    images = sorted((f for f in shown if is_image_name(f)), key=lambda f: f.relative_to(folder).as_posix())
    if not images:
        return None
    texts = [f for f in shown if f.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES)]
    if texts:
        raise UserError(
            f"The folder {str(folder)!r} holds both images ({len(images):,}) and text ({len(texts):,}).",
            f"For example {images[0].name!r} and {texts[0].name!r}; a corpus is either.",
            "Name a folder that holds one of them, a CSV with a column 'path', or give a list in Python.",
        )
    names = tuple(f.relative_to(folder).as_posix() for f in images)
    if any("/" not in name for name in names):
        return Pictures(names, images=tuple(images), form="folder")
    tops = [name.split("/")[0] for name in names]
    classes = tuple(sorted(set(tops)))
    index = {name: i for i, name in enumerate(classes)}
    return Pictures(names, tuple(index[t] for t in tops), classes, tuple(images), "classes")


# ------------------------------------------------------------------------------------------------------------- CSV
def read_csv(file: Path, find: bool = True) -> Pictures:
    """Images and labels of a CSV with a header.

    Args:
        file: with a column path, file, filename or image (relative to the CSV's folder), and for labels one called
            label, class or target, or ending in _label or _class: class numbers, or class names.
        find: whether the images must be there.

    Raises:
        UserError: no such column, no row, an empty cell, a missing image.
    """
    rows = csv_rows(file)
    if not rows:
        raise UserError(f"The file {str(file)!r} is empty.", do="It needs a header: path,label")
    head = [cell.strip() for cell in rows[0]]
    at, label_at = _column(head, PATH_COLUMNS), _column(head, LABEL_COLUMNS, LABEL_ENDINGS)
    if at is None:
        raise UserError(
            f"{str(file)!r} names no images: it has no column {', '.join(PATH_COLUMNS[:-1])} or {PATH_COLUMNS[-1]}.",
            f"Its columns: {', '.join(map(repr, head))}.",
            "Name the column of the images 'path'. (For text give a text or JSONL file.)",
        )
    names, labels, images = [], [], []
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"row {number} of {file.name!r}"
        if len(row) != len(head) or not row[at].strip():
            raise UserError(f"In {where} {len(row)} cells stand under {len(head)} columns, or no image is named.")
        names.append(row[at])
        images.append(named_file("image", file.parent / row[at], where) if find else Path(row[at]))
        if label_at is not None:
            if not row[label_at].strip():
                raise UserError(f"In {where} there is no label.", do="Give every image one, or leave the column out.")
            labels.append(row[label_at].strip())
    if not names:
        raise UserError(f"The file {str(file)!r} names no image.", "It has a header only.")
    index, classes = _indexed(labels) if labels else (None, None)
    return Pictures(tuple(names), index, classes, tuple(images), "csv")


def _column(head: Sequence[str], known: Sequence[str], endings: tuple[str, ...] = ()) -> int | None:
    """Place of the column with the first of the known names, else of the only one with a known ending."""
    lowered = [name.lower() for name in head]
    for name in known:
        if name in lowered:
            return lowered.index(name)
    ends = [i for i, name in enumerate(lowered) if endings and name.endswith(endings)]
    return ends[0] if len(ends) == 1 else None


def _indexed(labels: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    if all(label.isascii() and label.isdigit() for label in labels):
        return tuple(int(label) for label in labels), None
    classes = tuple(sorted(set(labels)))
    index = {name: i for i, name in enumerate(classes)}
    return tuple(index[label] for label in labels), classes


# --------------------------------------------------------------------------------------------------------- opening
def opened(image: Any, name: str) -> Any:
    """An RGB image of Pillow: the first frame, turned as EXIF says; transparency is dropped, grey repeated.

    Raises:
        UserError: it cannot be read, is too large to be one, or has more than 8 bits a channel.
    """
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = image if is_image(image) else _of_known_format(image, name)
            if getattr(picture, "format", None) not in (None, "MPO", *FORMATS):  # MPO: JPEGs of several views
                raise _other_format(name, f"It is {picture.format}.")
            try:
                turned = ImageOps.exif_transpose(picture)
                if turned.mode in ("I", "F") or turned.mode.startswith("I;"):
                    raise UserError(
                        f"The image {name!r} has more than 8 bits a channel (mode {turned.mode}).",
                        "How its values map to colours is not known.",
                        "Save it as 8-bit, or give a tensor.",
                    )
                if turned.mode in ("P", "LA", "PA"):
                    turned = turned.convert("RGBA")  # a palette with transparency has no direct way to RGB
                return turned.convert("RGB")
            finally:
                if not is_image(image):
                    picture.close()
    except UserError:
        raise
    except Exception as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, ...
        raise UserError(
            f"The image {name!r} cannot be read.", class_and_line(error), "Copy it again, or leave it out."
        ) from error


def _of_known_format(path: Any, name: str) -> Any:
    """An image file of one of `FORMATS`, opened; nothing of it is decoded yet."""
    from PIL import Image, UnidentifiedImageError

    with open(path, "rb") as file:
        start = file.read(4)
    if start in (b"%!PS", b"\xc5\xd0\xd3\xc6"):
        raise _other_format(name, "It is PostScript (EPS), a program that would be run to draw the image.")
    Image.init()  # not every Pillow has all of them
    try:
        return Image.open(path, formats=[one for one in FORMATS if one in Image.OPEN])
    except UnidentifiedImageError:
        raise _other_format(name, "Its first bytes are of none of them, or it is damaged.") from None


def _other_format(name: str, why: str) -> UserError:
    return UserError(f"The image {name!r} cannot be read.", f"{why} Formats that are read: {', '.join(FORMATS)}.",
                     "Save it as PNG or JPEG, or leave it out.")  # fmt: skip
