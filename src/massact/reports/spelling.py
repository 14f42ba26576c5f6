"""How numbers, lists and tokens are spelled, in sentences and in tables."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from massact.records.sites import ranges as ranges  # said by records too

# Escapes that everybody who met a programming language can read.
NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# What must not reach a page as it is: controls, formats (among them the marks that turn text around),
# surrogates, private and unassigned characters, line and paragraph separators.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def real(value: Any) -> float:
    """A float of what a table or run.json holds there; NaN for what is missing or no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


ROUNDING = 1e-6  # relative; what float32 arithmetic leaves of a one


def number(value: Any, digits: int = 3, table: bool = False, whole: float = 1.0) -> str:
    """Spell a number with thousands separators and a given number of significant digits.

    Args:
        value: a number, or the words that JSON has for one ("nan", "inf"), or None.
        digits: significant digits.
        table: keep all digits before the point, because tables are copied from, and zeros at the end, because
            their columns are read from top to bottom.
        whole: a value that is not this, but would be rounded to it, gets more digits: a cosine of 0.9996 is not 1.
    """
    if value is None:
        return "n/a"
    x = real(value)
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    if x == 0:
        return "0"
    while digits < 8 and ROUNDING < abs(abs(x) / whole - 1) < 0.5 and round(abs(x), _decimals(x, digits)) == whole:
        digits += 1
    if not 1e-3 <= abs(x) < 1e7:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa if table else _trim(mantissa)}e{int(exponent)}"
    decimals = _decimals(x, digits)
    if table:
        return f"{x:,.{max(decimals, 0)}f}"
    return _trim(f"{round(x, decimals):,.{max(decimals, 0)}f}")


def _decimals(x: float, digits: int) -> int:
    """How many decimals of x its first significant digits are."""
    return digits - 1 - math.floor(math.log10(abs(x)))


def _trim(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def cell(value: Any) -> str:
    """A number for a table: four significant digits, and all of those before the point."""
    return number(value, 4, table=True)


def or_dash(value: Any) -> str:
    """A number for a table of what may be unavailable: '-' where it is."""
    return "-" if math.isnan(real(value)) else cell(value)


def signed(value: Any) -> str:
    """A number of which the sign matters."""
    return ("+" if real(value) > 0 else "") + number(value)


def percent(share: Any, digits: int = 3) -> str:
    """A share as a percentage."""
    x = real(share)
    return "unavailable" if math.isnan(x) else f"{number(100 * x, digits, whole=100.0)}%"


def portion(shares: Sequence[Any], whole: str) -> str:
    """'93.2% of the peak', '80% to 93.2% of the peak'; what is more than all of it is no share: '2.47 times the peak'.

    Args:
        shares: one number, or several of which the least and the greatest are told.
        whole: what they are of.
    """
    known = [x for x in map(real, shares) if not math.isnan(x)]
    if not known:
        return f"an unavailable part of {whole}"
    most = max(map(abs, known)) > 1 + 5e-4  # what is rounded to 100 % is all of it
    return f"{between(known, number if most else percent)} {'times' if most else 'of'} {whole}"


def between(values: Sequence[float], spell: Callable[[float], str]) -> str:
    """'3', or of several numbers the least and the greatest: '3 to 5'; of NaN alone 'unavailable'."""
    known = [x for x in values if not math.isnan(real(x))]
    if not known:
        return "unavailable"
    return " to ".join(dict.fromkeys([spell(min(known, key=abs)), spell(max(known, key=abs))]))


def counted(n: int, noun: str, nouns: str = "") -> str:
    """'1 layer', '2 layers', '12,000 findings'."""
    return f"{n:,} {noun if n == 1 else nouns or noun + 's'}"


def listed(items: Sequence[str], most: int | None = None) -> str:
    """'a', 'a and b', 'a, b and c'; 'none' of nothing, so that no sentence loses its object.

    Args:
        most: how many are named; of more the rest is counted: 'a, b and 3 more'.
    """
    shown = list(items[:most])
    if len(items) > len(shown):
        shown.append(f"{len(items) - len(shown):,} more")
    return ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0] if shown else "none"


def numbered(noun: str, numbers: Iterable[int], most: int = 6, also: int = 0) -> str:
    """'no dims', 'dim 3', 'dims 3 and 7', 'dims 3, 7 and 12 more', in the order given.

    Args:
        most: how many are named.
        also: how many more there are than are given.
    """
    names = [str(int(n)) for n in numbers]
    total = len(names) + also
    if not total:
        return f"no {noun}s"
    named = names[:most] + [f"{total - len(names[:most]):,} more"] * (total > len(names[:most]))
    return f"{noun}{'s' * (total > 1)} {listed(named)}"


def noted(notes: Iterable[Any]) -> list[str]:
    """Notes of a run as sentences."""
    return [f"Note: {visible(str(note))}" for note in notes]


def spanned(noun: str, numbers: Iterable[int]) -> str:
    """'no layers', 'layer 3', 'layers 2-4, 6' of whole numbers in any order."""
    found = set(numbers)
    return f"{noun}{'s' * (len(found) > 1)} {ranges(found)}" if found else f"no {noun}s"


def visible(text: Any, encoding: str = "utf-8") -> str:
    """Text on one line with everything that does not show itself escaped; `\\n` for a newline.

    Args:
        text: what a tokenizer, a user or a file gave us; a missing value is empty.
        encoding: characters that it lacks are escaped too, so that printing never fails.
    """
    if not isinstance(text, str):
        return ""
    shown = []
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if character in NAMED:
            shown.append(NAMED[character])
        elif character == "\\" and text[place + 1 : place + 2] in ("n", "r", "t", "\\"):
            shown.append("\\\\")  # the two characters \n are another token than a newline; \xe2 is a token's byte
        elif category in HIDDEN or (category == "Zs" and character != " ") or (category[0] == "M" and place == 0):
            shown.append(escaped(character))
        else:
            shown.append(character)
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def escaped(character: str) -> str:
    """`\\x1b`, `\\u4e2d`, `\\U0001f600`: Python's own spelling."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the cut shown by three dots."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(token: Any, limit: int = 24) -> str:
    """A token in quotes, so that its spaces show; 'no token' where the input has none (images)."""
    if not isinstance(token, str) or token == "":
        return "no token"
    mark = '"' if "'" in token and '"' not in token else "'"
    return f"{mark}{shortened(visible(token), limit)}{mark}"


def token_list(text: Any) -> list[str]:
    """The tokens of a coordinate, which its table holds as a JSON list."""
    try:
        tokens = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return [text] if isinstance(text, str) and text else []
    return [t for t in tokens if isinstance(t, str)] if isinstance(tokens, list) else [str(tokens)]
