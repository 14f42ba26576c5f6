"""Why massive activations are there: the result of an explanation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from massact.records.arrays import ATTENTION
from massact.records.result import Result, table
from massact.records.sidecars import Sidecar
from massact.records.tables import Columns

_LAYER = {"stack": ("string", "name of the stack"), "layer": ("int64", "layer")}
TABLES: dict[str, Columns] = {
    "heads": {
        **_LAYER,
        "kind": ("string", "attention, or cross_attention (whose keys are another sequence)"),
        "head": ("int64", "0-based"),
        "module": ("string", "dotted path of the module that makes the call"),
        "mass_first": ("float64", "attention on position 0, mean over the queries after it that can see it"),
        "mass_first_uniform": ("float64", "the same of a uniform head, which looks at all keys that a query sees "
                               "alike (a learned sink is no key): about ln T / T with causal attention"),
        "mass_findings": ("float64", "attention on tokens with findings, mean over the other queries that can see one"),
        "mass_findings_uniform": ("float64", "the same of a uniform head"),
        "mass_random": ("float64", "the same for as many random tokens without finding or near miss: the null; mean "
                        "over the sequences that have as many"),
        "mass_random_uniform": ("float64", "the same of a uniform head"),
        "alpha_first": ("float64", "Gu's alpha_0: mean attention on position 0 of the queries that see it"),
        "sink_rate": ("float64", "share of sequences with alpha_0 > eps"),
        "secondary": ("float64", "greatest alpha_k of any k > 0 that enough queries see, mean over sequences"),
        "entropy_nats": ("float64", "entropy of a row, mean over queries; a learned sink is one more outcome"),
        "value_norm_first": ("float64", "norm of the first token's value over the mean of the others (drain: < 1)"),
        "value_norm_ratio": ("float64", "the same of the tokens with findings"),
        "update_stable_rank": ("float64", "|U|_F^2 / |U|_2^2 of the head's outputs for tokens without findings, "
                               "of all sequences: 1 if all are one vector"),
        "slot_mass": ("float64", "probability of a learned sink; NaN where there is none"),
        "mass_diagonal": ("float64", "attention of a query on its own key, mean over the queries without findings that "
                          "see others too"),
        "mass_diagonal_uniform": ("float64", "the same of a uniform head"),
        "sink_type": ("string", "of a head with a sink at position 0 (sink_rate > 0.5): nop (value_norm_first < 0.2: "
                      "it adds next to nothing), broadcast (at least 0.5: it adds that value) or between; empty "
                      "without a sink, or where values are not seen (Fesser 2026)"),
        "n_sequences": ("int64", "sequences measured"),
    },
    "positions": {
        **_LAYER,
        "pos": ("int64", "key position"),
        "alpha": ("float64", "alpha_k: mean attention on it of the queries that see it; mean over heads, sequences"),
        "alpha_max": ("float64", "the same of the greatest head of each sequence, mean over sequences"),
        "sink_rate": ("float64", "Sink^eps_k: share of heads with alpha_k > eps, mean over sequences; "
                      "NaN where fewer than 16 queries see it"),
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
        "heads": ("float64", "share of heads with alpha_k > eps; 0 for a token with findings that is no sink, "
                  "NaN for one that fewer than 16 queries see"),
        "alpha": ("float64", "alpha_k, mean over heads"),
        "alpha_max": ("float64", "alpha_k of the greatest head"),
        "finding": ("bool", "whether the scan has a finding on this token, at any layer"),
    },
    "axes": {
        **_LAYER,
        "after_onset": ("bool", "whether the layer reads a hidden state that has findings"),
        "concentration": ("float64", "mass_findings, mean over heads"),
        "concentration_uniform": ("float64", "mass_findings_uniform, mean over heads"),
        "concentration_first": ("float64", "mass_first, mean over heads"),
        "concentration_first_uniform": ("float64", "mass_first_uniform, mean over heads"),
        "concentration_null": ("float64", "mass_random, mean over heads"),
        "diagonal": ("float64", "mass_diagonal, mean over heads"),
        "diagonal_uniform": ("float64", "mass_diagonal_uniform, mean over heads"),
        "value_drain": ("float64", "value_norm_ratio, mean over heads"),
        "value_drain_first": ("float64", "value_norm_first, mean over heads"),
        "residual_norm": ("float64", "norm of the tokens with findings over that of others, before the block"),
        "found_tokens": ("float64", "tokens with findings, over all sequences"),
        "random_tokens": ("float64", "random tokens: none in a sequence with fewer ordinary tokens than with findings"),
        "other_tokens": ("float64", "ordinary tokens to compare with: neither findings nor near misses"),
    },
    "trajectory": {
        **_LAYER,
        "stage": ("string", "hidden, normed (input of attention), q, k or v (all heads side by side)"),
        "group": ("string", "findings, random (as many tokens) or others"),
        "n_tokens": ("int64", "tokens, over all sequences"),
        "cosine": ("float64", "mean cosine of all pairs"),
        "cosine_low": ("float64", "its 95 % interval: jackknife over eight folds of the sequences"),
        "cosine_high": ("float64", "its upper end"),
        "n_folds": ("float64", "folds that have tokens: all sequences where there are fewer than eight"),
        "row_variance": ("float64", "1 - |mean|^2 / mean|x|^2: 0 for equal rows"),
        "sparsity": ("float64", "Hoyer's, 0 (even) to 1 (a single entry), mean over tokens"),
        "massive_share": ("float64", "share of |x|^2 in the dims of the findings; hidden and normed only"),
        "max": ("float64", "mean greatest |x|"),
        "norm": ("float64", "mean L2 norm"),
    },
    "decomposition": {
        **_LAYER,
        "part": ("string", "head (mean over heads), concat (heads side by side) or projected (after W_O)"),
        "constancy": ("float64", "mean |u - mean u| / |mean u| over queries: 0 for a constant; NaN for one query"),
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
    "per_sequence": {
        **_LAYER,
        "sequence": ("int64", "index in the corpus"),
        "concentration": ("float64", "attention on tokens with findings, mean over heads: see axes"),
        "concentration_null": ("float64", "the same of as many random tokens"),
        "diagonal": ("float64", "attention of queries on their own key, mean over heads: see axes"),
        "constancy": ("float64", "of what tokens with findings add, heads side by side: see decomposition"),
        "null_constancy": ("float64", "the same of as many random tokens"),
    },
    "writers": {
        **_LAYER,
        "dim": ("int64", "coordinate"),
        "position_class": ("string", "start, delimiter, padding or other"),
        "submodule": ("string", "embedding, attn_out, ssm_out, mlp_out, ...; between_out; norm, between: changes"),
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
        "share": ("float64", "contribution / sum of all contributions; of an expert, over all that the MLP adds there"),
        "fan_out": ("int64", "coordinates of this layer that the neuron leads"),
        "gate_module": ("string", "projection that gates the neuron; empty where there is none"),
        "gate_row_z": ("float64", "norm of the neuron's row there, in standard deviations from the mean row"),
        "gate": ("float64", "what it gives before its activation function, mean over tokens"),
        "up_module": ("string", "projection that feeds the neuron"),
        "up_row_z": ("float64", "norm of the neuron's row there, in standard deviations from the mean row"),
        "up": ("float64", "what it gives, mean over tokens"),
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
    "states": {
        **_LAYER,
        "submodule": ("string", "the mixer, by what it adds: ssm_out, linear_attn_out, conv_out, mixer_out"),
        "module": ("string", "dotted path of what adds it"),
        "position_class": ("string", "start, delimiter, or other (tokens with findings)"),
        "distance": ("int64", "d: how many tokens later"),
        "influence": ("float64", "by how much what the mixer adds d tokens later changes when what it reads of the "
                      "token is set to zero, over the root mean square of what it adds; mean over tokens"),
        "influence_random": ("float64", "the same of random ordinary tokens: the null"),
        "ratio": ("float64", "influence / influence_random"),
        "left": ("float64", "influence over that at distance 1"),
        "left_random": ("float64", "the same of random tokens"),
        "noise": ("float64", "greatest change of any token where nothing is changed"),
        "n_tokens": ("int64", "tokens of the class"),
        "n_random": ("int64", "random tokens"),
    },
    "collapse": {
        **_LAYER,
        "norm": ("string", "the site that the norm gives: attn_in, mlp_in, ..."),
        "module": ("string", "dotted path of the norm; empty for one without parameters"),
        "subtracts_mean": ("bool", "x - mean(x) is normed (LayerNorm), not x (RMSNorm)"),
        "dim": ("int64", "j: the largest massive dim of these tokens"),
        "position_class": ("string", "of the tokens: start, delimiter, padding or other"),
        "gain": ("float64", "g_j, what the norm multiplies that dim by (1 + weight where it does so)"),
        "gain_rank": ("float64", "rank of |g_j| among all dims: 1 is the greatest; NaN where all are equal"),
        "n_dims": ("int64", "D"),
        "onehot_before": ("float64", "one-hot share x_j^2 / |x|^2 before the gain, mean over tokens"),
        "onehot": ("float64", "the same behind the gain, (g_j x_j)^2 / |g x|^2, without the bias"),
        "onehot_low": ("float64", "its 95 % interval over sequences"),
        "onehot_high": ("float64", "its upper end"),
        "onehot_random": ("float64", "the same of as many random tokens"),
        "min_cosine_before": ("float64", "least cosine of two of the tokens before the gain, of the checked half of "
                              "the sequences"),
        "bound_before": ("float64", "its lower bound cos(theta_1 + theta_2), angles to the one-hot direction e_j"),
        "min_cosine": ("float64", "least cosine of two of the tokens behind the norm, of the checked half"),
        "bound": ("float64", "its lower bound cos(theta_1 + theta_2), of the two greatest angles to the mean direction "
                  "of the other half"),
        "bound_dim": ("float64", "the same with angles to what the norm makes of e_j; NaN where that is zero"),
        "min_cosine_random": ("float64", "least cosine of as many random tokens"),
        "bound_random": ("float64", "its bound, with the mean direction of random tokens"),
        "entry": ("float64", "greatest |entry| at that dim behind the norm"),
        "entry_bound": ("float64", "sqrt(D) |g_j| + |b_j|, which it cannot exceed whatever the magnitude is"),
        "role": ("string", "on (onehot >= 0.5), dimmed, or off (below 0.01) where onehot_before >= 0.5; else empty"),
        "removes": ("bool", "what reads this norm takes the massive activation away (role down in writers)"),
        "n_tokens": ("int64", "massive tokens of one sign at that dim, at most 32"),
        "n_checked": ("int64", "of them in the half that is checked; those that are one vector before the norm count "
                      "once"),
        "n_random": ("int64", "random tokens"),
        "n_sequences": ("int64", "sequences with these tokens"),
        "error": ("float64", "how far what was measured behind the norm is from what its module makes of the stream, "
                  "relative"),
    },
    "spectrum": {
        **_LAYER,
        "tokens": ("string", "all; without (massive tokens left out); centred (these left out, and the mean off)"),
        "scope": ("string", "sequence (means over sequences), corpus (all tokens as one matrix) or null (random "
                  "directions with the same norms)"),
        "p1": ("float64", "p_1 = s_1^2 / sum s^2, share of the greatest singular value of the states X (T, D)"),
        "p1_low": ("float64", "its 95 % interval over sequences"),
        "p1_high": ("float64", "its upper end"),
        "bound": ("float64", "(c + alpha) / (c + 1) <= p_1, of all tokens; mean over sequences"),
        "c": ("float64", "|x_0|^2 over the squared norms of all others, x_0 the longest massive token (of all, where "
              "there is none)"),
        "alpha": ("float64", "share of the others' squared norms along x_0"),
        "entropy_bits": ("float64", "H = -sum p log2 p"),
        "effective_rank": ("float64", "2^H, mean over sequences (Roy and Vetterli 2007)"),
        "effective_rank_low": ("float64", "its 95 % interval over sequences"),
        "effective_rank_high": ("float64", "its upper end"),
        "participation": ("float64", "1 / sum p^2"),
        "anisotropy": ("float64", "mean cosine of two tokens"),
        "left_out": ("int64", "tokens left out, over all sequences"),
        "n_sequences": ("int64", "sequences measured"),
    },
    "dark_subspace": {
        **_LAYER,
        "vector": ("string", "findings: hidden states of tokens with findings, as they stand before the final norm; "
                   "random: of as many random tokens; dim: the one-hot direction e_j"),
        "dim": ("int64", "j; -1 for tokens"),
        "gain": ("bool", "the unembedding is taken with the gain of the final norm, W diag(g)"),
        "centred": ("bool", "the mean over the vocabulary is taken off W, which softmax does not see"),
        "share": ("float64", "share of the squared norm in the weakest right singular directions, mean over tokens"),
        "share_low": ("float64", "its 95 % interval over sequences; NaN for a dim"),
        "share_high": ("float64", "its upper end"),
        "chance": ("float64", "of a random direction: the fraction of the directions, 0.05"),
        "norm_rank": ("float64", "of a dim: rank of the norm of its column, 1 is the greatest; NaN for tokens"),
        "n_dims": ("int64", "D"),
        "n_tokens": ("int64", "tokens, at most 32; 1 for a dim"),
    },
    "patch_attention": {
        **_LAYER,
        "query": ("string", "who attends: class, registers, massive, added, patches (all others)"),
        "key": ("string", "to what: the same groups, or slot (a learned sink that is no token)"),
        "mass": ("float64", "probability, summed over the keys; mean over heads and queries, then over images"),
        "n_images": ("int64", "images that have both groups"),
        "n_keys": ("float64", "keys of the group, mean over these images"),
    },
}  # fmt: skip


@dataclass
class ExplainInfo(Sidecar):
    """The record of an explanation: explain.json.

    Args:
        attention: how the attention of each stack was seen, with the numbers of its proof.
        spectrum: of versions up to 5, per stack, the share of the mean state of the tokens with findings in the weakest
            directions of the unembedding, beside that of other tokens; now the table dark_subspace.
        tokens: per stack, how many tokens with findings and near misses the scan has, how many random and other ones
            they are compared with, and in how many sequences each (`..._sequences`).
        closure: greatest error of the account of all writes, relative to the peak value.
    """

    attention: dict[str, Any] = field(default_factory=dict)
    spectrum: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    closure: dict[str, float] = field(default_factory=dict)
    # 2: modality of the tokens; 3: means of attention over queries that can see the keys; 4: all tokens with findings,
    # nulls of ordinary tokens only, shares of a uniform head; 5: attention of each sequence, intervals of cosines;
    # 6: collapse, spectrum, dark_subspace, own keys, types of sinks
    schema_version: int = 6

    def unseen_layers(self, stack: str) -> list[int]:
        """Layers whose own attention could not be seen, of a stack in which others' could: no number is about them."""
        record = self.attention.get(stack)
        layers = record.get("unseen_layers") if isinstance(record, dict) else None
        return sorted({x for x in layers if type(x) is int}) if isinstance(layers, list) else []


@dataclass(repr=False)
class Explanation(Result):
    """Why massive activations are there, and what they do to attention.

    Args:
        info: what was asked and how.
        heads, positions, sinks, axes, trajectory, decomposition, per_sequence, writers, neurons, norm_weights:
            tables, see `massact.records.tables`.
        states: table, of models with layers that mix tokens otherwise than by attention.
        collapse, spectrum, dark_subspace: tables: what norms make of the massive tokens, singular values of the states,
            and what the unembedding does not read.
        patch_attention: table, of image models only.
        maps: of one prompt, "logits" and "probs" (P, T, T), means over heads; "layers" (P,); "tokens" (T,); "stack".
    """

    KIND: ClassVar[str] = "explanation"
    VERB: ClassVar[str] = "explain"
    FILE: ClassVar[str] = "explain.json"
    INFO: ClassVar[type[Any]] = ExplainInfo
    TABLES: ClassVar = TABLES
    SOME: ClassVar[frozenset[str]] = frozenset(
        {"patch_attention", "per_sequence", "states", "collapse", "spectrum", "dark_subspace"}
    )
    ARRAYS: ClassVar = {"maps": ("attention.npz", ATTENTION)}
    AGAIN: ClassVar[str] = "Explain the run again."
    PLACE: ClassVar[int] = 1

    info: ExplainInfo
    heads: pd.DataFrame = table("heads")
    positions: pd.DataFrame = table("positions")
    sinks: pd.DataFrame = table("sinks")
    axes: pd.DataFrame = table("axes")
    trajectory: pd.DataFrame = table("trajectory")
    decomposition: pd.DataFrame = table("decomposition")
    per_sequence: pd.DataFrame = table("per_sequence")
    writers: pd.DataFrame = table("writers")
    neurons: pd.DataFrame = table("neurons")
    norm_weights: pd.DataFrame = table("norm_weights")
    states: pd.DataFrame = table("states")
    collapse: pd.DataFrame = table("collapse")
    spectrum: pd.DataFrame = table("spectrum")
    dark_subspace: pd.DataFrame = table("dark_subspace")
    patch_attention: pd.DataFrame = table("patch_attention")
    maps: dict[str, np.ndarray] = field(default_factory=dict)
