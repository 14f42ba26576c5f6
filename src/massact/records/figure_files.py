"""Figures as files: their formats and styles, by name."""

from __future__ import annotations

from collections.abc import Iterable

from massact.records.errors import UserError, near

# Format -> the metadata that is left out, dates and versions: the same result gives the same bytes.
FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None}, "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}  # fmt: skip
STYLES = ("paper", "lecture")  # as wide as a page; slides of 16 to 9 with large type, one for each part


def formats_of(text: str) -> tuple[str, ...]:
    """The formats that a text names with commas, each once; () of 'none'.

    Raises:
        UserError: there is no such format.
    """
    names = () if text == "none" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    check_formats(names)
    return names


def check_formats(names: Iterable[str]) -> None:
    """Refuse a format that there is not.

    Raises:
        UserError: says which are near.
    """
    for name in names:
        if name not in FORMATS:
            raise UserError(f"No figures in the format {name!r}.", do=near(name, FORMATS))


def check_style(name: str) -> None:
    """Refuse a style that there is not.

    Raises:
        UserError: says which are near.
    """
    if name not in STYLES:
        raise UserError(f"No style {name!r}.", do=near(name, STYLES))
