"""Options of a verb, declared once: for Python, for the command line, for the record of a run, and for the docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from massact.records.errors import MassactError, UserError, check_options
from massact.records.runinfo import jsonable


def option(
    default: Any, means: str, flag: str = "", *, least: float | None = None, typed: Any = None, shown: bool = True,
    argument: bool = False, last: bool = False,
) -> Any:  # fmt: skip
    """A field of `Options`.

    Args:
        default: its value where none is given.
        means: what it is, for `--help` and the docs.
        flag: on the command line; nothing: its name.
        least: the least value.
        typed: of the command line, its value where none is given, if that is another.
        shown: False for one that only Python has.
        argument: whether it is given by its place.
        last: whether `--help` tells it behind the verb's own.
    """
    told = {"flag": flag, "typed": typed, "shown": shown, "argument": argument, "last": last}
    return Field(default, description=means, ge=least, json_schema_extra=told)


class Options(BaseModel):
    """Options of a verb: frozen, checked when they are made.

    A subclass declares each as `name: type = option(default, means)`; `VERB` names it in errors.

    Raises:
        UserError: an unknown option (says which are near), or a value that it cannot have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    VERB: ClassVar[str] = ""

    def __init__(self, **given: Any) -> None:
        fields = type(self).model_fields
        check_options(self.VERB or type(self).__name__, given, fields)
        try:
            super().__init__(**{name: _read(name, value, fields[name]) for name, value in given.items()})
        except ValidationError as error:
            raise _told(error.errors()[0], given, fields) from None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Options by name."""
        return cls(**options)

    def changed(self, **options: Any) -> Self:
        """The same with some of them replaced."""
        return type(self)(**(dict(self) | options))

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def record(self) -> dict[str, Any]:
        """All of them, as JSON can hold them: what the record of a run keeps."""
        kept: dict[str, Any] = jsonable(dict(self))
        return kept


def told_of(field: FieldInfo) -> dict[str, Any]:
    """What is declared of an option beside its type, see `option`."""
    extra = field.json_schema_extra
    told = {"flag": "", "typed": None, "shown": True, "argument": False, "last": False}
    return told | (extra if isinstance(extra, dict) else {})


def flags_of(kind: type[Options]) -> dict[str, tuple[str, str]]:
    """Name of an option -> its flag on the command line, and the one that turns it off; "": there is none."""
    flags = {}
    for name, field in kind.model_fields.items():
        told, on = told_of(field), f"--{name.replace('_', '-')}"
        if told["flag"]:
            on, _, off = told["flag"].split(",")[0].partition("/")
        else:
            off = f"--no-{on[2:]}" if bool in kinds_of(field.annotation) and field.default is not False else ""
        if told["shown"] and not told["argument"]:
            flags[name] = on, off
    return flags


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


# What is to be given in place of a value that is none of these.
_WORDS: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path", NoneType: "None",
    tuple: "several, as a list or a tuple", dict: "a dict of names and values",
}  # fmt: skip


def _read(name: str, value: Any, field: FieldInfo) -> Any:
    """A value as pydantic is to see it: numbers of NumPy as those of Python, None of a switch or a dict as empty."""
    kinds = _kinds(field)
    if Any in kinds:
        return value
    if value is None and NoneType not in kinds and (empty := {bool, dict} & {*kinds}):
        return empty.pop()()
    value = _plain(value)
    if isinstance(value, bool) and bool not in kinds and {int, float} & {*kinds}:  # for pydantic True is 1
        raise _refused(name, value, field)
    return value


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy as those of Python, paths as texts (of which pydantic makes paths again)."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, PurePath):
        return str(value)
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def _kinds(field: FieldInfo) -> list[Any]:
    return [get_origin(kind) or kind for kind in kinds_of(field.annotation)]


def _told(error: Any, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> MassactError:
    """What pydantic refused, in our words; what a check of ours said, as it is."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, MassactError):
        return cause
    name = str(error["loc"][0])
    return _refused(name, given.get(name), fields[name])


def _refused(name: str, value: Any, field: FieldInfo) -> UserError:
    words = {kind: _WORDS[kind] for kind in _kinds(field) if kind in _WORDS}
    if len(words) > 1 and isinstance(field.default, str) and str in words:
        words[str] = repr(field.default)
    least = next((x.ge for x in field.metadata if hasattr(x, "ge")), None)
    if least is not None and int in words:
        words[int] += f" from {least:g} on"
    return UserError(f"{name} is {value!r}.", do=f"Give {' or '.join(words.values())}." if words else "")


def pair_of(text: str, flag: str, example: str) -> tuple[str, str]:
    """Name and value of a text name=value.

    Raises:
        UserError: it is none.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise UserError(f"{flag} {text!r} is not name=value.", do=f"For example: {flag} {example}")
    return name.strip(), value


def _pairs(flag: str, example: str, read: Any = str) -> BeforeValidator:
    def pairs(value: Any) -> Any:
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            return value
        try:
            return {name: read(text) for name, text in (pair_of(text, flag, example) for text in value)}
        except UserError:
            raise
        except ValueError:
            raise UserError(f"{flag} {value[0]!r} is not name=value.", do=f"For example: {flag} {example}") from None

    return BeforeValidator(pairs)


def names_in(value: Any) -> Any:
    """A text of names with commas, or several, as a tuple of names."""
    texts: Iterable[Any] = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    return tuple(name.strip() for text in texts for name in str(text).split(",") if name.strip())


def _count_or_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"--batch-size {value!r} is neither auto nor a number from 1 on.")
        return int(value)
    return value


# What texts of the command line are read as.
Names = Annotated[tuple[str, ...], BeforeValidator(names_in)]
Thresholds = Annotated[dict[str, float], _pairs("--threshold", "magnitude=50", float)]
Preprocess = Annotated[dict[str, Any], _pairs("--preprocess", "resize=256")]
BatchSize = Annotated[int | str, BeforeValidator(_count_or_auto)]
