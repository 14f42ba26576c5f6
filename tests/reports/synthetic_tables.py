"""Rows of the tables of synthetic scan results."""

from __future__ import annotations

import json

import numpy as np

from massact.records.tables import columns_of

RANKS = {
    "top 1": 1.0,
    "top 2": 0.59,
    "top 3": 0.306,
    "top 4": 0.182,
    "top 5": 0.06,
    "top 10": 0.0174,
    "top 100": 0.004,
    "top 1%": 0.00042,
    "top 10%": 0.00023,
    "median": 0.00008,
}


def layers_rows(
    n_layers: int,
    span: tuple[int, int] | None,
    height: float,
    stack: str = "",
    n_sequences: int = 8,
    per_layer: int = 16,
) -> list[dict[str, object]]:
    """Rows of `layers` for a stack whose |h| is `height` inside span and small elsewhere."""
    rows = []
    for layer in range(n_layers + 1):
        massive = span is not None and span[0] <= layer <= span[1]
        top = height * (1 + 0.002 * layer) if massive else 1.5 + 0.9 * layer
        median = 0.02 + 0.012 * layer
        row: dict[str, object] = {name: 1.0 for name in columns_of("layers")}
        row |= {
            "stack": stack,
            "site": "resid_post",
            "layer": layer,
            "module": f"{stack or 'model'}.layers.{layer - 1}" if layer else "input of layers.0",
            "mixer": "attention" if layer else "",
            "top1": top,
            "top2": top * 0.59,
            "top3": top * 0.306,
            "median": median,
            "ratio": top / median,
            "ratio_max": top / median * 1.1,
            "max": top * 1.05,
            "norm_first": top * 1.2,
            "norm_rest": 2.0 + layer,
            "norm_max": top * 1.3,
            "headroom_fp16": 65504 / (top * 1.05),
            "headroom_bf16": 3.39e38 / (top * 1.05),
            "headroom_fp8_e4m3": 448 / (top * 1.05),
            "nonfinite": 0,
            "n_findings": per_layer if massive else 0,
            "n_sequences": n_sequences,
        }
        rows.append(row)
    return rows


def finding(
    layer: int,
    sequence: int,
    pos: int,
    dim: int,
    value: float,
    median: float,
    token: str,
    position_class: str,
    stack: str = "",
    rank: int = 1,
) -> dict[str, object]:
    return {
        "stack": stack,
        "site": "resid_post",
        "sequence": sequence,
        "layer": layer,
        "pos": pos,
        "dim": dim,
        "value": value,
        "magnitude": abs(value),
        "median": median,
        "ratio": abs(value) / median,
        "token_id": 5,
        "token": token,
        "position_class": position_class,
        "modality": "text",
        "origin": "",
        "median_so_far": float("nan"),
        "criterion": "sun2024",
        "rank": rank,
    }


def ranks_rows(layer: int, height: float, stack: str = "") -> list[dict[str, object]]:
    rows = []
    for source in ("prompt", "corpus"):
        for i, (name, share) in enumerate(RANKS.items()):
            value = height * share * (-1) ** i
            rows.append(
                {
                    "stack": stack,
                    "site": "resid_post",
                    "layer": layer,
                    "source": source,
                    "rank": name,
                    "magnitude": abs(value),
                    "value_mean": value,
                    "value_std": 0.0 if source == "prompt" else abs(value) * 0.055,
                    "same_dim": 1.0 if i < 4 else 0.25,
                    "n_sequences": 1 if source == "prompt" else 8,
                }
            )
    return rows


def findings_rows(span: tuple[int, int], tokens: tuple[str, str], stack: str) -> list[dict[str, object]]:
    """Four findings per layer and sequence: two dims at the start token and at the first delimiter."""
    places = (
        (0, 1415, -500.0, 0.0, tokens[0], "start"),
        (0, 2533, 812.0, 0.0, tokens[0], "start"),
        (3, 1415, -1500.0, 0.0, tokens[1], "delimiter"),
        (3, 2533, 2540.0, 20.0, tokens[1], "delimiter"),
    )
    return [
        finding(layer, s, pos, dim, (height + slope * s) * (1 + 0.001 * layer), 0.38, token, where, stack)
        for layer in range(span[0], span[1] + 1)
        for s in range(8)
        for pos, dim, height, slope, token, where in places
    ]


def coordinates_rows(findings: list[dict[str, object]], stack: str) -> list[dict[str, object]]:
    """What the findings make of `coordinates`, by plain NumPy."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in findings:
        groups.setdefault((row["layer"], row["dim"], row["position_class"]), []).append(row)
    rows = []
    for (layer, dim, where), members in sorted(groups.items(), key=lambda item: str(item[0])):
        values = [row["value"] for row in members]
        mean, std = float(np.mean(values)), float(np.std(values))
        row = {"stack": stack, "site": "resid_post", "layer": layer, "dim": dim, "position_class": where}
        row |= {"count": len(values), "share": 1.0, "mean": mean, "std": std, "spread": std / abs(mean)}
        rows.append(row | {"n_tokens": 1, "tokens": json.dumps([members[0]["token"]])})
    return rows


def strip(tokens: list[str], n_layers: int, n_dims: int, massive: float = 9000.0) -> dict[str, np.ndarray]:
    """Two texts, the second the first two tokens of the first; a spike on the first token of each from layer 2 on."""
    rng, both = np.random.default_rng(0), [*tokens, *tokens[:2]]
    shape = (2, n_layers, len(both))
    value, dim = rng.normal(size=shape).astype(np.float32), rng.integers(0, n_dims, shape).astype(np.int32)
    value[0, 2:, [0, len(tokens)]], dim[0, 2:, [0, len(tokens)]] = -massive, 7
    value[1, 0], dim[1, 0] = np.nan, -1
    return {
        "value": value,
        "dim": dim,
        "median": np.full((*shape[:2], 2), 0.6, np.float32),
        "tokens": np.array(both, dtype=str),
        "position": np.array([*range(len(tokens)), 0, 1]),
        "text": np.array([0] * len(tokens) + [1, 1]),
        "points": np.array(["resid_post", "mlp_out"]),
        "layers": np.arange(n_layers),
        "stack": np.array(""),
    }


def portrait(
    tokens: list[str], n_dims: int, layers: tuple[int, ...], spikes: list[tuple[int, int, float]]
) -> dict[str, np.ndarray]:
    """|h| of a prompt: noise, and from the second layer on the spikes (pos, dim, height)."""
    magnitude = np.abs(np.random.default_rng(0).standard_normal((len(layers), len(tokens), n_dims))) * 0.3
    for pos, dim, height in spikes:
        magnitude[1:2, pos, dim] = height
    return {
        "magnitude": magnitude.astype(np.float32),
        "layers": np.array(layers),
        "tokens": np.array(tokens, dtype=str),
        "stack": np.array(""),
        "site": np.array("resid_post"),
    }
