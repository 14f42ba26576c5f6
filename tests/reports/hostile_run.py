"""A run directory with everything in it, of 32 layers, whose tokens and names are out to break a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import synthetic
import synthetic_tables

from massact.records.kinds.classics import Classics, ClassicsInfo
from massact.records.kinds.explanation import ExplainInfo, Explanation
from massact.records.kinds.intervention import InterveneInfo, Intervention
from massact.records.tables import ADDED_TO_EFFECTS, columns_of, frame

EVIL = [
    *synthetic.HOSTILE,
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "<a href='https://example.org'>x</a>",
    "%{x}<br><b>bold</b>",
    '"><svg onload=alert(1)>',
    "&lt;b&gt;&amp;",
    "]]>",
    "x" * 10_000,
    "\u0634\u0643\u0631\u0627 <b>",
    "\U0001f469\u200d\U0001f680",
    "\x00\x07\x7f",
    "`|`*_#$\\{}~^%&",
    "=1+1",
    "--s1",
]


def explanation(tokens: list[str], n_layers: int = 32, n_heads: int = 32, seed: int = 0) -> Explanation:
    """Random numbers in every column, and the tokens where there are tokens."""
    rng = np.random.default_rng(seed)

    def made(name: str, n: int, **given: Any) -> pd.DataFrame:
        columns: dict[str, Any] = {}
        for column, (dtype, _) in columns_of(name).items():
            columns[column] = {
                "float64": lambda: rng.lognormal(size=n), "int64": lambda: rng.integers(0, 50, n),
                "bool": lambda: rng.random(n) < 0.5, "string": lambda: [""] * n,
            }[dtype]()  # fmt: skip
        return frame(name, columns | given)

    layers = np.arange(1, n_layers + 1)
    n, heads = len(tokens), np.tile(np.arange(n_heads), n_layers)
    tables = {name: made(name, 0) for name in Explanation.TABLES}
    tables["axes"] = made("axes", n_layers, layer=layers, after_onset=layers > 2)
    tables["heads"] = made("heads", n_layers * n_heads, layer=np.repeat(layers, n_heads), head=heads,
                           kind=["attention"] * n_layers * n_heads, slot_mass=np.full(n_layers * n_heads, np.nan),
                           mass_findings=rng.random(n_layers * n_heads))  # fmt: skip
    tables["sinks"] = made("sinks", n, token=tokens, position_class=["other"] * n)
    tables["positions"] = made("positions", 300)
    tables["decomposition"] = made("decomposition", n_layers, layer=layers, part=["projected"] * n_layers)
    tables["writers"] = made("writers", 2 * n_layers, layer=np.repeat(layers, 2), dim=[5] * 2 * n_layers,
                             submodule=["attn_out", "mlp_out"] * n_layers)  # fmt: skip
    maps = {"logits": rng.normal(size=(2, n, n)), "probs": rng.random((2, n, n)), "layers": np.array([1, 3]),
            "tokens": np.array([t.replace("\x00", "\x01") for t in tokens]), "stack": np.array("")}  # fmt: skip
    return Explanation(ExplainInfo(config={"eps": 0.3}, notes=["<i>note</i> </script>"]), **tables, maps=maps)


def intervention(names: list[str]) -> Intervention:
    """Edits of these names: harmful, harmless, infinite, unknown."""
    n = len(names)
    kinds = [(10.0, 15.0, 4.0, 6.0), (10.0, 10.001, -0.01, 0.01), (10.0, np.inf, np.inf, np.inf),
             (10.0, np.nan, np.nan, np.nan)]  # fmt: skip
    rows = [kinds[i % 4] for i in range(n)]
    columns = {
        "edit": names, "stack": [""] * n, "layer": [2] * n, "metric": ["perplexity"] * n, "group": ["all"] * n,
        "baseline": [r[0] for r in rows], "edited": [r[1] for r in rows], "delta": [r[1] - r[0] for r in rows],
        "ci_low": [r[2] for r in rows], "ci_high": [r[3] for r in rows], "n_calls": [8] * n, "n_elements": [8] * n,
        "n_sequences": [8] * n, "n_targets": [64.0] * n,
    }  # fmt: skip
    info = InterveneInfo(target={"site": "2.resid_post", "dims": [2533, 1415]}, estimated_on="sequences 0 to 3")
    blank = {c: [v] * n for c, v in ADDED_TO_EFFECTS.items()}
    return Intervention(info, frame("effects", blank | columns))


def write(path: Path) -> Path:
    """The run directory."""
    result = synthetic.massive()
    n = len(result.findings)
    result.findings["token"] = [EVIL[i % len(EVIL)] for i in range(n)]
    result.near_misses["token"] = EVIL[: len(result.near_misses)]
    result.coordinates["tokens"] = json.dumps(EVIL[:24])
    tokens = [t.replace("\x00", "\x01") for t in EVIL]
    result.portrait = synthetic.portrait(tokens, 4096, (1, 2, 32), [(0, 3, 900.0), (1, 200, 700.0)])
    result.strip = synthetic_tables.strip(tokens, 33, 4096)
    result.info.answer["stacks"][0]["tokens"] = [[t, "other", 3] for t in EVIL[:12]]
    result.info.model |= {"id": "<b>evil</b></title><script>alert(1)</script>", "name": "</title><script>alert(1)//"}
    result.info.corpus["name"] = "</script><img src=x>"
    result.info.notes = ["<script>alert('note')</script>\nhttps://example.org/x.js"]
    result.save(path)
    explanation(EVIL).save(path)
    intervention(EVIL[:20]).save(path)
    info = ClassicsInfo(outcomes={"<u>x</u>": {"unavailable": "</script>no"}}, sources={"<u>x</u>": "<s>y</s>"})
    Classics(info).save(path)
    return path
