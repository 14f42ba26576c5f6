"""`train`: one training from a configuration to a run directory, resumed exactly where it was interrupted.

train.json         what was asked, of what, how it ended (running, ok, failed, interrupted)
training.parquet   loss, rate, gradient, time;  monitor.parquet   massive activations of every layer
checkpoints/       checkpoint-N, each whole or not there
model/             the trained model and its tokenizer: `massact scan OUT/model`
data/              the tokens, unless they lie elsewhere;  tensorboard/   where that is asked for
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from massact.models import weights_hash
from massact.records.disk import disk_full, leftovers
from massact.records.errors import MassactError, UserError, WorkError, near
from massact.records.kinds.training import Trained, TrainInfo
from massact.records.runinfo import git_state, versions
from massact.records.sidecars import write_sidecar
from massact.records.tables import frame
from massact.training import checkpoints
from massact.training.components import build_model, n_trained, tokenizer_of
from massact.training.configs import TrainConfig
from massact.training.data import Pictures, Progress, Windows, prepare, read_pictures, split
from massact.training.monitor import alarms_as_dicts, dynamics_of, unwrapped

Row = dict[str, Any]
log = logging.getLogger("massact")


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass
class _Data:
    """What is read: items for training, items for evaluation, and what goes into the record."""

    train: Dataset
    held: Dataset
    record: dict[str, Any]


def train(
    config: TrainConfig | str,
    out: str | Path,
    data: Any = None,
    *,
    tokenizer: Any = None,
    resume: bool = False,
    progress: Progress = _silent,
    on_row: Callable[[Row], object] | None = None,
    callbacks: Iterable[Any] = (),
) -> Trained:
    """Train a model with the Hugging Face Trainer, and watch its massive activations.

    Several processes: start the script with `accelerate launch` or torchrun, FSDP by its configuration.

    Args:
        config: what to train, or the name of a recipe.
        out: run directory.
        data: a text file or folder, a list of texts, `Tokens`, or the name of a data set (streamed); None: the
            embedded text. For image models an .npz file, or a pair (images, labels) of arrays.
        tokenizer: None: the one that the configuration names.
        resume: go on with the interrupted training in `out`.
        progress: called with (stage, done, total). on_row: called with every row of the table "training".
        callbacks: further callbacks of the Trainer.

    Returns:
        The record and its tables; the model is in `out/model`.

    Raises:
        UserError: bad configuration or data; `out` holds a training and resume is off, or the other way round; a
            training is resumed with another configuration or other data.
        WorkError: the disk is full, or the loss is not finite; the last good checkpoint is kept.
    """
    config = TrainConfig.of(config) if isinstance(config, str) else config
    out = Path(out)
    before = _before(config, out, resume)
    if before is not None and before.info.status == "ok":
        return before
    _need("accelerate", "The Hugging Face Trainer needs it.")
    check_reporters(config.report_to)
    info = TrainInfo(config=config.as_dict(), git=git_state(), notes=list(config.notes))
    if before is not None:
        info.corpus, info.started, info.wall_s = before.info.corpus, before.info.started, before.info.wall_s
        info.notes += [n for n in before.info.notes if n not in info.notes]
    info.versions = versions() | _more_versions()
    run = _Run(config, out, info, time.time() - info.wall_s)
    run.write()
    try:
        return run.work(data, tokenizer, resume, progress, on_row, callbacks)
    except KeyboardInterrupt:
        run.end("interrupted")
        raise
    except MassactError as error:
        run.end("failed", str(error))
        raise
    except Exception as error:
        run.end("failed", f"{type(error).__name__}: {error}")
        if disk_full(error):
            raise WorkError(
                f"The disk is full: step {run.step} could not be saved in {out}.",
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                f"{run.kept()} Make room, then go on with resume (--resume).",
            ) from error
        raise


def _before(config: TrainConfig, out: Path, resume: bool) -> Trained | None:
    """The training that `out` holds, where it is to be resumed.

    Raises:
        UserError: there is one and it is not to be resumed, or there is none, or it is of another configuration.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file.", do="Name a directory for the run.")
    if not resume and os.environ.get("RANK", "0") != "0":
        return None  # the first process looks, and has by now written its own record
    before = Trained.open(out)
    if before is None:
        if resume:
            raise UserError(f"There is no training in {out}.", "It has no train.json.", "Leave --resume out.")
        return None
    if not resume:
        raise UserError(f"{out} holds a training (status {before.info.status}).",
                        do="Go on with it: --resume. Or name another directory.")  # fmt: skip
    differing = config.differences(before.info.config)
    if differing:
        raise UserError(
            f"The training in {out} has another configuration: {'; '.join(differing)}.",
            "Resumed, it would be neither the one nor the other.",
            "Give the options that it was started with, or another directory.",
        )
    return before


class _Run:
    """A training under way."""

    def __init__(self, config: TrainConfig, out: Path, info: TrainInfo, began: float) -> None:
        self.config, self.out, self.info, self.began = config, out, info, began
        self.trainer: Any = None
        self.main = int(os.environ.get("RANK", "0")) == 0

    @property
    def step(self) -> int:
        """Steps done."""
        return 0 if self.trainer is None else self.trainer.state.global_step

    def kept(self) -> str:
        """Which checkpoint is there."""
        found = checkpoints.newest(self.out / "checkpoints", [])
        return f"{found.name} is whole." if found else "There is no checkpoint yet."

    def write(self) -> None:
        """Write train.json."""
        if not self.main:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_sidecar(self.out / "train.json", self.info)
        except OSError as error:
            kind = WorkError if disk_full(error) else UserError
            raise kind(f"{self.out} cannot be written.", error.strerror or str(error)) from error

    def end(self, status: str, error: str | None = None) -> None:
        """Record an end that is none; a full disk must not hide why it came to that."""
        self.info.status, self.info.error, self.info.wall_s = status, error, round(time.time() - self.began, 3)
        if self.trainer is not None and self.trainer.watcher is not None:
            self.trainer.watcher.monitor.close()
        try:
            self.write()
        except MassactError as refused:
            log.warning("train.json could not be written: %s", refused)

    def work(
        self,
        data: Any,
        tokenizer: Any,
        resume: bool,
        progress: Progress,
        on_row: Callable[[Row], object] | None,
        callbacks: Iterable[Any],
    ) -> Trained:
        """Everything between the first record and the last."""
        from massact.training.callback import MassiveActivationsCallback
        from massact.training.loop import MassactTrainer, Recorder

        config, root = self.config, self.out / "checkpoints"
        if self.main and resume:
            for left in [*leftovers(self.out), *leftovers(self.out / "data")]:  # of the process that was killed
                left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)
        if not config.images and tokenizer is None:
            tokenizer = tokenizer_of(config)
        read = self._pictures(data) if config.images else self._text(data, tokenizer, progress)
        self._same_data(read.record)
        if self.main:
            root.mkdir(parents=True, exist_ok=True)
            checkpoints.tidy(root)
        found = checkpoints.newest(root, self.info.notes) if resume else None
        if resume and found is None:
            self.info.notes.append("There was no checkpoint to go on from: it began again at step 0.")
        model = build_model(config)
        self.info.model = {"id": str(self.out / "model"), "name": config.name, "architecture": type(model).__name__,
                           "n_parameters": n_trained(model)}  # fmt: skip
        watcher = None
        if config.monitor_every:
            batch = torch.utils.data.default_collate([read.held[i] for i in range(min(len(read.held), 4))])
            probe = batch if config.compile else None
            watcher = MassiveActivationsCallback(
                config.monitor_every, sequences=config.monitor_sequences, probe_batch=probe, per_layer=config.per_layer
            )
        try:
            arguments = self._arguments(root)
        except UserError:
            raise
        except ValueError as error:  # for instance a GPU that has no bf16
            raise UserError("The Trainer refuses this configuration.", str(error),
                            "Set dtype=float32, or another option that it names.") from error  # fmt: skip
        self.trainer = MassactTrainer(
            config, Recorder(config, progress, on_row), watcher, model=model, args=arguments,
            train_dataset=read.train, eval_dataset=read.held, processing_class=tokenizer,
            data_collator=torch.utils.data.default_collate, callbacks=[*self._reporters(), *callbacks],
        )  # fmt: skip
        self._quiet()
        self.info.notes += [n for n in (watcher.monitor.notes if watcher else []) if n not in self.info.notes]
        self.info.device = str(self.trainer.args.device)
        if found is not None:
            self.trainer.restore(found)
        self.write()
        self.trainer.train(resume_from_checkpoint=None if found is None else str(found))
        return self._finish()

    def _finish(self) -> Trained:
        """Save the model and the tables, and close the record."""
        trainer, info = self.trainer, self.info
        self._save_model()
        info.model["weights_sha256"] = weights_hash(unwrapped(trainer.model))
        rows = trainer.recorder.rows
        losses = [r["loss"] for r in rows if r["loss"] == r["loss"]]
        evals = [r["eval_loss"] for r in rows if r["eval_loss"] == r["eval_loss"]]
        info.losses = {"step": self.step, "tokens": self.step * self.config.tokens_per_step,
                       "train_loss": losses[-1], "eval_loss": evals[-1]}  # fmt: skip
        history = frame("monitor")
        if trainer.watcher is not None:
            monitor = trainer.watcher.monitor
            history, info.alarms = monitor.history, alarms_as_dicts(monitor.alarms)
            info.dynamics = dynamics_of(history).to_dict(orient="records")
        info.status, info.error, info.wall_s = "ok", None, round(time.time() - self.began, 3)
        done = Trained(info, frame("training", rows), history, self.out)
        if self.main:
            done.save(self.out)
        trainer.accelerator.wait_for_everyone()
        return done

    def _save_model(self) -> None:
        """The model in Hugging Face form; whole or not there."""
        made, place = self.out / ".model.tmp", self.out / "model"
        if self.main:
            shutil.rmtree(made, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.save_model(str(made))
        if self.main:
            (made / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(made, place)

    # ---- data
    def _text(self, data: Any, tokenizer: Any, progress: Progress) -> _Data:
        config, vocab = self.config, self.config.model.get("vocab_size", 0)
        if vocab and len(tokenizer) > vocab:
            raise UserError(f"The tokenizer has {len(tokenizer)} tokens, the model {vocab}.",
                            do=f"Set model.vocab_size={len(tokenizer)} or more, or another tokenizer.")  # fmt: skip
        tokens = prepare(data, tokenizer, self.out / "data", progress=progress)
        ids, held = split(tokens, config.val_share)
        n = config.steps * config.batch_total
        both = (
            Windows(ids, config.seq_len, n, config.seed, config.order, config.skip_first),
            Windows(held, config.seq_len, config.eval_windows, 0, "even", config.skip_first),
        )
        return _Data(*both, asdict(tokens.header))

    def _pictures(self, data: Any) -> _Data:
        config = self.config
        if data is None:
            raise UserError(f"{config.name} needs images.", do="Give an .npz file with images and labels.")
        images, labels = data if isinstance(data, tuple) else read_pictures(data)
        n_held = max(1, round(config.val_share * len(images)))
        cut = len(images) - n_held
        n = config.steps * config.batch_total
        digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + np.ascontiguousarray(labels).tobytes())
        held = Pictures(images[cut:], labels[cut:], min(config.eval_windows, n_held))
        return _Data(Pictures(images[:cut], labels[:cut], n, config.seed), held,
                     {"kind": "images", "n_images": len(images), "tokens_sha256": digest.hexdigest()})  # fmt: skip

    def _same_data(self, record: dict[str, Any]) -> None:
        known, now = self.info.corpus.get("tokens_sha256"), record["tokens_sha256"]
        if known is not None and known != now:
            raise UserError(f"The training in {self.out} read other data.",
                            f"Their hash was {known[:12]}, not {now[:12]}.",
                            "Give the data that it was started with, or another directory.")  # fmt: skip
        self.info.corpus = record

    # ---- the Trainer
    def _arguments(self, root: Path) -> Any:
        from transformers import TrainingArguments

        c, world = self.config, int(os.environ.get("WORLD_SIZE", "1"))
        if c.accumulate % world:
            raise UserError(f"accumulate={c.accumulate} cannot be shared by {world} processes.",
                            do=f"Set accumulate to a multiple of {world}.")  # fmt: skip
        cpu = c.device == "cpu" or not torch.accelerator.is_available()
        return TrainingArguments(
            output_dir=str(root), per_device_train_batch_size=c.batch, per_device_eval_batch_size=c.batch,
            gradient_accumulation_steps=c.accumulate // world, max_steps=c.steps, learning_rate=c.lr,
            max_grad_norm=c.clip, bf16=c.dtype == "bf16", torch_compile=c.compile, logging_steps=c.log_every,
            eval_strategy="steps", eval_steps=c.eval_every or c.steps, seed=c.seed, data_seed=c.seed,
            save_strategy="steps" if c.save_every else "no", save_steps=c.save_every or c.steps,
            report_to=[r for r in c.report_to if r != "tensorboard"] or "none", disable_tqdm=True,
            logging_nan_inf_filter=False, dataloader_num_workers=c.workers, remove_unused_columns=False,
            use_cpu=cpu, train_sampling_strategy="sequential", prediction_loss_only=True,
            label_names=["labels"], ddp_find_unused_parameters=False,
            dataloader_pin_memory=not cpu and torch.cuda.is_available(),
        )  # fmt: skip

    def _reporters(self) -> list[Any]:
        """TensorBoard in the run directory, and weight rescaling, where they are asked for."""
        found: list[Any] = []
        if "tensorboard" in self.config.report_to and self.main:
            if importlib.util.find_spec("tensorboard") is None:
                self.info.notes.append("tensorboard is not installed: nothing was written for it.")
            else:
                from torch.utils.tensorboard import SummaryWriter
                from transformers.integrations import TensorBoardCallback

                found.append(TensorBoardCallback(SummaryWriter(str(self.out / "tensorboard"))))
        if self.config.rescale_every:
            from massact.training.optimisers import TargetVarianceRescaling

            found.append(TargetVarianceRescaling(every=self.config.rescale_every))
        return found

    def _quiet(self) -> None:
        """The Trainer prints every log; ours are in the table and on the progress line."""
        from transformers import PrinterCallback

        self.trainer.remove_callback(PrinterCallback)


def check_reporters(names: Iterable[str]) -> None:
    """Refuse integrations that the Trainer has not, or whose package is missing, before anything is read.

    TensorBoard, which recipes ask for by themselves, is left out with a note where it is missing.

    Raises:
        UserError: says which are near, or what to install.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    there = [*get_available_reporting_integrations(), "tensorboard", "none", "all"]
    for name in names:
        if name not in (*KNOWN, "none", "all"):
            raise UserError(f"The Trainer cannot report to {name!r}.", do=near(name, KNOWN))
        if name not in there:
            raise UserError(f"report_to={name!r} needs a package that is not installed.",
                            do=f"Install it: pip install {name.replace('_', '-')}")  # fmt: skip


def _need(package: str, why: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"The package `{package}` is not installed.", why, 'pip install "massact[train]"')


def _more_versions() -> dict[str, str]:
    from importlib import metadata

    return {"accelerate": metadata.version("accelerate")}
