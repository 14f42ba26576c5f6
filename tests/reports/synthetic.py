"""Scan results made by hand, with every shape that a report must survive."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from synthetic_tables import coordinates_rows, finding, findings_rows, layers_rows, portrait, ranks_rows

from massact.records.answer import Answer, Peak, StackAnswer
from massact.records.clusters import clusters_table
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import RunInfo, jsonable
from massact.records.tables import frame

HOSTILE = ["<script>alert(1)</script>", "[red]", "[/]", "$x$", "\n", "\\n", "\t", "a" * 300, "\U0001f600"]
HOSTILE += [
    "\u0634\u0643\u0631\u0627",
    "\u202egnp.exe",
    "\u4e2d\u6587",
    "\u0301",
    "\x1b[31mred\x1b[0m",
    " and",
    "",
]
HOSTILE += ["%d{}", ":smile:", "\xa0"]
WORDS = ["Summer", " is", " warm", ".", " Winter", " is", " cold", ".", "\n"]
SUN = {
    "name": "sun2024",
    "kind": "element",
    "source": "Sun et al. 2024, arXiv 2402.17762, Section 2",
    "formula": "|h| > magnitude and |h| >= ratio x median|h| of that hidden state (all its tokens and dims)",
    "thresholds": {"magnitude": 100.0, "ratio": 1000.0},
}


def peak_of(row: dict[str, Any]) -> Peak:
    return Peak(**{name: row[name] for name in Peak.__dataclass_fields__})


def info(answer: Answer, name: str = "acme/tiny-llama") -> RunInfo:
    return RunInfo(
        "scan",
        {"seq_len": 128},
        {"id": name, "architecture": "LlamaForCausalLM"},
        {"name": "wikitext-2", "n_sequences": 8},
        dict(SUN),
        jsonable(answer.as_dict()),
        status="ok",
        started="2026-01-01T00:00:00+00:00",
        versions={"massact": "0"},
    )


def massive(
    tokens: tuple[str, str] = ("Summer", "."),
    n_layers: int = 32,
    span: tuple[int, int] = (2, 30),
    stack: str = "",
) -> ScanResult:
    """Like LLaMA2-7B: two dims, the start token and the first delimiter, from layer 2 to layer 30."""
    rows, last = findings_rows(span, tokens, stack), span[1]
    coordinates = coordinates_rows(rows, stack)
    near = [finding(layer, 1, 3, 1512, 160.0, 0.2, tokens[1], "delimiter", stack, 5) for layer in range(10, 17)]
    spikes = [(0, 1415, 470.0), (0, 2533, 800.0), (3, 1415, 1500.0), (3, 2533, 2600.0)]
    return ScanResult(
        info(_massive_answer(rows, coordinates, n_layers, span, stack)),
        frame("layers", layers_rows(n_layers, span, 2600.0, stack, per_layer=32)),
        frame("findings", rows),
        frame("near_misses", near),
        frame("coordinates", coordinates),
        ranks=frame("ranks", ranks_rows(last, 2600.0, stack)),
        portrait=portrait(WORDS, 4096, (1, last, n_layers), spikes),
    )


def _massive_answer(
    rows: list[dict[str, Any]],
    coordinates: list[dict[str, Any]],
    n_layers: int,
    span: tuple[int, int],
    stack: str,
) -> Answer:
    top = peak_of(max(rows, key=lambda row: row["magnitude"]))
    place = (top.layer, top.dim, top.position_class)
    (spread,) = [c["spread"] for c in coordinates if (c["layer"], c["dim"], c["position_class"]) == place]
    tokens = dict.fromkeys((row["token"], row["position_class"]) for row in rows)
    mine = StackAnswer(
        stack=stack,
        site="resid_post",
        n_layers=n_layers,
        n_findings=len(rows),
        layers=list(range(span[0], span[1] + 1)),
        onset=span[0],
        offset=span[1],
        onset_module=f"model.layers.{span[0] - 1}",
        onset_jump=814.2,
        dims=[(2533, 0.5), (1415, 0.5)],
        tokens=[(token, where, 16) for token, where in tokens],
        group="start and first delimiter",
        per_sequence=4.0,
        peak=top,
        spread=spread,
        largest=top,
        largest_magnitude=top,
        headroom={"fp16": (22.6, 30), "bf16": (1.17e35, 30), "fp8_e4m3": (0.155, 30)},
        nonfinite=0,
    )
    side = {"n_findings": 464, "onset": 2, "dims": [2533, 1415], "classes": {"start": 232, "delimiter": 232}}
    side |= {"largest_ratio": 13421.0, "largest_magnitude": 2760.0}
    null = {"n_findings": 0, "largest_ratio": 6.21, "largest_magnitude": 0.0931}
    return Answer(True, [mine], null, {"with": side, "without": side | {"largest_ratio": 13300.0}})


def clustered(result: ScanResult) -> ScanResult:
    """The same with the clusters of its findings and near misses as they are now."""
    n = int(result.layers["n_sequences"].max())
    result.clusters = clusters_table(result.findings, result.near_misses, n_sequences=n)
    return result


def quiet(stack: str = "", near: bool = True) -> ScanResult:
    """Nothing passes; the largest ratio is 44, at layer 3."""
    best = finding(3, 1, 0, 17, 12.32, 0.28, " the", "start", stack)
    strongest = finding(11, 2, 40, 5, -41.0, 1.9, "", "other", stack)
    stack_answer = StackAnswer(
        stack,
        "resid_post",
        12,
        0,
        [],
        None,
        None,
        None,
        None,
        [],
        [],
        "none",
        0.0,
        None,
        None,
        peak_of(best),
        peak_of(strongest),
        {"fp16": (1500.0, 12), "bf16": (1e37, 12), "fp8_e4m3": (10.3, 12)},
        0,
    )
    answer = Answer(
        False,
        [stack_answer],
        {"unavailable": "the model has 6,738,415,616 parameters; ask for it with --null"},
        {"unavailable": "the tokenizer has no BOS token"},
    )
    rows = [best, finding(4, 0, 0, 17, 11.0, 0.28, "\n", "start", stack)]
    return ScanResult(
        info(answer, "acme/quiet"),
        frame("layers", layers_rows(12, None, 0.0, stack)),
        near_misses=frame("near_misses", rows if near else None),
        ranks=frame("ranks", ranks_rows(3, 12.32, stack)),
        portrait=portrait(WORDS, 768, (1, 3, 12), [(0, 17, 12.32)]),
    )


def joined(parts: list[ScanResult], name: str) -> ScanResult:
    """The stacks of several results as those of one."""
    answers = [Answer.from_dict(r.info.answer).stacks[0] for r in parts]
    tables = {}
    for table in ("layers", "findings", "near_misses", "coordinates", "ranks"):
        tables[table] = frame(table, [row for r in parts for row in getattr(r, table).to_dict("records")])
    return clustered(ScanResult(info(Answer(True, answers), name), portrait=parts[0].portrait, **tables))


def two_stacks() -> ScanResult:
    """An encoder with massive activations and a decoder without."""
    return joined([massive(n_layers=12, span=(3, 11), stack="encoder"), quiet("decoder")], "acme/t5")


def streams() -> ScanResult:
    """Four streams, of which the last has nothing, and what is read of them, which has the greatest ratio."""
    parts = [massive(n_layers=12, span=(3, 11), stack=f"stream_{k}") for k in range(3)]
    result = joined([*parts, quiet("stream_3"), massive(n_layers=12, span=(3, 11), stack="collapsed")], "acme/hc")
    result.info.model["streams"] = {"collapsed": [f"stream_{k}" for k in range(4)]}
    for k in range(3):
        result.layers.loc[result.layers["stack"] == f"stream_{k}", "max"] += 100.0 * k
    last = result.info.answer["stacks"][-1]
    last["largest"]["ratio"] = 1 + max(s["largest"]["ratio"] for s in result.info.answer["stacks"])
    return result


def one_layer() -> ScanResult:
    return massive(n_layers=1, span=(1, 1))


def broken() -> ScanResult:
    """NaN and Inf from layer 20 on: the statistics of a model that overflowed."""
    result = massive()
    result.layers.loc[20:, ["top1", "top2", "top3", "ratio", "norm_first"]] = np.nan
    result.layers.loc[20:, "max"] = np.inf
    result.layers.loc[20:, ["headroom_fp16", "headroom_bf16", "headroom_fp8_e4m3"]] = 0.0
    result.layers.loc[25:, "median"] = np.nan
    result.layers.loc[20:, "nonfinite"] = 4096
    answer = Answer.from_dict(result.info.answer)
    stack = replace(answer.stacks[0], onset_jump=float("inf"), spread=float("nan"), nonfinite=13 * 4096)
    result.info.answer = jsonable(replace(answer, stacks=[stack]).as_dict())
    result.coordinates[["std", "spread"]] = np.nan
    result.clusters[["std", "spread"]] = np.nan
    result.info.notes = ["53,248 values are NaN or Inf, first at layer 20: statistics there are over the others."]
    result.portrait["magnitude"][2] = np.nan
    result.portrait["magnitude"][1, 0, 7] = np.inf
    return result


def hostile() -> ScanResult:
    """Every token, name and note is out to break the page."""
    result = massive(("[red]", "\n"))
    n = len(result.findings)
    result.findings["token"] = [HOSTILE[i % len(HOSTILE)] for i in range(n)]
    result.near_misses["token"] = HOSTILE[: len(result.near_misses)]
    result.coordinates["tokens"] = json.dumps(HOSTILE[:8])
    result.coordinates["n_tokens"] = 40
    result.portrait = portrait(
        HOSTILE, 512, (1, 2, 32), [(0, 3, 900.0), (1, 200, 700.0), (3, 200, 800.0), (4, 3, 2000.0)]
    )
    result.info.answer["stacks"][0]["tokens"] = [[t, "other", 3] for t in HOSTILE[:12]]
    result.info.model["id"] = "[bold]evil[/bold]\x1b[31m <b> $x$"
    result.info.notes = ["[link=http://x]note[/link]\nsecond line"]
    return clustered(result)


def empty() -> ScanResult:
    """A scan of zero sequences."""
    nothing = StackAnswer(
        "",
        "resid_post",
        12,
        0,
        [],
        None,
        None,
        None,
        None,
        [],
        [],
        "none",
        0.0,
        None,
        None,
        None,
        None,
        {"fp16": (float("nan"), -1)},
        0,
    )
    return ScanResult(info(Answer(False, [nothing])))


def unanswered() -> ScanResult:
    """The record of a run that failed before it had an answer."""
    return ScanResult(RunInfo("scan", status="failed", started="2026-01-01T00:00:00+00:00", versions={}))


EVERY = {
    "massive": massive,
    "quiet": quiet,
    "no near misses": lambda: quiet(near=False),
    "two stacks": two_stacks,
    "streams": streams,
    "one layer": one_layer,
    "broken": broken,
    "hostile": hostile,
    "empty": empty,
    "unanswered": unanswered,
}
