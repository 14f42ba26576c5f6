"""The story of an explanation and its figures, on tables made by hand: no cause named, nothing unknown told as 0."""

from __future__ import annotations

import copy
import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from synthetic import HOSTILE

from massact.records.kinds.explanation import ExplainInfo, Explanation
from massact.records.tables import columns_of, frame
from massact.reports import draw, show, story_in_words, to_json
from massact.reports.kinds.explanation import READING
from massact.reports.kinds.explanation.words import CAUSES
from massact.reports.render.sheets import figure_of
from massact.reports.spelling import number
from tests.facts import tells

L, H, T = 4, 3, 8
FIGURES = {name: make for name, make in READING.figures.items() if "patch" not in name}
TYPES = ("nop", "between", "broadcast")


def _fill(table: str, **given: object) -> dict[str, object]:
    """A row of a table: the given values, and one that is never 0 for all others."""
    plain = {"float64": 0.37, "int64": 2, "string": "", "bool": False}
    return {column: plain[dtype] for column, (dtype, _) in columns_of(table).items()} | given


def told(stack: str = "", token: str = ".") -> Explanation:
    """Four layers of three heads; blocks 2 to 4 read findings at dims 5 and 9; a learned sink; two writers."""
    heads = [_fill("heads", stack=stack, layer=layer, kind="attention", head=h, module=f"h.{layer}", mass_findings=0.61,
                   sink_rate=0.9, slot_mass=0.013, sink_type=TYPES[h])
             for layer in range(1, L + 1) for h in range(H)]  # fmt: skip
    positions = [_fill("positions", stack=stack, layer=layer, pos=p, alpha=0.9 / (p + 1))
                 for layer in range(1, L + 1) for p in range(T)]  # fmt: skip
    sinks = [_fill("sinks", stack=stack, layer=layer, sequence=s, pos=p, token=token, position_class=c, finding=True)
             for layer in (2, 3) for s in (0, 1) for p, c in ((0, "start"), (3, "delimiter"))]  # fmt: skip
    axes = [_fill("axes", stack=stack, layer=layer, after_onset=layer > 1, concentration=0.61, residual_norm=57.0)
            for layer in range(1, L + 1)]  # fmt: skip
    trajectory = [_fill("trajectory", stack=stack, layer=layer, stage=stage, group=group, cosine=c)
                  for layer in range(1, L + 1) for stage in ("hidden", "normed", "q", "k", "v")
                  for group, c in (("findings", 0.93), ("random", 0.11), ("others", 0.12))]  # fmt: skip
    decomposition = [_fill("decomposition", stack=stack, layer=layer, part=part, constancy=0.031, cosine=0.98)
                     for layer in range(2, L + 1) for part in ("head", "concat", "projected")]  # fmt: skip
    steps = [(0, "embedding", 1.0, ""), (1, "attn_out", 2.0, ""), (1, "mlp_out", 996.0, "up"), (2, "mlp_out", 1.0, ""),
             (4, "mlp_out", -990.0, "down")]  # fmt: skip
    writers = [_fill("writers", stack=stack, layer=layer, dim=d, position_class="start", submodule=name, write=w,
                     share=w / 1000, role=role, module="m")
               for d in (5, 9) for layer, name, w, role in steps]  # fmt: skip
    neurons = [_fill("neurons", stack=stack, layer=1, dim=d, position_class="start", module="h.1.down", neuron=7,
                     expert=-1, rank=rank, share=share, weight=166.0) for d in (5, 9) for rank, share in ((1, 0.97),
                     (2, 0.02))]  # fmt: skip
    norms = [_fill("norm_weights", stack=stack, layer=layer, module="h.n", dim=d, outlier=d == 9, finding=True)
             for layer in range(1, L + 1) for d in (5, 9)]  # fmt: skip
    collapse = [_fill("collapse", stack=stack, layer=layer, norm=norm, dim=5, position_class="start", role=role,
                      removes=layer == 4 and norm == "mlp_in", onehot=0.76, onehot_before=0.98, onehot_low=0.75,
                      onehot_high=0.77, min_cosine=0.9998, bound=0.9993, bound_dim=0.52, min_cosine_random=0.79,
                      entry=2.43, entry_bound=2.45, gain_rank=31.0, n_dims=32, n_checked=4)
                for layer in range(2, L + 1) for norm, role in (("attn_in", "on"), ("mlp_in", "off"))]  # fmt: skip
    ranks = {"all": (1.07, 0.992), "without": (15.6, 0.52), "centred": (68.5, 0.12)}
    spectrum = [
        _fill(
            "spectrum",
            stack=stack,
            layer=layer,
            tokens=tokens,
            scope=scope,
            effective_rank=rank,
            p1=p1,
            effective_rank_low=rank * 0.9,
            effective_rank_high=rank * 1.1,
            bound=0.99,
            anisotropy=0.52,
        )
        for layer in range(1, L + 1)
        for scope in ("sequence", "null")
        for tokens, (rank, p1) in ranks.items()
    ]
    dark = [_fill("dark_subspace", stack=stack, layer=3, vector=v, dim=5 if v == "dim" else -1, gain=gain, centred=True,
                  share=share, chance=0.05) for gain, share in ((True, 0.83), (False, 0.026))
            for v in ("findings", "random", "dim")]  # fmt: skip
    logits = np.where(np.tri(T) > 0, np.linspace(-3, 5, T)[None], np.nan)[None].repeat(3, 0)
    return Explanation(
        ExplainInfo(
            config={"eps": 0.3}, model={"name": "acme/tiny"}, corpus={"name": "text", "n_sequences": 2},
            spectrum={stack: {"bottom": 0.05, "findings": 0.83, "others": 0.041, "layer": 3}},
            closure={stack: 1e-7}, notes=["One note."], versions={}, started="2026-01-01T00:00:00+00:00",
        ),
        **{name: frame(name, rows) for name, rows in {
            "heads": heads, "positions": positions, "sinks": sinks, "axes": axes, "trajectory": trajectory,
            "decomposition": decomposition, "writers": writers, "neurons": neurons, "norm_weights": norms,
            "collapse": collapse, "spectrum": spectrum, "dark_subspace": dark,
        }.items()},
        maps={"logits": logits, "probs": np.nan_to_num(np.exp(logits) / 200), "layers": np.array([1, 2, 3]),
              "tokens": np.array([token] * T), "stack": np.array(stack)},
    )  # fmt: skip


def unknown(e: Explanation) -> Explanation:
    """The same with NaN for every number that can be unavailable."""
    e = copy.deepcopy(e)
    for table in Explanation.TABLES:
        for column, (dtype, _) in columns_of(table).items():
            if dtype == "float64":
                getattr(e, table)[column] = np.nan
    e.info.spectrum, e.info.closure = {"": {"unavailable": "no unembedding"}}, {}
    e.maps = {}
    return e


def two_stacks() -> Explanation:
    a, b = told("encoder"), told("decoder")
    b.info.spectrum = {}
    tables = {t: pd.concat([getattr(a, t), getattr(b, t)], ignore_index=True) for t in Explanation.TABLES}
    return Explanation(a.info, **tables, maps=a.maps)


def dressed(e: Explanation) -> Explanation:
    """The same with a strange token at every place that shows one."""
    e.sinks["token"] = pd.array((HOSTILE * len(e.sinks))[: len(e.sinks)], dtype="string")
    e.maps["tokens"] = np.array(HOSTILE[:T])
    return e


EVERY = {
    "told": told, "two stacks": two_stacks, "unknown": lambda: unknown(told()),
    "two unknown": lambda: unknown(two_stacks()), "empty": lambda: Explanation(ExplainInfo(notes=["Nothing."])),
    **{f"hostile {i}": lambda t=t: told(token=t) for i, t in enumerate(HOSTILE)},
    "hostile": lambda: dressed(told()),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- story
@pytest.mark.parametrize("name", EVERY)
def test_every_word_is_one_line_and_names_no_cause(name: str) -> None:
    said = story_in_words(EVERY[name]())
    assert said.count(CAUSES) == 1
    for sentence in said:
        assert sentence.isprintable() and sentence.strip() == sentence and sentence, sentence
        if sentence != CAUSES:
            words = r"\b(because|causes?|caused|leads? to|due to|therefore|thus|hence|so that)\b"
            assert not re.search(words, sentence, re.IGNORECASE), sentence
        assert sentence.endswith(".")


def zeros(said: list[str]) -> list[str]:
    """Sentences that tell a zero, other than that of 'position 0' and 'alpha_0'."""
    bare = [re.sub(r"[Pp]osition 0|alpha_0", "", s) for s in said]
    return [s for s in bare if re.search(r"(?<![\w.,])-?0(\.0+)?%?(?![\w.,]\d|\w)", s)]


def test_nothing_unavailable_is_told_as_zero() -> None:
    """One column of one table after the other becomes unavailable; no sentence gains a zero."""
    assert zeros(["It is 0%."]) and zeros(["0 of 3 heads"]) and not zeros(["0.3 and 10, position 0"])
    assert zeros(story_in_words(told())) == []
    for table in Explanation.TABLES:
        for column, (dtype, _) in columns_of(table).items():
            if dtype == "float64":
                e = told()
                getattr(e, table)[column] = np.nan
                assert zeros(story_in_words(e)) == [], f"{table}.{column}"
    assert zeros(story_in_words(unknown(told()))) == []


def test_the_numbers_of_the_tables_are_told() -> None:
    text = "\n".join(story_in_words(told()))
    for part in (
        "get 61% of it", "layers 2-4", "57 times", "12 of 12 heads",
        "'.' (delimiter, 4)", "hidden state 0.93 (0.12)", "by 3.1% of its mean", "Learned sinks take 1.3%",
        "Dim 5 (start, 2 tokens) is written by mlp_out of layer 1 (+996, 99.6% of the peak)",
        "taken away by mlp_out of layer 4 (-990, -99% of the peak)",
        "one weight, [9, 7] = 166", "carries 97% of it", "leads 2 coordinates",
        "dim 9; of the dims of the findings, dim 9",
        "At layer 3, 83% of the mean state", "weakest 5%", "others: 4.1%", "Note: One note.",
        "4 no-op", "4 between", "4 broadcast", "37% of it to its own key",
        "holds 76% of the squared norm", "75% to 77%; 98% before", "below 0.9998 (random tokens: 0.79)",
        "0.9993 by the mean direction", "0.52 by the dim alone", "off in layers 2-4 (|gain| of rank 31 of 32)",
        "takes it away in layer 4", "99.2% of sqrt(D) |g|",
        "effective rank of 1.07", "tokens 15.6", "mean off 68.5", "valley of layers 1-4 is one token", "at least 99%",
        "norms have 99.2%", "0.52 with these tokens and 0.52 without",
        "83% of the squared norm", "without that gain 2.6%",
    ):  # fmt: skip
        assert part in text, part
    assert story_in_words(told())[-1] == CAUSES  # what is said last, also of a run with notes
    sinks = text.split("Secondary sinks")[1].splitlines()[0]
    assert "): 4 at layers 2-3" in sinks and "100%" in sinks  # two tokens with sinks behind position 0, in two layers


def test_each_stack_tells_its_own() -> None:
    said = story_in_words(two_stacks())
    mine = {name: [s for s in said if s.startswith(f"{name}: ")] for name in ("encoder", "decoder")}
    assert len(mine["encoder"]) == len(mine["decoder"]) + 1, "only the encoder has a spectrum"
    assert sum("mean state" in s for s in said) == 1


def test_a_spectrum_is_told_once_and_for_its_stack() -> None:
    """A stack without rows of norms does not borrow the spectrum of another one."""
    e = two_stacks()
    e.norm_weights = e.norm_weights[e.norm_weights["stack"] == "decoder"]
    e.info.spectrum = {"decoder": e.info.spectrum["encoder"]}
    told_by = [s.split(":")[0] for s in story_in_words(e) if "mean state" in s]
    assert told_by == ["decoder"]


def test_experts_and_leading_neurons() -> None:
    e = told()
    e.neurons.loc[e.neurons["dim"] == 5, "expert"] = 3
    e.neurons.loc[e.neurons["dim"] == 9, "share"] = 0.21
    said = story_in_words(e)
    of_5, of_9 = (said[i + 1] for i, s in enumerate(said) if s.startswith("Dim "))
    assert tells([of_5], "experts", 3, "h.1.down", "97%") and tells([of_9], "neuron", 7, "21%")
    assert not tells(said, "super weight")


def test_a_coordinate_without_a_step() -> None:
    e = told()
    e.writers["role"] = ""
    for dim in (5, 9):
        (told_of,) = tells(story_in_words(e), f"Dim {dim}")
        assert told_of.count("no single step") == 2 and "mlp_out" not in told_of  # neither up nor down


def test_no_sink_is_said_only_where_all_keys_were_looked_at() -> None:
    e = told()
    e.sinks = frame("sinks")
    assert tells(story_in_words(e), "No head", "sink", "position")
    e.heads["sink_rate"] = np.nan
    assert not any("position" in s and "sink" in s for s in story_in_words(e))


@pytest.mark.parametrize("name", EVERY)
def test_terminal_and_json_survive(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    e = EVERY[name]()
    show(e, Console(width=80))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and tells([printed], CAUSES)
    assert to_json(e).startswith("{")


# ------------------------------------------------------------------------------------------------------ figures
def check(paths: list[Path], names: list[str]) -> None:
    """These figures, each as PNG and SVG, valid and not blank."""
    assert [p.name for p in paths] == [f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    assert sorted(paths) == sorted(paths[0].parent.iterdir())
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
            continue
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.std() > 1 and (pixels < 128).sum() > 100, f"{path.name} is blank"


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(draw(dressed(told()), tmp_path, ("png", "svg")), list(FIGURES))


@pytest.mark.parametrize("name", ["two stacks", "unknown", "two unknown", "empty"])
def test_figures_of_odd_tables_do_not_fail(name: str) -> None:
    """Made but not written: nothing to show gives no figure, strange tokens give one."""
    e = EVERY[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheets = {n: make(e) for n, make in FIGURES.items()}
        made = {n: sheet and figure_of(sheet) for n, sheet in sheets.items()}
    if name == "empty":
        assert not any(made.values())
    elif "unknown" in name:
        assert made["attention_maps"] is None and made["attention_bias"] is None
    else:
        assert all(made.values())


def test_figures_where_everything_is_unknown_can_be_written(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = draw(unknown(told()), tmp_path, ("png", "svg"))
    assert all(p.stat().st_size > 1000 for p in paths)


def test_no_line_is_drawn_for_what_is_unknown() -> None:
    e = told()
    assert len(figure_of(FIGURES["attention_axes"](e)).axes[0].lines) == 5
    uniform = ["concentration_uniform", "concentration_first_uniform"]
    e.axes[["concentration", "concentration_null", *uniform]] = np.nan
    assert len(figure_of(FIGURES["attention_axes"](e)).axes[0].lines) == 1


def test_one_layer_is_no_layers_and_what_is_unavailable_is_a_dash() -> None:
    e = told()
    e.axes["after_onset"] = e.axes["layer"] == 3
    reading, others = re.search(r"\((layers? [^)]*)\).*\((layers? [^)]*)\)", story_in_words(e)[0]).groups()
    assert (reading, others) == ("layer 3", "layers 1-2, 4")
    e.axes["concentration"] = np.nan
    console = Console(file=io.StringIO(), width=120)
    show(e, console)
    assert "NaN" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_layers_are_whole_and_an_empty_panel_says_so() -> None:
    e = told()
    e.axes["residual_norm"] = np.nan
    figure = figure_of(FIGURES["attention_axes"](e))
    figure.canvas.draw()
    concentration, _, residual = figure.axes
    assert all(x == round(x) for x in concentration.get_xticks())
    assert "unavailable" in [t.get_text() for t in residual.texts] and not residual.axison


def test_of_two_coordinates_as_frequent_the_larger_is_told_first() -> None:
    e = told()
    e.writers.loc[e.writers["dim"] == 9, "after"] = -4000.0
    said = [s for s in story_in_words(e) if s.startswith("Dim ")]
    assert [s.split()[1] for s in said] == ["9", "5"]
    e.writers.loc[e.writers["dim"] == 5, "n_tokens"] = 3
    said = [s for s in story_in_words(e) if s.startswith("Dim ")]
    assert [s.split()[1] for s in said] == ["5", "9"]


def test_one_of_two_numbers_is_unknown() -> None:
    """Values overflow, a norm gives zeros: the sentence of the other number is whole, and no NaN is said."""
    e = told()
    e.axes["value_drain"] = np.nan
    assert tells(story_in_words(e), "hidden states", f"{number(e.axes['residual_norm'].iloc[0])} times")
    assert not tells(story_in_words(e), "value vectors")
    e.trajectory.loc[e.trajectory.stage == "normed", ["sparsity", "massive_share", "cosine"]] = np.nan
    said = " ".join(story_in_words(e))
    assert "sparsity is undefined" in said and "NaN" not in said and "nan" not in said
