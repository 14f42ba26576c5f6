"""How many directions the hidden states take up, with massive tokens and without, and what is not read of them."""

from __future__ import annotations

import math

import pandas as pd

from massact.records.kinds.explanation import Explanation
from massact.reports import panels
from massact.reports.kinds.explanation.attention import RANDOM, lines_of, stacks_of
from massact.reports.panels import Color, Panel, Sheet
from massact.reports.parts import Section, Words, parts_of, table_of
from massact.reports.spelling import listed, number, percent, real, spanned, visible

VALLEY = 0.5  # of the effective rank without massive tokens: below it, with them, there is a valley
SETS = (
    ("all", "all tokens", Color.BLUE, "circle", "solid"),
    ("without", "without massive tokens", Color.ORANGE, "square", "solid"),
    ("centred", "without, and the mean off", Color.GREEN, "triangle-up", "solid"),
)


def by_set(rows: pd.DataFrame, scope: str = "sequence") -> dict[str, pd.DataFrame]:
    """The rows of each set of tokens, by layer."""
    mine = rows[rows["scope"] == scope]
    return {str(name): of.drop_duplicates("layer").set_index("layer") for name, of in mine.groupby("tokens")}


def valley(rows: pd.DataFrame) -> list[int]:
    """Layers at which massive tokens alone make a compression valley.

    Those whose effective rank of all tokens is below half of that without the massive ones, both at the ends of their
    intervals that are nearer to each other, where there are intervals.
    """
    of = by_set(rows)
    if not {"all", "without"} <= set(of):
        return []
    both = of["all"].join(of["without"].add_suffix("_without"), how="inner")
    high = both["effective_rank_high"].astype(float).fillna(both["effective_rank"])
    low = both["effective_rank_low_without"].astype(float).fillna(both["effective_rank_without"])
    return [int(x) for x in both.index[high < VALLEY * low]]


def spectrum_in_words(e: Explanation) -> list[str]:
    """The layer of least effective rank beside the same without massive tokens, p_1 beside its bound, anisotropy."""
    of = by_set(e.spectrum)
    if "all" not in of or of["all"]["effective_rank"].isna().all():
        return []
    if "without" not in of:
        row = of["all"].loc[of["all"]["effective_rank"].astype(float).idxmin()]
        centred = of["centred"]["effective_rank"].get(row.name) if "centred" in of else None
        return [
            f"Spectrum: the effective rank of the hidden states is least at layer {row.name} ({_rank(row)})"
            + (f", with the mean off {number(centred)}" if not math.isnan(real(centred)) else "")
            + "; no token is massive that could be left out."
        ]
    layers = valley(e.spectrum)
    ranks = of["all"]["effective_rank"].astype(float)
    if not layers:
        both = of["all"].join(of["without"].add_suffix("_without"), how="inner")
        ratio = (both["effective_rank_without"] / both["effective_rank"]).astype(float)
        if ratio.isna().all():
            return []
        at = ratio.idxmax()
        return [f"Spectrum: without the massive tokens the effective rank is {number(ratio[at])} times that of all at "
                f"most (layer {at}): no compression valley is theirs."]  # fmt: skip
    at = ranks[layers].idxmin()
    row, without = of["all"].loc[at], of["without"].loc[at]
    said = [
        f"Spectrum: at layer {at} the hidden states of a sequence have an effective rank of {_rank(row)}, without the "
        f"massive tokens {_rank(without)}{_centred(of, at)}: the compression valley of {spanned('layer', layers)} is "
        f"{_tokens(without)}."
    ]
    return said + [x for x in (_bound(e, row, at), _anisotropy(row, without)) if x]


def _rank(row: pd.Series) -> str:
    low, high = row["effective_rank_low"], row["effective_rank_high"]
    around = "" if math.isnan(real(low)) else f" (95% interval over sequences {number(low)} to {number(high)})"
    return f"{number(row['effective_rank'])}{around}"


def _centred(of: dict[str, pd.DataFrame], layer: object) -> str:
    value = of["centred"]["effective_rank"].get(layer) if "centred" in of else None
    return "" if math.isnan(real(value)) else f", and with their mean off {number(value)}"


def _tokens(row: pd.Series) -> str:
    """How many tokens of a sequence were left out."""
    each = row["left_out"] / row["n_sequences"] if row["n_sequences"] else math.nan
    return "one token of each sequence" if each == 1 else f"{number(each)} tokens of a sequence on average"


def _bound(e: Explanation, row: pd.Series, layer: object) -> str:
    if math.isnan(real(row["p1"])) or math.isnan(real(row["bound"])):
        return ""
    null = by_set(e.spectrum, "null")
    drawn = null["all"]["p1"].get(layer) if "all" in null else None
    beside = "" if math.isnan(real(drawn)) else f"; random directions with the same norms have {percent(drawn, 4)}"
    bound = f"{percent(row['bound'], 4)} by the length and direction of one token, (c + alpha) / (c + 1)"
    return f"There p_1, the share of the first singular value, is {percent(row['p1'], 4)}, at least {bound}{beside}."


def _anisotropy(row: pd.Series, without: pd.Series) -> str:
    if math.isnan(real(row["anisotropy"])) or math.isnan(real(without["anisotropy"])):
        return ""
    both = f"{number(row['anisotropy'])} with these tokens and {number(without['anisotropy'])} without them"
    return f"The anisotropy there, the mean cosine of two tokens, is {both}."


def dark_in_words(e: Explanation) -> list[str]:
    """What share of the massive tokens lies where the unembedding reads least, with the final gain and without."""
    rows = e.dark_subspace[e.dark_subspace["centred"]] if len(e.dark_subspace) else e.dark_subspace
    rows = rows[rows["share"].notna()]
    with_gain, without = rows[rows["gain"]], rows[~rows["gain"]]
    main = with_gain if len(with_gain) else without
    found = main[main["vector"] == "findings"]
    if not len(found):
        return []
    row = found.iloc[0]
    told = (
        f"At layer {int(row['layer'])}, {percent(row['share'])} of the squared norm of the tokens with findings lies "
        f"in the weakest {percent(row['chance'])} of the unembedding's directions"
        f"{', taken with the gain of the final norm' if len(with_gain) else ''}{_random(main)}"
    )
    other = without[without["vector"] == "findings"] if len(with_gain) else without.iloc[:0]
    told += f"; without that gain {percent(other['share'].iloc[0])}{_random(without)}." if len(other) else "."
    dims = [f"dim {int(r.dim)} {percent(r.share)}" for r in main[main["vector"] == "dim"].itertuples()]
    return [told, *([f"Of the massive dims alone lies there: {listed(dims, 4)}."] if dims else [])]


def _random(rows: pd.DataFrame) -> str:
    random = rows.loc[rows["vector"] == "random", "share"]
    return f" (random tokens: {percent(random.iloc[0])})" if len(random) else ""


def draw_spectrum(e: Explanation) -> Sheet | None:
    """Effective rank, p_1 with its bound, and anisotropy, along the layers, for three sets of tokens."""
    made = []
    for stack, rows in stacks_of(e.spectrum):
        of, null = by_set(rows), by_set(rows, "null")
        layers = panels.layer_axis(int(rows["layer"].max()))
        known = [(of[name].reset_index(), *look) for name, *look in SETS if name in of]
        lines = {
            column: [line for mine, *look in known for line in lines_of(mine, (column, *look))]
            for column in ("effective_rank", "p1", "anisotropy")
        }
        drawn = null["all"].reset_index() if "all" in null else None
        if drawn is not None:
            lines["effective_rank"] += lines_of(drawn, ("effective_rank", "all, random directions", *RANDOM))
        if "all" in of:
            lines["p1"] += lines_of(of["all"].reset_index(), ("bound", "bound of all", Color.MUTED, "", "dash"))
        ranks = [x for line in lines["effective_rank"] for x in line.y]
        made += [
            Panel(panels.headed(stack, "Effective rank"), lines["effective_rank"], layers, panels.log_axis(ranks),
                  sees="How many directions a sequence takes up: a valley in one curve alone is the massive tokens.",
                  width="third"),
            Panel(panels.headed(stack, "Share of the first singular value"), lines["p1"], layers, panels.share_axis(),
                  sees="How much of a sequence is one direction, and how much one long token makes it at least.",
                  width="third"),
            Panel(panels.headed(stack, "Anisotropy"), lines["anisotropy"], layers,
                  sees="The mean cosine of two tokens: one long token hardly moves it, however much it is of p_1.",
                  width="third"),
        ]  # fmt: skip
    return Sheet(made) or None


def spectra(e: Explanation) -> Section | None:
    """The spectrum of the hidden states, and what the unembedding does not read."""
    if not (len(e.spectrum) or len(e.dark_subspace)):
        return None
    said = []
    for stack in dict.fromkeys([*e.spectrum["stack"], *e.dark_subspace["stack"]]):
        mine = {name: getattr(e, name)[getattr(e, name)["stack"] == stack] for name in ("spectrum", "dark_subspace")}
        one = Explanation(e.info, **mine)
        said += [f"{visible(stack)}: {s}" if stack else s for s in (*spectrum_in_words(one), *dark_in_words(one))]
    return Section("spectrum", "How many directions they take up", parts_of(
        Words(said), *panels.parts_in(draw_spectrum(e)),
        table_of("spectrum", e.spectrum[e.spectrum["scope"] == "sequence"], "Spectrum of each layer", most=400),
        table_of("spectrum", e.spectrum[e.spectrum["scope"] != "sequence"], "Of random directions, and of the corpus",
                 most=400),
        table_of("dark_subspace", e.dark_subspace, "What lies where the unembedding reads least"),
    ))  # fmt: skip
