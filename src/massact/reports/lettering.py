"""What all figures share: their style, how axes and tokens are lettered, and how an empty panel says why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from massact.reports.spelling import escaped, number, shortened, visible

# The colours of Fig. 4 of Sun 2024: three magnitudes and the median.
TOP_1, TOP_2, TOP_3, MEDIAN = "#4a7fd4", "#3a9d5d", "#8a5bb8", "#7a7a7a"
LIMIT, WARNING, PLAIN = "#b5543c", "#c1272d", "#5b6770"
CLASSES = {"start": "#4a7fd4", "delimiter": "#d98a29", "padding": "#b5543c", "other": "#7a7a7a"}
STACKS = ("#4a7fd4", "#d98a29", "#3a9d5d", "#8a5bb8", "#b5543c", "#7a7a7a")

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

# Beyond this a number is as good as infinite: margins and decades around it must still be floats.
LARGEST = 1e200

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


def lettered(text: Any, limit: int = 60) -> str:
    """Text for a figure: on one line, short, and with every character that no font has as its escape."""
    shown = "".join(c if ord(c) in _drawable() else escaped(c) for c in visible(text))
    return shortened(shown, limit)


def token_label(token: Any, limit: int = 14) -> str:
    """A token for the axis of a prompt, as in Fig. 1: without the space in front."""
    text = token if isinstance(token, str) else ""
    return lettered(text.strip(" "), limit) or (quoted_label(text, limit) if text else "(no token)")


def quoted_label(token: Any, limit: int = 22) -> str:
    """A token in quotes, where ' and' and 'and' must not look the same."""
    return f"\u201c{lettered(token, limit)}\u201d" if isinstance(token, str) and token else "(no token)"


def layer_axis(axes: Axes, n_layers: int) -> None:
    """x = layer 0..L with ticks at 1, L/4, L/2, 3L/4 and L, as in Fig. 4."""
    ticks = (
        sorted({1, *(round(n_layers * q / 4) for q in (1, 2, 3, 4))} - {0}) if n_layers >= 8 else range(n_layers + 1)
    )
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    margin = max(0.5, 0.02 * n_layers)
    axes.set_xlim(-margin, n_layers + margin)
    axes.set_xlabel("Layer")


def linear_axis(axes: Axes, values: np.ndarray) -> None:
    """y from 0, with thousands separators."""
    finite = values[np.abs(values) < LARGEST]
    axes.set_ylim(0, float(finite.max()) * 1.13 if finite.size and finite.max() > 0 else 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))


def log_axis(axes: Axes, values: np.ndarray) -> None:
    """y on a log scale over whole decades, labelled in plain numbers; one decade at least."""
    good = values[(values > 1 / LARGEST) & (values < LARGEST)]
    low, high = (np.floor(np.log10(good.min())), np.ceil(np.log10(good.max()))) if good.size else (0.0, 1.0)
    axes.set_yscale("log")
    axes.set_ylim(10.0**low * 0.8, 10.0 ** max(high, low + 1) * 1.25)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def says(axes: Axes, lines: str) -> None:
    """An empty panel with the reason in its middle."""
    axes.set_axis_off()
    write = getattr(axes, "text2D", axes.text)  # in 3-D axes `text` wants a depth
    write(0.5, 0.5, lines, ha="center", va="center", transform=axes.transAxes, color="#333333", linespacing=1.6)
