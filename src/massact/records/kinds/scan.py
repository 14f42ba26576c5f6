"""What a scan found, in memory and as the files of its run directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from massact.records.arrays import GENERATED, IMAGES, PORTRAIT, STRIP
from massact.records.clusters import COLUMNS as CLUSTERS
from massact.records.clusters import clusters_table
from massact.records.errors import UserError
from massact.records.result import Result, table
from massact.records.run import claim, read_info, write_info
from massact.records.runinfo import RunInfo
from massact.records.tables import Columns, save_arrays, write_table

TABLES: dict[str, Columns] = {
    "layers": {
        "stack": ("string", "name of the stack of blocks; empty for a model with one"),
        "site": ("string", "point of the hidden state: resid_post, or resid_post_prenorm in post-LN models"),
        "layer": ("int64", "1..L after block l; 0 the embedding output"),
        "module": ("string", "dotted path of the block"),
        "mixer": (
            "string",
            "what mixes tokens in the block: attention, ssm, linear_attn, conv, other, several with "
            "+, or none; empty: the embedding output, an older run",
        ),
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
        "origin": ("string", "prompt or generated, of a text that the model went on with (--generate); else empty"),
        "median_so_far": ("float64", "median |h| of that hidden state up to this token, of such a text; else NaN"),
    },
    "near_misses": {},
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
    "clusters": CLUSTERS,
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
}
TABLES["near_misses"] = TABLES["findings"]
CRITERIA: dict[str, Columns] = {
    "criteria": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state, or mlp_act (input of down_proj) where the rule looks there"),
        "criterion": ("string", "name of the published rule"),
        "kind": ("string", "what it finds: element (one scalar), token, dim or layer"),
        "own": ("bool", "whether it is the criterion of this run, with its constants; all others have published ones"),
        "thresholds": ("string", "its constants, as a JSON object"),
        "source": ("string", "paper, page or code it comes from"),
        "verdict": ("string", "yes, no, reported (the source sets no threshold), undecided or unavailable"),
        "reason": ("string", "why it is none of yes and no"),
        "n_findings": ("float64", "what passes, of all layers"),
        "at_least": ("bool", "more may pass than was kept of each hidden state: --criterion tells"),
        "layers": ("string", "layers at which something passes, as a JSON list"),
        "dims": ("string", "dims that pass most often, as a JSON list of at most 8"),
        "n_dims": ("float64", "different dims that pass; NaN for rules of tokens and layers"),
        "n_tokens": ("float64", "different tokens that pass, at any layer; NaN for rules of dims and layers"),
        "token_share": ("float64", "n_tokens over all tokens measured"),
        "statistic": ("string", "of a rule without a threshold, what its source reports: a column of layers"),
        "greatest": ("float64", "its greatest value over the layers"),
        "greatest_layer": ("int64", "where that is; -1 for other rules"),
    },
}
RISES: dict[str, Columns] = {
    "rises": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "dim": ("int64", "coordinate of a cluster"),
        "layer": ("int64", "where its greatest |h| rises by a quarter of what it is anywhere, or more"),
        "mixer": ("string", "what mixes tokens in that block"),
        "before": ("float64", "greatest |h| of the dim at the layer before"),
        "value": ("float64", "at this layer"),
        "next_mixer": ("string", "what mixes tokens in the next block; empty behind the last one"),
        "next_attention": ("int64", "next layer with attention; -1 for none"),
        "kept": ("float64", "greatest |h| of the dim as that layer reads it, over value; NaN where there is none"),
        "next_rise": ("int64", "next layer where it rises; -1 for none"),
        "kept_between": (
            "float64",
            "least of its greatest |h| from here to the layer before the next rise (else to the "
            "last layer), over value: 1 where all of it is kept",
        ),
    },
}
_LAYER = {"stack": ("string", "name of the stack"), "layer": ("int64", "layer; 0 is the embedding output")}
PATCHES: dict[str, Columns] = {
    "patch_norms": {
        **_LAYER,
        "low": ("float64", "L2 norm at the lower end of the bin; the bins are the same at all layers"),
        "high": ("float64", "at its upper end"),
        "count": ("int64", "patches of all images in the bin"),
        "share": ("float64", "count / all patches of that layer; norms of 0 are in no bin"),
    },
    "patch_cosines": {
        **_LAYER,
        "group": ("string", "massive (a finding on the patch, at any layer), or other"),
        "n": ("int64", "patches of all images"),
        "mean": ("float64", "mean cosine of a patch to the patches above, below, left and right of it"),
        "p10": ("float64", "10 % of the patches lie below"),
        "p50": ("float64", "median"),
        "p90": ("float64", "90 % of the patches lie below"),
    },
}


ORIGINS: dict[str, Columns] = {
    "origins": {
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer; -1: all of them, the greatest of any, and massive at any"),
        "origin": ("string", "prompt (the control) or generated"),
        "position_class": ("string", "start, delimiter, other, or behind (the latter two: all but the first token)"),
        "n_tokens": ("int64", "tokens of it, all sequences"),
        "n_sequences": ("int64", "sequences that have any"),
        "max": ("float64", "greatest |h| of them in a sequence, mean over sequences"),
        "max_low": ("float64", "its 95 % interval over sequences"),
        "max_high": ("float64", "its upper end"),
        "greatest": ("float64", "greatest |h| of them in any sequence"),
        "ratio": ("float64", "greatest |h| of a sequence over its median, greatest over sequences"),
        "ratio_so_far": ("float64", "the same over the median up to that token; NaN where no token was looked at"),
        "n_massive": ("int64", "tokens of them with a finding at this layer"),
        "share": ("float64", "share of those sequences with such a token"),
        "share_low": ("float64", "its 95 % interval (Wilson)"),
        "share_high": ("float64", "its upper end"),
    },
}
BY_INPUT: dict[str, Columns] = {
    "by_input": {
        "input": ("string", "what sequences are told apart by: a timestep, the share of masked tokens"),
        "value": ("float64", "its value; the other columns are of the sequences that have it"),
        "stack": ("string", "name of the stack"),
        "site": ("string", "point of the hidden state"),
        "layer": ("int64", "layer; 0 is the embedding output"),
        "top1": ("float64", "greatest |h|, mean over these sequences"),
        "median": ("float64", "median |h|, mean over them"),
        "ratio": ("float64", "top1 / median of each, mean over them"),
        "max": ("float64", "greatest |h| of all of them"),
        "n_findings": ("int64", "findings at this layer"),
        "n_sequences": ("int64", "sequences"),
        "share": ("float64", "of these sequences that have a finding at this layer"),
        "dim": ("int64", "of the greatest finding; -1 where there is none"),
    },
}


@dataclass(repr=False)
class ScanResult(Result):
    """What a scan found.

    Args:
        info: what was asked, of which model, on which corpus, and the answer in numbers.
        layers, findings, near_misses, coordinates, clusters, dims, ranks: tables, see `TABLES`.
        portrait: |h| of one prompt for the 3-D figure: "magnitude" (P, T, D), "layers" (P,), "tokens" (T,).
        strip: of N tokens of K short texts the greatest |h|: signed "value" (Q, L, N), its "dim" (-1: none) at the Q
            "points" and L "layers" of "stack" (NaN where there is no such site), the "median" |h| (Q, L, K) of each
            text, "tokens", "position" and "text" (N,); empty where positions are no tokens, and in older runs.
        criteria: table: what every published rule says; empty in runs of older versions.
        rises: table, of models whose layers mix tokens in several ways: where clusters rise, what is kept of them.
        patch_norms, patch_cosines: tables, of image models only.
        by_input: table, where sequences were told apart by a number.
        origins: table, of a text that the model went on with: its tokens beside those of the prompts.
        generated: that text: "ids" (N, T), "lengths" (N,) of it and, of these, what was "given" (N,).
        images: of image models, what their patches are and how large: "massive_share" (Y, X), share of the
            "n_images" with a finding on that patch; of the first K images "massive" (K, Y, X), "norms" (K, L, Y, X) at
            "layers", "dim_size" (K, Y, X), |h| at "dim_at", the (layer, dim) of the largest finding on a patch (NaN
            where it was not kept), and "pictures" (K, H, W, 3) uint8; of "stack" the positions "patches" (row by row),
            "registers" and "class_tokens".
    """

    KIND: ClassVar[str] = "scan"
    VERB: ClassVar[str] = "scan"
    FILE: ClassVar[str] = "run.json"
    INFO: ClassVar[type[Any]] = RunInfo
    TABLES: ClassVar = TABLES | CRITERIA | RISES | PATCHES | BY_INPUT | ORIGINS
    SOME: ClassVar[frozenset[str]] = frozenset({*PATCHES, *CRITERIA, *RISES, *BY_INPUT, *ORIGINS, "clusters"})
    UNTOLD: ClassVar[frozenset[str]] = frozenset({"dims", "patch_norms"})
    ARRAYS: ClassVar = {
        "portrait": ("portrait.npz", PORTRAIT),
        "strip": ("strip.npz", STRIP),
        "images": ("images.npz", IMAGES),
        "generated": ("generated.npz", GENERATED),
    }
    ALONE: ClassVar[bool] = True
    AGAIN: ClassVar[str] = "Scan again, with --resume where it did not finish."
    PLACE: ClassVar[int] = 0

    info: RunInfo
    layers: pd.DataFrame = table("layers")
    findings: pd.DataFrame = table("findings")
    near_misses: pd.DataFrame = table("near_misses")
    coordinates: pd.DataFrame = table("coordinates")
    clusters: pd.DataFrame = table("clusters")
    dims: pd.DataFrame = table("dims")
    ranks: pd.DataFrame = table("ranks")
    portrait: dict[str, np.ndarray] = field(default_factory=dict)
    criteria: pd.DataFrame = table("criteria")
    rises: pd.DataFrame = table("rises")
    patch_norms: pd.DataFrame = table("patch_norms")
    patch_cosines: pd.DataFrame = table("patch_cosines")
    by_input: pd.DataFrame = table("by_input")
    origins: pd.DataFrame = table("origins")
    strip: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    generated: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A run of an older version has no clusters: they are made of what it lists."""
        if not len(self.clusters) and len(self.findings) + len(self.near_misses):
            n = int(self.layers["n_sequences"].max()) if len(self.layers) else None
            self.clusters = clusters_table(self.findings, self.near_misses, n_sequences=n)

    @property
    def found(self) -> bool:
        """Whether anything passed the criterion."""
        return len(self.findings) > 0

    def save(self, directory: str | Path) -> Path:
        """Write the run directory; run.json last, so that its status speaks for the rest.

        Raises:
            UserError: the directory cannot be written, or holds another run.
        """
        path = claim(directory, self.info)
        for name, rows in self.tables().items():
            write_table(path, name, rows)
        for name, (file, _) in self.ARRAYS.items():
            if getattr(self, name):
                save_arrays(path / file, getattr(self, name))
        write_info(path, self.info)
        return path

    @classmethod
    def read(cls, path: Path) -> RunInfo:
        """Read run.json of a run that is finished.

        Raises:
            UserError: no such directory, no run in it, not finished, damaged, or made by a newer massact.
        """
        info = read_info(path)
        if info.status in ("running", "interrupted"):
            raise UserError(
                f"The run in {path} is not finished (status: {info.status}).",
                do=f"Go on with it: massact scan ... --out {path} --resume",
            )
        if info.status != "ok":
            raise UserError(f"The run in {path} failed.", info.error or "",
                        "Scan again: the same command with --resume, or into another directory.")  # fmt: skip
        return info


def open_run(directory: str | Path) -> ScanResult:
    """Read a run directory.

    Raises:
        UserError: no such directory, no run in it, damaged, or made by a newer massact.
    """
    result = ScanResult.open(directory)
    assert result is not None
    return result
