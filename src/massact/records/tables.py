"""The tables of a run directory: their columns, types and meaning, and safe reading and writing.

Every file is written under a temporary name and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from massact.records.disk import write_atomic
from massact.records.errors import UserError
from massact.records.given_files import refuse_special
from massact.records.lab_tables import LAB_TABLES
from massact.records.patch_tables import PATCH_TABLES
from massact.records.shape_tables import SHAPE_TABLES

# name of the table -> {column: (dtype, meaning)}. The order is the order in the file.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "layers": {
        "stack": ("string", "name of the stack of blocks; empty for a model with one"),
        "site": ("string", "point of the hidden state: resid_post, or resid_post_prenorm in post-LN models"),
        "layer": ("int64", "1..L after block l; 0 the embedding output"),
        "module": ("string", "dotted path of the block"),
        "top1": ("float64", "greatest |h|, mean over sequences"),
        "top2": ("float64", "second greatest |h|, mean over sequences"),
        "top3": ("float64", "third greatest |h|, mean over sequences"),
        "median": ("float64", "median |h| of a sequence's hidden state, mean over sequences"),
        "ratio": ("float64", "top1 / median of each sequence, mean over sequences"),
        "ratio_max": ("float64", "greatest top1 / median of any sequence"),
        "max": ("float64", "greatest |h| of all sequences"),
        "mean": ("float64", "mean of h"),
        "mean_abs": ("float64", "mean of |h|"),
        "std": ("float64", "standard deviation of h, mean over sequences"),
        "rms": ("float64", "root mean square of h, mean over sequences"),
        "kurtosis": ("float64", "fourth standardised moment of h (Gaussian: 3), mean over sequences"),
        "rms_kurtosis": ("float64", "kurtosis of the per-dim RMS, 1 (even) to D (one dim): He 2024"),
        "token_max_median": ("float64", "mean over tokens of max|h| over the state median (He 2024: the token median)"),
        "token_kurtosis": ("float64", "mean over tokens of relu(mean(x^4) / std(x)^4 - 3): OSP 2025"),
        "norm_first": ("float64", "mean L2 norm of the token at position 0"),
        "norm_rest": ("float64", "mean L2 norm of all other tokens"),
        "norm_max": ("float64", "greatest L2 norm of any token"),
        "headroom_fp16": ("float64", "65,504 / max: below 1 the layer overflows in fp16"),
        "headroom_bf16": ("float64", "3.39e38 / max"),
        "headroom_fp8_e4m3": ("float64", "448 / max: below 1 it needs a scale in fp8-e4m3"),
        "nonfinite": ("int64", "count of NaN and Inf values"),
        "n_findings": ("int64", "findings at this layer, all sequences"),
        "n_sequences": ("int64", "sequences measured"),
    },
    "findings": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "sequence": ("int64", "index in the corpus"),
        "layer": ("int64", "layer"),
        "pos": ("int64", "token position, 0-based"),
        "dim": ("int64", "coordinate of the residual stream, 0-based; -1 for criteria of whole tokens"),
        "value": ("float64", "signed value"),
        "magnitude": ("float64", "|value|; for criteria of whole tokens their L2 norm"),
        "median": ("float64", "median |h| of that sequence's hidden state"),
        "ratio": ("float64", "magnitude / median"),
        "token_id": ("int64", "-1 where there are no tokens"),
        "token": ("string", "readable token"),
        "position_class": ("string", "start, delimiter, padding (a frame behind the end of a recording) or other"),
        "modality": ("string", "of the token: text, image, video or audio; empty where it is not known"),
        "criterion": ("string", "name of the rule"),
        "rank": ("int64", "rank of the magnitude in that hidden state, 1 is the greatest"),
    },
    "coordinates": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer"),
        "dim": ("int64", "coordinate"),
        "position_class": ("string", "start, delimiter, padding or other"),
        "count": ("int64", "findings"),
        "share": ("float64", "share of sequences with at least one; NaN for criteria of whole dims or layers"),
        "mean": ("float64", "mean signed value: the constant of set-to-mean"),
        "std": ("float64", "its standard deviation over findings"),
        "spread": ("float64", "std / |mean|: how far from constant"),
        "n_tokens": ("int64", "different token strings"),
        "tokens": ("string", "most frequent token strings, as a JSON list"),
    },
    "dims": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer"),
        "dim": ("int64", "coordinate"),
        "max": ("float64", "greatest |h|"),
        "mean_abs": ("float64", "mean |h|"),
        "mean": ("float64", "mean h"),
        "std": ("float64", "standard deviation of h"),
        "hit_rate": ("float64", "share of tokens with |h| >= 6 (outlier features, Dettmers 2022)"),
    },
    "ranks": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer"),
        "source": ("string", "prompt (Table 1: one hidden state) or corpus (Table 2: mean and std over sequences)"),
        "rank": ("string", "top 1, top 2, ..., top 1%, top 10%, median"),
        "magnitude": ("float64", "|h| at that rank, mean over sequences"),
        "value_mean": ("float64", "signed value at that rank, mean over sequences"),
        "value_std": ("float64", "its standard deviation over sequences"),
        "same_dim": ("float64", "share of sequences in which it sits at the most frequent dim"),
        "n_sequences": ("int64", "sequences it is over"),
    },
}  # fmt: skip
TABLES["near_misses"] = TABLES["findings"]

_LAYER = {"stack": ("string", "name of the stack"), "layer": ("int64", "layer")}

# What `explain` adds; NaN where a statistic is not available in this model, never zero.
TABLES |= {
    "heads": {
        **_LAYER,
        "kind": ("string", "attention, or cross_attention (whose keys are another sequence)"),
        "head": ("int64", "0-based"),
        "module": ("string", "dotted path of the module that makes the call"),
        "mass_first": ("float64", "attention on position 0, mean over the queries after it that can see it"),
        "mass_findings": ("float64", "attention on tokens with findings, mean over the other queries that can see one"),
        "mass_random": ("float64", "the same for as many random positions: the null"),
        "alpha_first": ("float64", "Gu's alpha_0: mean attention on position 0 of the queries that see it"),
        "sink_rate": ("float64", "share of sequences with alpha_0 > eps"),
        "secondary": ("float64", "greatest alpha_k of any k > 0 that enough queries see, mean over sequences"),
        "entropy_nats": ("float64", "entropy of a row, mean over queries; a learned sink is one more outcome"),
        "value_norm_first": ("float64", "norm of the first token's value over the mean of the others (drain: < 1)"),
        "value_norm_ratio": ("float64", "the same of the tokens with findings"),
        "update_stable_rank": ("float64", "|U|_F^2 / |U|_2^2 of the head's outputs: 1 if all are one vector"),
        "slot_mass": ("float64", "probability of a learned sink; NaN where there is none"),
        "n_sequences": ("int64", "sequences measured"),
    },
    "positions": {
        **_LAYER,
        "pos": ("int64", "key position"),
        "alpha": ("float64", "alpha_k: mean attention on it of the queries that see it; mean over heads, sequences"),
        "alpha_max": ("float64", "the same of the greatest head of each sequence, mean over sequences"),
        "sink_rate": ("float64", "Sink^eps_k: share of heads with alpha_k > eps, mean over sequences"),
        "n_sequences": ("int64", "sequences that have this position"),
    },
    "sinks": {
        **_LAYER,
        "sequence": ("int64", "index in the corpus"),
        "pos": ("int64", "key position"),
        "token_id": ("int64", "-1 where there are no tokens"),
        "token": ("string", "readable token"),
        "position_class": ("string", "start, delimiter, padding or other"),
        "modality": ("string", "of the token: text, image, video or audio; empty where it is not known"),
        "heads": ("float64", "share of heads with alpha_k > eps; 0 for a token with findings that is no sink"),
        "alpha": ("float64", "alpha_k, mean over heads"),
        "alpha_max": ("float64", "alpha_k of the greatest head"),
        "finding": ("bool", "whether the scan has a finding on this token, at any layer"),
    },
    "axes": {
        **_LAYER,
        "after_onset": ("bool", "whether the layer reads a hidden state that has findings"),
        "concentration": ("float64", "mass_findings, mean over heads"),
        "concentration_first": ("float64", "mass_first, mean over heads"),
        "concentration_null": ("float64", "mass_random, mean over heads"),
        "value_drain": ("float64", "value_norm_ratio, mean over heads"),
        "value_drain_first": ("float64", "value_norm_first, mean over heads"),
        "residual_norm": ("float64", "norm of the tokens with findings over that of others, before the block"),
    },
    "trajectory": {
        **_LAYER,
        "stage": ("string", "hidden, normed (input of attention), q, k or v (all heads side by side)"),
        "group": ("string", "findings, random (as many tokens) or others"),
        "n_tokens": ("int64", "tokens, over all sequences"),
        "cosine": ("float64", "mean cosine of all pairs"),
        "row_variance": ("float64", "1 - |mean|^2 / mean|x|^2: 0 for equal rows"),
        "sparsity": ("float64", "Hoyer's, 0 (even) to 1 (a single entry), mean over tokens"),
        "massive_share": ("float64", "share of |x|^2 in the dims of the findings; hidden and normed only"),
        "max": ("float64", "mean greatest |x|"),
        "norm": ("float64", "mean L2 norm"),
    },
    "decomposition": {
        **_LAYER,
        "part": ("string", "head (mean over heads), concat (heads side by side) or projected (after W_O)"),
        "constancy": ("float64", "mean |u - mean u| / |mean u| over queries: 0 for a constant"),
        "cosine": ("float64", "mean cosine of the updates of two queries"),
        "energy_share": ("float64", "sum |u|^2 / sum |output|^2"),
        "between": ("float64", "mean cosine of the mean updates of two sequences"),
        "null_constancy": ("float64", "the same of as many random tokens"),
        "null_cosine": ("float64", "the same of as many random tokens"),
        "null_energy_share": ("float64", "the same of as many random tokens"),
        "null_between": ("float64", "the same of as many random tokens"),
        "residual_error": ("float64", "greatest |u + rest - output| / |output|, the rest computed on its own"),
        "n_sequences": ("int64", "sequences measured"),
    },
    "writers": {
        **_LAYER,
        "dim": ("int64", "coordinate"),
        "position_class": ("string", "start, delimiter, padding or other"),
        "submodule": ("string", "embedding, attn_out, mlp_out, ..., between_out; norm, between: what changes it"),
        "module": ("string", "dotted path of what writes"),
        "write": ("float64", "what it adds, signed mean over the tokens of the coordinate"),
        "write_std": ("float64", "standard deviation over these tokens"),
        "share": ("float64", "write / value at the layer of the stack with most findings (the peak)"),
        "before": ("float64", "value before it, mean"),
        "after": ("float64", "value after it, mean"),
        "role": ("string", "up (adds at least a quarter of the peak), down (takes as much), or empty"),
        "n_tokens": ("int64", "tokens of the coordinate"),
    },
    "neurons": {
        **_LAYER,
        "dim": ("int64", "coordinate"),
        "position_class": ("string", "start, delimiter, padding or other"),
        "module": ("string", "the projection that writes (down_proj), or the experts"),
        "neuron": ("int64", "its input, 0-based; -1 for an expert as a whole"),
        "expert": ("int64", "of a mixture of experts; -1 where there is none"),
        "rank": ("int64", "rank of |contribution|, 1 is the greatest"),
        "activation": ("float64", "input, mean over the tokens of the coordinate; of an expert its gate weight"),
        "weight": ("float64", "module.weight at [dim, neuron]: the super weight if its share is near 1"),
        "contribution": ("float64", "activation x weight, mean over tokens"),
        "share": ("float64", "contribution / sum of all contributions"),
        "fan_out": ("int64", "coordinates of this layer that the neuron leads"),
        "gate_module": ("string", "projection that gates the neuron; empty where there is none"),
        "gate_row_z": ("float64", "norm of the neuron's row there, in standard deviations from the mean row"),
        "gate": ("float64", "what it gives before its activation function, mean over tokens"),
        "up_module": ("string", "projection that feeds the neuron"),
        "up_row_z": ("float64", "norm of the neuron's row there, in standard deviations from the mean row"),
        "up": ("float64", "what it gives, mean over tokens"),
    },
    "effects": {
        "edit": ("string", "name of the edit"),
        "stack": ("string", "stack of the massive activations"),
        "layer": ("int64", "their layer; edits of weights, inputs and attention act where they say"),
        "metric": ("string", "perplexity, perplexity_windowed, nll, kl, top1_agreement, accuracy, attention_first (of "
                   "the layers behind the edit), repetition (of greedy samples), task/metric"),
        "group": ("string", "all, or column=label"),
        "baseline": ("float64", "without the edit"),
        "edited": ("float64", "with it"),
        "delta": ("float64", "edited - baseline"),
        "ci_low": ("float64", "of the difference: 2.5 % of 1,000 bootstraps over sequences"),
        "ci_high": ("float64", "97.5 %"),
        "n_calls": ("int64", "how often the edit ran"),
        "n_elements": ("int64", "elements that it changed"),
        "n_sequences": ("int64", "sequences evaluated"),
        "n_targets": ("float64", "predictions of the same tokens that both runs make; NaN: not of predictions"),
    },
    "norm_weights": {
        **_LAYER,
        "module": ("string", "dotted path of the norm"),
        "dim": ("int64", "coordinate of a finding, or one that passes the rule"),
        "weight": ("float64", "its scale"),
        "weight_z": ("float64", "in standard deviations from the mean of that norm"),
        "bias": ("float64", "NaN where the norm has none"),
        "bias_z": ("float64", "in standard deviations from the mean of that norm"),
        "beyond": ("bool", "both are beyond 3 standard deviations (the scale alone where there is no bias)"),
        "outlier": ("bool", "beyond in at least half of the layers (Kovaleva 2021)"),
        "finding": ("bool", "whether the scan has findings at this dim"),
    },
}  # fmt: skip


TABLES |= PATCH_TABLES


# What `classics` adds: one long table, of which each entry uses the columns that it needs.
TABLES |= {
    "classics": {
        "classic": ("string", "name of the entry"),
        "stack": ("string", "name of the stack; empty where there is one, or for the whole model"),
        "site": ("string", "point where it was measured"),
        "layer": ("int64", "layer; -1 for all of them"),
        "head": ("int64", "0-based; -1 where it is not about a head"),
        "dim": ("int64", "coordinate; -1 where it is not about one"),
        "subject": ("string", "what else it is about: a class of tokens, a parameter, a part of the text"),
        "metric": ("string", "what was measured, see the entry"),
        "value": ("float64", "its value; NaN where it is unavailable"),
        "n": ("int64", "how many sequences, tokens or pairs it is over"),
    },
    "classic_effects": {"classic": ("string", "name of the entry"), **TABLES["effects"]},
}  # fmt: skip


# What a training records.
TABLES |= {
    "training": {
        "step": ("int64", "optimizer steps done"),
        "tokens": ("int64", "tokens seen (of image models: images)"),
        "loss": ("float64", "cross-entropy in nats, mean over the steps since the row before; NaN: evaluation only"),
        "eval_loss": ("float64", "cross-entropy in nats on the held-out part; NaN where it was not evaluated"),
        "lr": ("float64", "learning rate of the step"),
        "grad_norm": ("float64", "norm of the gradient of the step, before it is clipped"),
        "step_s": ("float64", "seconds of a step, mean over the steps since the row before; waits included"),
    },
    "monitor": {
        "step": ("int64", "optimizer step, from 1, whose first forward pass was looked at"),
        "stack": ("string", "name of the stack of blocks; empty for a model with one"),
        "layer": ("int64", "1..L after block l; 0 the embedding output"),
        "top1": ("float64", "greatest |h|, mean over sequences"),
        "top2": ("float64", "second greatest |h|, mean over sequences"),
        "top3": ("float64", "third greatest |h|, mean over sequences"),
        "median": ("float64", "median |h| of a sequence's hidden state, mean over sequences"),
        "ratio": ("float64", "top1 / median of each sequence, mean over sequences"),
        "at_first": ("float64", "share of sequences whose top1 sits at position 0"),
        "massive": ("float64", "share of sequences with |h| > 100 and |h| >= 1000 x median (sun2024)"),
        "warned": ("float64", "share of sequences that meet the earlier warning"),
        "sink_mass": ("float64", "attention on position 0 of the queries behind it, mean over heads; NaN: not seen"),
        "value_drain": ("float64", "norm of the value of position 0 over the mean norm of the others; NaN: not seen"),
        "nonfinite": ("int64", "count of NaN and Inf values"),
        "n_sequences": ("int64", "sequences that were looked at, over all ranks"),
    },
}  # fmt: skip

# What a scan of several checkpoints of one model records.
TABLES |= {
    "revisions": {
        "revision": ("string", "name of the checkpoint: revision of a Hub model, or name of a folder"),
        "step": ("float64", "training step, as its name says; NaN where the name says none"),
        **{c: TABLES["layers"][c] for c in ("stack", "site", "layer", "top1", "top2", "top3", "median", "ratio",
                                            "ratio_max", "norm_first", "norm_rest", "n_findings")},
        "share": ("float64", "share of sequences with findings at this layer; NaN for rules of whole dims or layers"),
        "found": ("bool", "whether anything at this layer meets the criterion"),
    },
}  # fmt: skip


TABLES |= LAB_TABLES
TABLES |= SHAPE_TABLES


# What a comparison of runs records. NaN: not measured, never zero; "trained", "scanned", "explained" say why.
_COMPARED = {
    "label": ("string", "name of the run, or of the group of runs that differ by their seed only"),
    "row": ("string", "run; or of a group mean, min and max, each over the runs of it that have the value"),
    "group": ("string", "label of the group that a run is in; empty where it is in none"),
}
TABLES |= {
    "compare": {
        **_COMPARED,
        "n_runs": ("int64", "1; of a group the number of its runs"),
        "directory": ("string", "of the run, as given; empty for a group"),
        "model": ("string", "name, as the training or else the scan has it"),
        "variant": ("string", "attention variant of the training; empty where there is no training"),
        "trained": ("bool", "whether there is the record of a training (of a group: of any of its runs)"),
        "scanned": ("bool", "whether there is a scan"),
        "explained": ("bool", "whether the scan is explained"),
        "seed": ("int64", "of the training; -1 where there is none, or several"),
        "steps": ("float64", "optimizer steps done"),
        "tokens": ("float64", "tokens seen (of image models: images)"),
        "train_loss": ("float64", "cross-entropy in nats, the last logged"),
        "eval_loss": ("float64", "cross-entropy in nats on the held-out part, the last measured"),
        "perplexity": ("float64", "exp(eval_loss); NaN for images"),
        "massive": ("float64", "1 if anything passes the criterion, else 0; of a group the share of its runs"),
        "criterion": ("string", "name of the rule of the scan"),
        "onset": ("float64", "first layer with findings, of the stack of the largest; NaN without findings"),
        "max": ("float64", "greatest |h| of all layers and sequences"),
        "ratio": ("float64", "greatest top1 / median of any layer and sequence"),
        "sink_rate": ("float64", "share of heads with alpha_0 > eps, mean over sequences (Gu 2025)"),
        "mass_first": ("float64", "attention on position 0 of the queries after it that can see it, mean over heads"),
        "slot_mass": ("float64", "probability of a learned sink, mean over the heads that have one"),
        "value_norm_first": ("float64", "norm of the first token's value over that of the others, mean over heads"),
    },
    "compare_layers": {
        **_COMPARED,
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer"),
        **{c: TABLES["layers"][c] for c in ("top1", "top2", "top3", "median")},
        "mass_first": ("float64", "attention on position 0 in the block, mean over its heads"),
        "slot_mass": ("float64", "probability of a learned sink in the block, mean over its heads"),
    },
}  # fmt: skip


# Columns that older runs do not have, with what stands there when they are opened: not known, never made up.
ADDED_LATER = {"modality": "", "n_targets": math.nan}


def frame(table: str, rows: pd.DataFrame | dict[str, object] | list[dict[str, object]] | None = None) -> pd.DataFrame:
    """A data frame with exactly the declared columns and types, empty when there are no rows."""
    columns = TABLES[table]
    empty = rows is None or len(rows) == 0
    given = rows if isinstance(rows, dict) and not empty else pd.DataFrame({c: [] for c in columns} if empty else rows)
    missing = set(columns) - set(given)
    if missing:
        raise KeyError(f"table {table} lacks {sorted(missing)}")
    made = {
        c: pd.array(given[c], dtype=dtype) if dtype == "string" else np.array(given[c], dtype)
        for c, (dtype, _) in columns.items()
    }
    return pd.DataFrame(made, index=getattr(given, "index", None), copy=False)


def write_table(directory: Path, table: str, data: pd.DataFrame) -> None:
    """Write one table of a run as parquet."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # pyarrow itself opens only paths that are Unicode
            data.to_parquet(file, index=False)

    write_atomic(directory / f"{table}.parquet", write)


def read_table(directory: Path, table: str) -> pd.DataFrame:
    """Read one table of a run.

    Raises:
        UserError: the file is missing, is not parquet, lacks a column, or holds another type in one.
    """
    path = directory / f"{table}.parquet"
    refuse_special(path)
    if not path.is_file():
        raise UserError(f"{directory} has no {path.name}.", do="The run did not finish: scan again with --resume.")
    try:
        with open(path, "rb") as file:
            data = pd.read_parquet(file)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read.",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "The file is damaged: scan again.",
        ) from None
    data = data.assign(**{c: v for c, v in ADDED_LATER.items() if c in TABLES[table] and c not in data.columns})
    missing = [c for c in TABLES[table] if c not in data.columns]
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}.", do="The file is damaged: scan again.")
    try:
        data = data.reset_index(drop=True)
        return pd.DataFrame({c: data[c].astype(dtype) for c, (dtype, _) in TABLES[table].items()})
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} does not hold numbers where it should.", f"{error}.", "It is damaged: scan again."
        ) from None


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as one .npz file."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomic(path, write)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays written by `save_arrays`; never unpickles.

    Raises:
        UserError: the file is damaged.
    """
    refuse_special(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception as error:
        raise UserError(
            f"{path} cannot be read.",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "The file is damaged: scan again.",
        ) from None
