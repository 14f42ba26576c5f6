"""`explain`: one pass with probes on attention, on the hidden states and on every write, then a look at the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from massact.corpora import Corpus
from massact.explanations.collapse import Token, by_sequence, collapse_probes, collapse_table, collapsing, spread
from massact.explanations.concentration import (
    axes_table,
    decomposition_table,
    heads_table,
    positions_table,
    sequences_table,
    sinks_table,
    stages_table,
)
from massact.explanations.heat_maps import attention_maps
from massact.explanations.neurons import neurons_table
from massact.explanations.patch_attention import share_probes, shares_table
from massact.explanations.spectra import spectrum_table, too_wide
from massact.explanations.states import chosen_tokens, states_table
from massact.explanations.targets import counts, main_findings, positions_of, reading_blocks, targets
from massact.explanations.unembedding import dark_rows, final_gain, reads_head, unread
from massact.explanations.weights import norm_weights_table
from massact.explanations.writers import MOST_COORDINATES, Coordinate, coordinates_of, write_probes, writers_table
from massact.models import Model, projection_of, with_attention_for
from massact.positions import layout_of, tokens_of
from massact.records.clusters import KEYS, keys_of, passing
from massact.records.errors import WorkError
from massact.records.kinds.explanation import ExplainInfo, Explanation
from massact.records.kinds.scan import ScanResult
from massact.records.runinfo import jsonable
from massact.records.sites import Site, runs_of
from massact.records.tables import frame
from massact.scans import AtLength, proved_at, scanned_inputs
from massact.scans.image_maps import massive_patches
from massact.stats import TokenMax
from massact.stats.attention_call import rounding_allowed
from massact.stats.gram import GramStats
from massact.stats.groups import Gather, GroupStats
from massact.stats.heads import HeadOptions, HeadResult, HeadStats, Targets
from massact.trace import Measurements, Probe, measure
from massact.verbs.explain import ExplainConfig

Progress = Callable[[str, int, int], None]


def explain(
    model: Any, corpus: Any, scan: ScanResult, *, progress: Progress | None = None, **options: Any
) -> Explanation:
    """Explain the massive activations that a scan found: attention on them, the bias they add, who writes them.

    Args:
        model: the scanned model, loaded, or anything that `load` takes.
        corpus: what was scanned: the same `Corpus` or `Source`, anything that `corpora.corpus` takes, or None to make
            it again from the record of the scan.
        scan: its result; the findings say which tokens are looked at.
        progress: called with (stage, sequences done, sequences in all).
        **options: see `ExplainConfig`.

    Raises:
        UserError: the model or the corpus is not the one of the scan, or a bad option.
        WorkError: the model could not be run on the corpus.
    Source: Sun et al. 2024, Section 4; Gu et al. 2025; Yu et al. 2024; Kovaleva et al. 2021.
    """
    config = ExplainConfig.of(options)
    began = time.perf_counter()
    loaded, ready = scanned_inputs(model, corpus, scan)
    few = ready if config.n_sequences is None else ready.head(min(config.n_sequences, ready.n_sequences))
    job = _Job(with_attention_for(loaded, few), few, scan, config, progress or (lambda *_: None))
    if proved_at(scan, ready) is None:  # a run of an older version
        job.checker = AtLength(loaded, {str(x) for x in scan.layers["stack"]})
    result = job.run()
    result.info.wall_s = time.perf_counter() - began
    return result


def measured_tables(model: Model, corpus: Corpus, scan: ScanResult, config: ExplainConfig) -> Explanation:
    """What the pass over the corpus gives, without the looks at weights and prompt that follow it once."""
    job = _Job(model, corpus, scan, config, lambda *_: None)
    return job.tables(ExplainInfo(), job.measure(job.prepare()))


def _check_parts(heads: Mapping[Site, HeadResult], model: Model) -> None:
    """Refuse attention that is not what it was proved to be: on this corpus, at this length, P V is the output.

    Of a few queries of every sequence, to 1e-4 of it in float32, or to more where scores are large.
    """
    least = 1e-4 * max(1.0, torch.finfo(model.dtype).eps / torch.finfo(torch.float32).eps) ** 0.5
    for site, r in heads.items():
        known = ~np.isnan(r.off)
        worst = float(r.off[known].max(initial=0.0))
        allowed = max(least, rounding_allowed([model.dtype], float(r.score_size[known].max(initial=0.0))))
        if worst > allowed:
            raise WorkError(
                f"Attention of {site} is not the sum of its parts: off by {worst:.2g} of it (allowed {allowed:.1g}).",
                "The model takes another path on this corpus than when its attention was proved.",
                "Report it with the model's name.",
            )


@dataclass
class _Job:
    """One explanation."""

    model: Model
    corpus: Corpus
    scan: ScanResult
    config: ExplainConfig
    progress: Progress
    checker: AtLength | None = None

    def prepare(self) -> list[Coordinate]:
        """Choose the tokens to look at; gives the coordinates to account for."""
        anatomy = self.model.anatomy
        self.stacks = {s.name: s for s in anatomy.stacks if s.name in {str(x) for x in self.scan.layers["stack"]}}
        self.n_positions = {name: self._positions(name) for name in self.stacks}
        self.texts = {n: tokens_of(self.model, self.corpus, n, last - 1) for n, last in self.n_positions.items()}
        n = self.corpus.n_sequences
        self.found, self.near = (
            {name: positions_of(rows[rows["stack"] == name], n) for name in self.stacks}
            for rows in (self.scan.findings, self.scan.near_misses)
        )
        self.targets = {
            name: targets(self.found[name], self.near[name], self._kept(name), self.config.seed) for name in self.stacks
        }
        coordinates = coordinates_of(self.scan.findings, self.scan.clusters, n)
        main = main_findings(self.scan.findings, self.scan.clusters)
        self.massive = {name: positions_of(main[main["stack"] == name], n) for name in self.stacks}
        places = set(main[KEYS].itertuples(index=False, name=None))
        chosen = [c for c in coordinates if (c.stack, c.site, c.dim, c.position_class) in places]
        self.collapsing = collapsing(chosen, {name: t.random for name, t in self.targets.items()})
        return coordinates

    def run(self) -> Explanation:
        coordinates, n = self.prepare(), self.corpus.n_sequences
        info = ExplainInfo.of(self.scan.info, self.config.record(), self.corpus, n, attention=self._attention())
        measured = self.measure(coordinates)
        if self.checker is not None:
            info.model["proof"] = {"at_length": jsonable(self.checker.record)}
        result = self.tables(info, measured)
        if coordinates:
            tolerance = self.model.proof.tolerance
            result.writers, info.closure, missed = writers_table(self.stacks, coordinates, measured, tolerance)
            info.notes += missed
            if info.closure:
                where, off = ", ".join(runs_of(name for name in info.closure if name)), max(info.closure.values())
                info.notes.append(f"The writes{f' in {where}' * bool(where)} add up to the measured values within "
                                  f"{off:.1g} of the peak.")  # fmt: skip
            result.neurons, notes = neurons_table(self.model, self.corpus, coordinates, result.writers)
            info.notes += notes
        dims = {s: {c.dim for c in coordinates if c.stack == s} for s in self.stacks}
        result.norm_weights = norm_weights_table(self.model, dims)
        result.collapse, missed = collapse_table(self.model, self.stacks, self.collapsing, measured, result.writers)
        info.notes += missed
        result.dark_subspace = self._dark_subspace(dims, measured, info)
        info.tokens = {name: counts(self.targets[name], self.near[name]) for name in self.stacks}
        info.notes += self._notes(coordinates)
        result.states = self._states(info)
        self.progress("maps", 0, 1)
        result.maps = attention_maps(self.model, self.corpus, self.scan, info.notes)
        self.progress("maps", 1, 1)
        return result

    def _states(self, info: ExplainInfo) -> pd.DataFrame:
        """What tokens leave in the states of mixers that are no attention."""
        made = []
        for name, stack in self.stacks.items():
            findings, kept = self.scan.findings[self.scan.findings["stack"] == name], self._kept(name)
            chosen = chosen_tokens(findings, self.texts[name], kept, self.config.seed)
            rows, notes = states_table(self.model, self.corpus, stack, chosen, kept, partial(self.progress, "states"))
            info.notes += notes
            made += [rows] if len(rows) else []
        return pd.concat(made, ignore_index=True) if made else frame("states")

    def measure(self, coordinates: list[Coordinate]) -> Measurements:
        """The one pass over the corpus."""
        n = self.corpus.n_sequences
        return measure(
            self.model, self.corpus, self._probes(coordinates), batch_size=self.config.batch_size,
            on_batch=lambda done: self.progress("explain", done.n_sequences, n), checker=self.checker,
        )  # fmt: skip

    def _positions(self, stack: str) -> int:
        """How many positions a stack has: those of the text where it reads it, else as it runs."""
        text = self.model.reads(self.model.anatomy.stack(stack))
        ids = self.corpus.inputs.get(text or "input_ids", self.corpus.inputs.get("input_ids"))
        if text in ("input_ids", "decoder_input_ids") and ids is not None:
            return ids.shape[1]
        site = f"{stack}/1.resid_pre" if stack else "1.resid_pre"
        first = measure(self.model, self.corpus.head(1), [Probe("n", site, TokenMax)])
        return int(first.result("n", first.sites("n")[0]).n_tokens[0])

    def _kept(self, stack: str) -> list[Sequence[int]]:
        """Positions of every sequence from which random tokens are drawn: those that count, wherever padding is."""
        text, n = self.texts[stack], self.n_positions[stack]
        mask = text.mask if text.mask is not None and text.mask.shape[1] == n else None
        mask = next((m for m in text.counts if m.shape[1] == n), mask)
        packed = self.corpus.packed.get(str(self.model.reads(self.model.anatomy.stack(stack))))
        if packed is not None:
            return [range(length) for length in packed]
        return [range(n)] * self.corpus.n_sequences if mask is None else [row.nonzero()[:, 0].tolist() for row in mask]

    def _probes(self, coordinates: list[Coordinate]) -> list[Probe]:
        probes: list[Probe] = []
        for site, place in self.model.anatomy.attentions.items():
            if site.stack in self.stacks:
                options = HeadOptions(self.config.columns, self.config.eps, True, projection_of(self.model, place))
                # The keys of cross-attention are another sequence, even where that is as long as this one.
                chosen = Targets({}, {}, {}) if place.cross else self.targets[site.stack]
                probes.append(Probe("heads", str(site), partial(HeadStats, chosen, options)))
        for name, stack in self.stacks.items():
            head, t = (f"{name}/" if name else ""), self.targets[name]
            groups = {"findings": t.findings, "random": t.random, "others": t.others}
            dims = sorted({c.dim for c in coordinates if c.stack == name})
            make = partial(GroupStats, groups, dims)
            probes.append(Probe("hidden", f"{head}*.resid_pre", make))
            if any("attn_in" in block.places for block in stack.blocks):
                probes.append(Probe("normed", f"{head}*.attn_in", make))
            probes.append(Probe("hidden", f"{head}*.resid_post", make))
            as_one, seed = self.config.corpus_spectrum and not too_wide(stack), self.config.seed
            if self.config.spectrum:
                gram = partial(GramStats, self.massive[name], as_one, 1, seed)
                probes.append(Probe("spectrum", f"{head}*.resid_post", gram))
            last = self._last_with_findings(name)
            if last is not None and not unread(self.model, name):
                wanted = by_sequence(t for of in self._looked_at(name).values() for t in of)
                probes.append(Probe("states", str(last), partial(Gather, wanted)))
            mine = [c for c in coordinates if c.stack == name]
            probes += write_probes(stack, mine) if mine else []
            alike = [g for g in self.collapsing if g.coordinate.stack == name]
            probes += collapse_probes(stack, alike) if alike else []
            layout = layout_of(self.model, self.corpus, name)
            if layout is not None:
                calls = [s for s, p in self.model.anatomy.attentions.items() if s.stack == name and not p.cross]
                probes += share_probes(calls, layout, massive_patches(self.scan.findings, layout))
        return probes

    def tables(self, info: ExplainInfo, measured: Measurements) -> Explanation:
        heads = {site: measured.result("heads", site) for site in measured.sites("heads")}
        hidden = {site: measured.result("hidden", site) for site in measured.sites("hidden")}
        normed = {site: measured.result("normed", site) for site in measured.sites("normed")}
        before = {site: groups for site, groups in hidden.items() if site.point == "resid_pre"}
        reading = reading_blocks(self.scan.findings, self.scan.clusters)
        _check_parts(heads, self.model)
        grams = {site: measured.result("spectrum", site) for site in measured.sites("spectrum")}
        spectra, notes = spectrum_table(grams, self.massive)
        info.notes += notes
        return Explanation(
            info,
            heads=heads_table(heads, self.model.anatomy.attentions, self.config.eps),
            positions=positions_table(heads),
            sinks=sinks_table(heads, self.texts, self.found),
            axes=axes_table(heads, before, reading),
            trajectory=stages_table(heads, {"hidden": before, "normed": normed}),
            decomposition=decomposition_table(heads),
            per_sequence=sequences_table(heads),
            spectrum=spectra,
            patch_attention=shares_table(measured),
        )

    def _attention(self) -> dict[str, Any]:
        """How attention was seen in each stack, with the worst number of the proof."""
        seen: dict[str, Any] = {}
        for site, place in self.model.anatomy.attentions.items():
            if site.stack not in self.stacks:
                continue
            here = seen.setdefault(
                site.stack,
                {"via": place.via, "n_heads": place.n_heads, "n_kv_heads": place.n_kv_heads, "error": 0.0,
                 "allowed": 0.0, "row_sum": 1.0, "causal": place.forward, "n_calls": 0},
            )  # fmt: skip
            here["n_calls"] += 1
            here["error"] = max(here["error"], place.error)
            here["allowed"] = max(here["allowed"], place.allowed)
            here["row_sum"] = min(here["row_sum"], place.row_sum)
        known = {(site.stack, site.layer) for site, place in self.model.anatomy.attentions.items() if not place.cross}
        for site in self.model.anatomy.no_attention:
            if site.stack in seen and (site.stack, site.layer) not in known:
                seen[site.stack].setdefault("unseen_layers", []).append(site.layer)
        return seen

    def _last_with_findings(self, stack: str) -> Site | None:
        layers = self.scan.findings.loc[self.scan.findings["stack"] == stack, "layer"]
        return Site(stack, int(layers.max()), "resid_post") if len(layers) else None

    def _looked_at(self, stack: str) -> dict[str, tuple[Token, ...]]:
        """The tokens with findings and as many random ones, few enough to keep their states."""
        t = self.targets[stack]
        groups = {"findings": t.findings, "random": t.random}
        return {name: spread([(s, p) for s, at in of.items() for p in at]) for name, of in groups.items()}

    def _dark_subspace(self, dims: Mapping[str, set[int]], measured: Measurements, info: ExplainInfo) -> pd.DataFrame:
        """Of the last layer with findings, as its states stand there."""
        rows: list[dict[str, object]] = []
        for name in self.stacks:
            site = self._last_with_findings(name)
            if site is None or not reads_head(self.model, name):
                continue
            if why := unread(self.model, name):
                info.notes.append(f"The dark subspace is unavailable: {why}.")
                continue
            h = {t: x for t, x in measured.result("states", site).items() if np.isfinite(x).all() and x.any()}
            states = {group: {t: h[t] for t in of if t in h} for group, of in self._looked_at(name).items()}
            gain = final_gain(self.model, name)
            if gain is None:
                info.notes.append("The dark subspace is told without the gain of the final norm, which was not found.")
            place: dict[str, object] = {"stack": name, "layer": site.layer}
            rows += [place | row for row in dark_rows(self.model, states, dims[name], gain)]
        return frame("dark_subspace", rows)

    def _notes(self, coordinates: list[Coordinate]) -> list[str]:
        notes = self.model.anatomy.unseen_attention(self.stacks)
        told = {(c.stack, f"{c.dim}@{c.position_class}") for c in coordinates}
        mine = passing(self.scan.clusters[self.scan.clusters["dim"] >= 0])
        mine = mine[~mine["stack"].isin([name for name, stack in self.stacks.items() if stack.streams])]  # none writes
        keys = zip(mine["stack"], keys_of(mine), strict=True)
        if left := [key for key in dict.fromkeys(keys) if key not in told]:
            names = ", ".join(f"{stack} {key}".strip() for stack, key in left[:MOST_COORDINATES])
            more = f" and {len(left) - MOST_COORDINATES:,} more" if len(left) > MOST_COORDINATES else ""
            notes.append(f"Not accounted for: {names}{more}: without findings in the first {self.corpus.n_sequences:,} "
                         f"sequences, or not among the {MOST_COORDINATES} largest clusters of a stack.")  # fmt: skip
        if not len(self.scan.findings):
            notes.append("The scan has no findings: what is about their tokens is unavailable.")
        if any(p.via == "softmax" for p in self.model.anatomy.attentions.values()):
            notes.append("This model writes its attention out: logits and values are seen, queries and keys are not.")
        if not self.config.spectrum:
            notes.append("Spectra were not asked for.")
        elif self.config.corpus_spectrum:
            notes += [why for stack in self.stacks.values() if (why := too_wide(stack))]
        if not self.config.columns:
            notes.append("Mass on every key and entropy were not asked for.")
        return notes
