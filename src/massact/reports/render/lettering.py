"""What all files of figures share: their style, how texts are lettered, and how an empty panel says why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.ft2font import FT2Font

from massact.reports.spelling import escaped, shortened

# Fonts that have what DejaVu Sans, which comes with matplotlib, lacks; used where they are installed.
FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)

STYLE: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8.5, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "legend.frameon": False, "lines.linewidth": 1.2, "lines.markersize": 3.5, "axes.titlelocation": "left",
    "text.parse_math": False,  # a token '$x$' is two dollars and an x
    "svg.hashsalt": "massact", "svg.fonttype": "path", "pdf.fonttype": 42,
}  # fmt: skip

# The groups of matplotlib's settings that change how a figure looks.
LOOKS = frozenset(
    "agg axes axes3d date figure font grid hatch legend lines markers mathtext patch path polaraxes savefig "
    "svg text xaxis xtick yaxis ytick".split()
)


@contextmanager
def style() -> Iterator[None]:
    """Draw in our style whatever the user's matplotlibrc says, and leave their settings as they were."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
        # A label of very wide characters may leave no room; the figure is drawn all the same.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if k.split(".")[0] in LOOKS}
        matplotlib.rcParams.update(defaults | STYLE | {"font.family": ["DejaVu Sans", *_installed()]})
        yield


@cache
def _installed() -> tuple[str, ...]:
    present = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in FALLBACKS if name in present)


@cache
def _drawable() -> frozenset[int]:
    """The characters that our fonts can draw."""
    known: set[int] = set()
    for name in ("DejaVu Sans", *_installed()):
        known |= FT2Font(font_manager.findfont(name)).get_charmap().keys()
    return frozenset(known)


def drawable(text: str, limit: int = 60) -> str:
    """Shown text for a figure: short, and with every character that no font has as its escape."""
    return shortened("".join(c if ord(c) in _drawable() else escaped(c) for c in text), limit)


def says(axes: Axes, lines: str) -> None:
    """An empty panel with the reason in its middle."""
    axes.set_axis_off()
    write = getattr(axes, "text2D", axes.text)  # in 3-D axes `text` wants a depth
    write(0.5, 0.5, lines, ha="center", va="center", transform=axes.transAxes, color="#333333", linespacing=1.6)
