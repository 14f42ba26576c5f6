"""`scan_checkpoints`: the same scan of every checkpoint of a training, and the trajectory that they make.

trajectory.json     what was asked, which checkpoints, which failed, where massive activations emerge
revisions.parquet   a row for each checkpoint and layer
NAME/               of each checkpoint, a run directory like that of any scan
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from massact.corpora import AnySource, Corpus, Source
from massact.corpora import corpus as make_corpus
from massact.models import Model, load
from massact.positions import ready_corpus
from massact.records.disk import leftovers
from massact.records.errors import MassactError, UserError, WorkError, class_and_line
from massact.records.kinds.scan import ScanResult, open_run
from massact.records.kinds.trajectory import CheckpointRecord, Trajectory, TrajectoryInfo
from massact.records.run import read_info
from massact.records.runinfo import git_state, jsonable
from massact.scans.checkpoint_names import Checkpoint, in_order
from massact.scans.criteria import criterion
from massact.scans.emergence import alike, dynamics, emergence, rows_of, summaries
from massact.scans.job import Progress, Text, named, scan_text
from massact.verbs.scan import ScanConfig

# Of the last checkpoint only: they say of a model what the others need not repeat.
CONTROLS = ("null", "bos_contrast")


def scan_checkpoints(
    checkpoints: list[Checkpoint],
    corpus: Any = None,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    progress: Progress | None = None,
    each: Callable[[ScanResult, Path], object] | None = None,
    load_options: dict[str, Any] | None = None,
    **options: Any,
) -> Trajectory:
    """Scan checkpoints of one training on the same tokens, one in memory at a time.

    Args:
        checkpoints: see `revisions_of` and `checkpoints_in`; put in the order of their steps.
        corpus: as for `scan`; read once. A checkpoint whose tokenizer makes other tokens of it is refused.
        out: directory of the trajectory; each checkpoint gets a run directory in it.
        resume: go on with the trajectory in `out`: finished checkpoints are read, the others scanned. The list may
            have grown.
        progress: called with (stage, done, total).
        each: called with the result of every checkpoint and its run directory, for figures.
        load_options: keyword arguments of `load`: device, dtype, options.
        **options: see `ScanConfig`; `null` and `bos_contrast` are of the last checkpoint only, and off unless given.

    Returns:
        The trajectory; checkpoints that failed are in its record, and the others went on.

    Raises:
        UserError: bad options, or `out` holds something else.
        WorkError: no checkpoint could be scanned.
    """
    if not checkpoints:
        raise UserError("There are no checkpoints to scan.", do="Name at least one.")
    config = ScanConfig.of({"null": False, "bos_contrast": False} | options)
    rule = criterion(config.criterion)
    loading = dict(load_options or {})
    info = TrajectoryInfo(
        config=_asked(config) | {"corpus": named(corpus), "dtype": loading.get("dtype", "auto")},
        model={"id": _origin(checkpoints[0])},
        criterion=jsonable(rule.as_dict(rule.resolved(config.thresholds))),
        checkpoints=[CheckpointRecord(_plain(c.name), c.step, c.folder) for c in in_order(checkpoints)],
        git=git_state(),
    )
    path = Path(out)
    _check(path, info, resume)
    source = corpus if isinstance(corpus, Corpus | AnySource) else make_corpus(corpus, text_column=config.text_column)
    made = _begun(path, info)
    job = _Job(in_order(checkpoints), source, named(corpus), config, loading, path, info, progress or (lambda *_: None))
    began = time.perf_counter() - info.wall_s
    try:
        return job.run(each or (lambda *_: None), began)
    except KeyboardInterrupt:
        job.write("interrupted", began)
        raise
    except MassactError:
        if not job.done:
            _withdrawn(path, made)
        raise


def _origin(c: Checkpoint) -> str:
    """The Hub model that revisions are of, or the name of the folder that holds the checkpoints."""
    return c.spec if c.revision is not None else _plain(Path(c.spec).absolute().parent.name)


def _asked(config: ScanConfig) -> dict[str, Any]:
    return {k: v for k, v in config.record().items() if k not in CONTROLS}


def _plain(name: str) -> str:
    """A name that a table can hold: what is no Unicode becomes an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check(path: Path, info: TrajectoryInfo, resume: bool) -> None:
    """Refuse a directory that is not ours; a trajectory that is gone on with hands on what it knows."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file.", do="Give a directory.")
        before = Trajectory.open(path) if (path / Trajectory.FILE).is_file() else None
        if before is None and path.exists() and set(path.iterdir()) - set(leftovers(path)):
            raise UserError(f"--out {path} is not empty and holds no trajectory.", do="Give a new or empty directory.")
    except OSError as error:
        raise UserError(f"--out {path} cannot be read.", error.strerror or str(error),
                        "Give another directory.") from None  # fmt: skip
    if before is None:
        return
    if not resume:
        raise UserError(f"--out {path} already holds a trajectory (status {before.info.status}).",
                        do="Go on with it: --resume. Or give another directory.")  # fmt: skip
    for what in ("config", "model", "criterion"):
        ours, theirs = jsonable(getattr(info, what)), getattr(before.info, what)
        if ours != theirs:
            differing = [f"{k}: {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in sorted({*ours, *theirs})
                         if ours.get(k) != theirs.get(k)]  # fmt: skip
            raise UserError(f"The trajectory in {path} has another {what}; it cannot be gone on with.",
                            "; ".join(differing[:3]), "Use the same options, or another --out.")  # fmt: skip
    info.corpus, info.started, info.wall_s = before.info.corpus, before.info.started, before.info.wall_s
    info.notes = before.info.notes


def _begun(path: Path, info: TrajectoryInfo) -> list[Path]:
    """Write the first record; gives the folders that were made for it."""
    made = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written.", error.strerror or str(error),
                        "Give another directory.") from None  # fmt: skip
    if not (path / Trajectory.FILE).is_file():
        Trajectory(info).save(path)
    return made


def _withdrawn(path: Path, made: list[Path]) -> None:
    """Leave nothing behind where no checkpoint could so much as be read: the name may be mistyped."""
    ours = [path / Trajectory.FILE, path / "revisions.parquet"]
    if set(path.iterdir()) <= set(ours):
        for file in ours:
            file.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


@dataclass
class _Job:
    """One trajectory under way."""

    checkpoints: list[Checkpoint]
    source: Corpus | AnySource
    named: str | None
    config: ScanConfig
    loading: dict[str, Any]
    path: Path
    info: TrajectoryInfo
    progress: Progress
    done: dict[str, ScanResult] = field(default_factory=dict)
    borrowed: list[Any] = field(default_factory=list)

    def run(self, each: Callable[[ScanResult, Path], object], began: float) -> Trajectory:
        """All checkpoints; the record is written after each of them."""
        errors: list[MassactError] = []
        records = dict(zip(self.checkpoints, self.info.checkpoints, strict=True))
        # Finished ones first: they say what tokens the others must read.
        for one in self.checkpoints:
            if (result := self.finished(one)) is not None:
                self.keep(one, records[one], result)
        for i, (one, record) in enumerate(records.items()):
            self.progress("checkpoints", i, len(records))
            if one.folder not in self.done:
                try:
                    self.keep(one, record, self.scanned(one, record))
                except Exception as error:  # one checkpoint must not cost the others
                    record.status, record.error = "failed", _said(error)
                    errors.append(error if isinstance(error, MassactError) else WorkError(_said(error)))
                _free()
            if (result := self.done.get(one.folder)) is not None:
                each(result, self.path / one.folder)
                result.dims, result.portrait = result.dims.head(0), {}  # large, and no longer needed
            self.write("running", began)
        self.progress("checkpoints", len(records), len(records))
        done = self.write("ok" if self.done else "failed", began)
        if not self.done:
            kind = UserError if all(isinstance(e, UserError) for e in errors) else WorkError
            raise kind(f"None of the {len(records):,} checkpoints could be scanned.", "\n".join(told(self.info, 5)),
                       errors[0].do if len({e.do for e in errors}) == 1 else "")  # fmt: skip
        return done

    def options_of(self, one: Checkpoint) -> ScanConfig:
        """The options of one checkpoint: the controls are of the last."""
        if one == self.checkpoints[-1]:
            return self.config
        return self.config.changed(null=False, bos_contrast=False)

    def finished(self, one: Checkpoint) -> ScanResult | None:
        """The finished run of a checkpoint, where there is one of these options."""
        folder = self.path / one.folder
        if not (folder / "run.json").is_file():
            return None
        try:
            info = read_info(folder)
            ours = _asked(self.config) | {"corpus": self.named}
            theirs = {k: v for k, v in info.config.items() if k not in CONTROLS}
            same_text = not self.info.corpus or info.corpus.get("sha256") == self.info.corpus.get("sha256")
            return open_run(folder) if info.status == "ok" and ours == theirs and same_text else None
        except UserError:  # damaged: the scan of this checkpoint says so
            return None

    def scanned(self, one: Checkpoint, record: CheckpointRecord) -> ScanResult:
        """Load a checkpoint and scan it; nothing of the model is kept."""
        self.progress("load", 0, 1)
        model = load(one.spec, revision=one.revision, **self.loading)
        self.progress("load", 1, 1)
        notes = self.with_tokenizer(model)
        config = self.options_of(one)
        ready = ready_corpus(model, self.source, config)
        known = self.info.corpus.get("sha256")
        if known is not None and ready.sha256 != known:
            raise UserError(
                f"{one.name} reads other tokens than the checkpoints before it.",
                f"Its tokenizer makes a corpus with the hash {ready.sha256[:12]}..., theirs has {known[:12]}...",
                "Their numbers could not be compared: scan it on its own.",
            )
        text = Text(self.source, ready, self.named)
        out = self.path / one.folder
        result = scan_text(model, text, config, out=out, resume=True, progress=self.progress)
        self.info.notes += notes
        return result

    def with_tokenizer(self, model: Model) -> list[str]:
        """A checkpoint without a tokenizer reads with that of the first one that has one."""
        if not isinstance(self.source, Source) or model.tokenizer is not None:
            return []
        if not self.borrowed:
            from massact.models.transformers_models import read_tokenizer  # transformers is slow to import

            more = self.loading.get("options") or {}
            read = (read_tokenizer(c.spec, c.revision, dict(more)) for c in self.checkpoints)
            found = next(((c, t) for c, t in zip(self.checkpoints, read, strict=True) if t is not None), None)
            if found is None:
                return []
            self.borrowed.append(found)
        lender, model.tokenizer = self.borrowed[0]
        note = f"Checkpoints without a tokenizer were read with that of {_plain(lender.name)}."
        return [] if note in self.info.notes else [note]

    def keep(self, one: Checkpoint, record: CheckpointRecord, result: ScanResult) -> None:
        """Take the result of a checkpoint into the record."""
        self.done[one.folder] = result
        record.status, record.error, record.stacks = "ok", None, summaries(result)
        kept = ("architecture", "n_layers", "d_model", "dtype", "weights_sha256", "revision")
        record.model = {k: result.info.model.get(k) for k in kept}
        self.info.corpus = self.info.corpus or result.info.corpus

    def write(self, status: str, began: float) -> Trajectory:
        """The trajectory as far as it goes, also on disk."""
        info = self.info
        results = [(c, self.done[c.folder]) for c in info.checkpoints if c.folder in self.done]
        revisions = rows_of(results)
        info.status, info.wall_s = status, round(time.perf_counter() - began, 3)
        info.emergence = emergence(info.having("ok"))
        if status != "running":
            info.dynamics = dynamics(revisions)
            info.notes = list(dict.fromkeys(info.notes + alike(info.having("ok"))))
        made = Trajectory(info, revisions, self.path)
        made.save(self.path)
        if status == "ok":
            for left in leftovers(self.path):
                left.unlink(missing_ok=True)
        return made


def told(info: TrajectoryInfo, most: int = 20) -> list[str]:
    """The checkpoints that failed, a line each."""
    failed = info.having("failed")
    lines = [f"{c.name}: {c.error}" for c in failed[:most]]
    return lines + [f"... and {len(failed) - most:,} more."] * (len(failed) > most)


def _said(error: Exception) -> str:
    """What failed, on one line."""
    if isinstance(error, MassactError):
        return " ".join(part for part in (error.what, error.why) if part)
    return class_and_line(error)


def _free() -> None:
    """Give back the memory of a model before the next one is read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
