"""Watch massive activations while a model trains, on the training's own forward passes.

Every N steps the first forward pass of the step is seen by the taps of `massact.trace`. Of each sequence and layer:
    top1 >= top2 >= top3 of |h|, the lower median of |h|, ratio = top1 / median (Sun et al. 2024)
    sink mass = mean over heads and queries t >= 1 of the attention on position 0
    value drain = |v_0| / mean over t >= 1 of |v_t|, mean over heads
Means over sequences stay on the device until the step is over; over ranks they are added once. Positions are not told
apart: where batches are padded, padding counts.

Shapes: B sequences, T tokens, D dims, H heads, K key-value heads, L layers of all stacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from massact.models import Model, load, with_attention
from massact.models.wrappers import inside_torch
from massact.records.errors import ProofError, UserError, WorkError
from massact.records.rules import massive
from massact.records.tables import frame
from massact.stats import Dynamics, fit_dynamics
from massact.stats.attention_call import Attended
from massact.stats.dims import sum_dtype
from massact.stats.protocol import Where, to_numpy
from massact.trace import Probe, Seen, observing, unchanged
from massact.trace.compilation import compiled_parts

log = logging.getLogger("massact")

_HIDDEN = ("top1", "top2", "top3", "median", "ratio", "at_first", "massive", "warned", "nonfinite")
_ATTENTION = ("sink_mass", "value_drain")
LOGGED = ("top1", "top2", "top3", "median", "ratio", "sink_mass", "value_drain")
_WIDTH = len(_HIDDEN) + len(_ATTENTION) + 2  # and the counts of sequences of both


@dataclass(frozen=True)
class Alarm:
    """The first step at which a layer met a threshold in at least one sequence.

    Args:
        level: "warning" or "massive".
        step, stack, layer: where. share: of sequences that met it.
        top1, ratio: means over the sequences of that layer.
    """

    level: str
    step: int
    stack: str
    layer: int
    share: float
    top1: float
    ratio: float

    def __str__(self) -> str:
        where = f"{self.stack}/layer {self.layer}" if self.stack else f"layer {self.layer}"
        word = "massive activations" if self.level == "massive" else "activations on the way to massive"
        return f"step {self.step}: {word} at {where}: top {self.top1:.4g}, {self.ratio:.4g} x the median"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while (inner := inside_torch(model)) is not None:
        model = inner
    return model


class Monitor:
    """Statistics of massive activations and attention sinks of every layer, every N steps, in a loop of one's own.

        monitor = Monitor(model, every=100)
        for batch in batches:
            with monitor:                        # sees the first forward pass of steps 1, N, 2 N, ...
                loss = model(**batch).loss
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            monitor.step()
        monitor.history; monitor.last(); monitor.onset; monitor.dynamics()

    Without the `with`, `step()` alone also works from the second step on; call `close()` if the loop is left early.

    Args:
        model: the model, wrapped or not. It must be one that massact can prove (`massact.load`).
        every: N.
        sequences: how many sequences of a forward pass are looked at.
        warn: magnitude and ratio of the earlier warning.
        probe_batch: keyword inputs of a separate small pass in evaluation mode, for models that hooks cannot see into
            (torch.compile); the training's own pass is not looked at then.
        on_alarm: called with an `Alarm` the first time a layer meets the warning, and the first time it is massive;
            by default it goes to the log "massact".
        start: steps that are already done.
        per_layer: what `as_logged` gives: numbers of every layer beside the three of the model.

    Raises:
        UserError: every or sequences below 1; a compiled model without probe_batch; a model that cannot be proved.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        sequences: int = 4,
        warn: tuple[float, float] = (10.0, 100.0),
        probe_batch: Mapping[str, Tensor] | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
        start: int = 0,
        per_layer: bool = False,
    ) -> None:
        if every < 1 or sequences < 1:
            raise UserError(f"every={every}, sequences={sequences}: both must be 1 or more.")
        if probe_batch is None and compiled_parts(model):
            raise UserError(
                "The monitor cannot see into a compiled model.",
                "torch.compile does not run hooks that are installed later.",
                "Give probe_batch, a small batch for a separate forward pass.",
            )
        self.model, self.every, self.sequences, self.warn = model, every, sequences, warn
        self.probe_batch, self.on_alarm = probe_batch, on_alarm or (lambda alarm: log.warning(str(alarm)))
        self.n_steps, self.alarms, self.per_layer = start, list[Alarm](), per_layer
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._read(understood(unwrapped(model), self.notes))
        self._open = ExitStack()
        self._seen: Seen | None = None
        self._asked = False

    def _read(self, model: Model) -> None:
        """Which rows there are, and what is seen for each."""
        self._known = model
        self.sites = [(stack.name, layer) for stack in model.anatomy.stacks for layer in range(stack.n_layers + 1)]
        self.probes = [Probe("hidden", "*.resid_post", partial(HiddenSums, self.warn), self.sequences)]
        if model.anatomy.select_attention("*.attention"):
            self.probes.append(Probe("attention", "*.attention", AttentionSums, self.sequences))

    # ---- a step
    def due(self, step: int) -> bool:
        """Whether a step (from 1) is looked at."""
        return step == 1 or step % self.every == 0

    def __enter__(self) -> Monitor:
        self._asked = True
        if self.probe_batch is None and self.due(self.n_steps + 1) and not self._has_seen():
            self._begin(grad=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> list[dict[str, Any]] | None:
        """To be called after every optimizer step, on every rank.

        Returns:
            The rows of the step, one for each layer, where the step was due; see the table "monitor".

        Raises:
            WorkError: nothing was seen of the forward pass.
        """
        self.n_steps += 1
        rows = None
        if self.due(self.n_steps) and (self._asked or self._seen is not None or self.probe_batch is not None):
            rows = self.finish(self.n_steps)
        if not self._asked and self.probe_batch is None and self.due(self.n_steps + 1):
            self._begin(grad=True)
        return rows

    def close(self) -> None:
        """Look no longer."""
        self._open.close()
        if not self._has_seen():
            self._seen = None

    def _begin(self, grad: bool) -> None:
        """Look from now on; `grad`: what runs without gradients (an evaluation) is not looked at."""
        self.close()
        look = observing(self._known, self.probes, first=lambda: torch.is_grad_enabled() is grad, lenient=("sites",))
        self._seen = self._open.enter_context(look)

    def _has_seen(self) -> bool:
        return self._seen is not None and any(s.n for s in self._seen.statistics.values() if isinstance(s, HiddenSums))

    def finish(self, step: int) -> list[dict[str, Any]]:
        """Reduce what was seen of a step, once over all ranks, and keep its rows.

        Raises:
            WorkError: nothing was seen, and there is no probe batch.
        """
        self.close()
        if self.probe_batch is not None:
            self._probe(self.probe_batch)
        if self._seen is None or not self._has_seen():
            raise WorkError(
                f"The monitor saw nothing of the forward pass of step {step}.",
                "It did not run inside `with monitor:`, or hooks are not run (torch.compile, or a copy of the model).",
                "Give probe_batch, a small batch for a separate forward pass.",
            )
        known = {key: s.sums for key, s in self._seen.statistics.items() if isinstance(s, _Sums) and s.sums is not None}
        like = next(iter(known.values()))
        table_LX = torch.zeros(len(self.sites), _WIDTH, dtype=like.dtype, device=like.device)
        for (name, site), sums in known.items():
            columns = slice(0, len(_HIDDEN) + 1) if name == "hidden" else slice(len(_HIDDEN) + 1, None)
            table_LX[self.sites.index((site.stack, site.layer)), columns] = sums.to(like.device)
        self._seen = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(table_LX)
        rows = [self._row(step, site, x) for site, x in zip(self.sites, table_LX.tolist(), strict=True)]
        self.rows += rows
        self._alarm(rows)
        return rows

    def _row(self, step: int, site: tuple[str, int], sums: list[float]) -> dict[str, Any]:
        """One line of the table from the sums over sequences."""
        n, n_attention = sums[len(_HIDDEN)], sums[-1]
        hidden, attention = sums[: len(_HIDDEN)], sums[len(_HIDDEN) + 1 : -1]
        row: dict[str, Any] = {"step": step, "stack": site[0], "layer": site[1]}
        row |= {name: x / n if n else float("nan") for name, x in zip(_HIDDEN, hidden, strict=True)}
        row |= {name: x / n_attention if n_attention else float("nan")
                for name, x in zip(_ATTENTION, attention, strict=True)}  # fmt: skip
        return row | {"nonfinite": int(hidden[-1]), "n_sequences": int(n)}

    def _probe(self, batch: Mapping[str, Tensor]) -> None:
        """A separate forward pass, which changes neither mode nor random state of the training."""
        module = unwrapped(self.model)
        device = next(module.parameters()).device
        with unchanged(module, values=True), torch.no_grad():
            self._begin(grad=False)
            try:
                module(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
            finally:
                self.close()

    def _alarm(self, rows: list[dict[str, Any]]) -> None:
        """Report every layer that meets a threshold for the first time."""
        known = {(a.level, a.stack, a.layer) for a in self.alarms}
        for level, column in (("warning", "warned"), ("massive", "massive")):
            for row in rows:
                if row[column] > 0 and (level, row["stack"], row["layer"]) not in known:
                    said = {k: row[k] for k in ("step", "stack", "layer", "top1", "ratio")}
                    self.alarms.append(Alarm(level, share=row[column], **said))
                    self.on_alarm(self.alarms[-1])

    # ---- what is known
    @property
    def onset(self) -> Alarm | None:
        """Where massive activations (sun2024) were met first; None as long as there are none."""
        return next((a for a in self.alarms if a.level == "massive"), None)

    @property
    def history(self) -> pd.DataFrame:
        """All rows: the table "monitor"."""
        return frame("monitor", self.rows)

    def last(self) -> pd.DataFrame:
        """The last step that was looked at, a line for each layer: its numbers, and the share that is massive.

        Returns:
            Columns `LOGGED` and massive, and nonfinite where there is any; the index is the layer (with more than one
            stack its name too), and the name of the columns says which step it is. Empty before the first look.
        """
        rows = self.history
        rows = rows[rows["step"] == rows["step"].max()]
        index = ["stack", "layer"] if rows["stack"].nunique() > 1 else ["layer"]
        columns = [*LOGGED, "massive", *(["nonfinite"] if rows["nonfinite"].any() else [])]
        return rows.set_index(index)[columns].rename_axis(columns=f"step {rows['step'].max()}" if len(rows) else None)

    def restore(self, history: pd.DataFrame, alarms: list[dict[str, Any]]) -> None:
        """Go on from the history of an interrupted training."""
        self.rows = history.to_dict(orient="records")
        self.alarms = [Alarm(**a) for a in alarms]

    def as_logged(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Rows of a step as scalars for a logger, those that are known.

        massact/top1_max and massact/ratio_max = the greatest top1 and ratio of all layers;
        massact/onset = the first step with massive activations (sun2024), once there is one.
        With `per_layer` also massact/layer_03/top1 and so on, of a named stack massact/encoder/layer_03/top1.
        """
        logged: dict[str, float] = {}
        for name in ("top1", "ratio"):
            known = [row[name] for row in rows if row[name] == row[name]]
            logged |= {f"massact/{name}_max": max(known)} if known else {}
        logged |= {"massact/onset": float(self.onset.step)} if self.onset is not None else {}
        for row in rows if self.per_layer else ():
            layer = f"massact/{row['stack'] + '/' if row['stack'] else ''}layer_{row['layer']:02d}"
            logged |= {f"{layer}/{k}": row[k] for k in LOGGED if row[k] == row[k]}
        return logged

    def dynamics(self, value: str = "ratio") -> pd.DataFrame:
        """The Hidden-Dynamics curve of every layer, with R^2; see `fit_dynamics`.

        Args:
            value: column of the history that is fitted over the steps.
        """
        return dynamics_of(self.history, value)


def dynamics_of(history: pd.DataFrame, value: str = "ratio") -> pd.DataFrame:
    """Fit the Hidden-Dynamics curve to a table "monitor": one row for each stack and layer."""
    rows = []
    for (stack, layer), part in history.groupby(["stack", "layer"], sort=False):
        fitted: Dynamics = fit_dynamics(part["step"], part[value])
        rows.append({"stack": stack, "layer": layer} | fitted.as_dict())
    return pd.DataFrame(rows)


def understood(module: nn.Module, notes: list[str]) -> Model:
    """A live module with its proved anatomy and attention, left as it was; what cannot be seen goes into the notes.

    Raises:
        UserError: the module cannot be proved.
    """
    with unchanged(module, values=True):
        model = load(module)
        try:
            model = with_attention(model)
        except ProofError as error:
            notes.append(f"Attention is not monitored: {error.what} {error.why}")
    for site, reason in model.anatomy.no_attention.items():
        notes.append(f"{site} is not monitored: {reason}.")
    return model


class _Sums:
    """Sums over sequences, on the device that they are seen on.

    `n`: sequences. `sums`: of each number, and n behind them; None where nothing was seen.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sums: Tensor | None = None

    def add(self, numbers: list[Tensor]) -> None:
        """One sequence more; nothing synchronises."""
        new = torch.stack([x.float() if x.dtype != torch.float64 else x for x in numbers])
        self._add(1, torch.cat([new, new.new_ones(1)]).to(sum_dtype(new.device)))

    def _add(self, n: int, sums: Tensor) -> None:
        self.n += n
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums

    def merge(self, other: Self) -> None:
        """Add what another one has seen."""
        if other.sums is not None:
            self._add(other.n, other.sums)

    def result(self) -> np.ndarray:
        """The sums, and the number of sequences; nothing where none was seen."""
        return np.zeros(0) if self.sums is None else to_numpy(self.sums)


class HiddenSums(_Sums):
    """Sums of the statistics of a hidden state.

    Args:
        warn: magnitude and ratio of the earlier warning.
    """

    def __init__(self, warn: tuple[float, float]) -> None:
        super().__init__()
        self.warn = warn

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one sequence."""
        x_V = h_TD.detach().flatten()
        x_V = x_V if x_V.dtype in (torch.float32, torch.float64) else x_V.float()
        finite_V, mag_V = torch.isfinite(x_V), x_V.abs()
        top = torch.where(finite_V, mag_V, -1.0).topk(min(3, len(x_V)))
        top_3 = nn.functional.pad(top.values, (0, 3 - len(top.values)), value=float("nan"))
        median = torch.where(finite_V, mag_V, float("nan")).nanmedian()
        numbers = [*top_3.unbind(), median, top_3[0] / median, top.indices[0] < h_TD.shape[-1]]
        numbers += [massive(top_3[0], median), massive(top_3[0], median, *self.warn), (~finite_V).sum()]
        self.add(numbers)


class AttentionSums(_Sums):
    """Sums of sink mass and value drain."""

    def update(self, a: Attended, where: Where) -> None:
        """Take the attention call of one sequence."""
        first, rows = torch.zeros(1, dtype=torch.long, device=a.device), slice(1, None)
        seen_H = a.sees(rows, first).sum((1, 2))
        mass = (a.probs(first, rows).sum((1, 2)) / seen_H).nanmean()
        drain = torch.full_like(mass, float("nan"))
        if a.v_KSF is not None:
            norm_KS = torch.linalg.vector_norm(a.v_KSF, dim=-1, dtype=torch.float32)
            drain = (norm_KS[:, 0] / norm_KS[:, 1:].mean(1)).mean()
        self.add([mass, drain])


def alarms_as_dicts(alarms: list[Alarm]) -> list[dict[str, Any]]:
    """Alarms for a record."""
    return [asdict(a) for a in alarms]
