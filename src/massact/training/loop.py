"""The Hugging Face Trainer, with checkpoints that are whole or not there, and a record of every logged step."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from massact.models.transformers_models import without_bars
from massact.records.errors import WorkError
from massact.records.tables import frame, read_table, write_table
from massact.training import checkpoints
from massact.training.callback import MassiveActivationsCallback
from massact.training.components import Loss, build_optimizer
from massact.training.configs import TrainConfig, rate
from massact.training.monitor import alarms_as_dicts

Row = dict[str, Any]


class Recorder(TrainerCallback):
    """Keeps one row for every logged or evaluated step: the table "training".

    Args:
        config: what is trained.
        progress: called with ("train", steps done, steps).
        on_row: called with every row.
    """

    def __init__(
        self, config: TrainConfig, progress: Callable[[str, int, int], None], on_row: Callable[[Row], object] | None
    ) -> None:
        self.config, self.progress, self.on_row = config, progress, on_row
        self.rows: list[Row] = []
        self.began, self.spent_s, self.n = 0.0, 0.0, 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Stop it; the last step is always logged."""
        self.spent_s += time.perf_counter() - self.began
        self.n += 1
        if state.global_step >= state.max_steps:
            control.should_log = True
        self.progress("train", state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Keep what the Trainer logs."""
        logs, nan, step = kw.get("logs") or {}, float("nan"), state.global_step
        if "loss" in logs:
            check_finite_loss(logs["loss"], step)
            row = {"step": step, "tokens": step * self.config.tokens_per_step, "loss": logs["loss"], "eval_loss": nan,
                   "lr": logs.get("learning_rate", nan), "grad_norm": logs.get("grad_norm", nan),
                   "step_s": self.spent_s / max(1, self.n)}  # fmt: skip
            self.spent_s, self.n = 0.0, 0
            self.rows.append(row)
        elif "eval_loss" in logs:
            if not self.rows or self.rows[-1]["step"] != step:
                empty = {k: nan for k in ("loss", "lr", "grad_norm", "step_s")}
                self.rows.append({"step": step, "tokens": step * self.config.tokens_per_step} | empty)
            self.rows[-1]["eval_loss"] = logs["eval_loss"]
        else:
            return
        if self.on_row is not None:
            self.on_row(self.rows[-1])


def check_finite_loss(loss: float, step: int) -> None:
    """Stop a training that has failed, before its weights replace good ones.

    Raises:
        WorkError: the loss is NaN or Inf.
    """
    if not math.isfinite(loss):
        raise WorkError(f"The loss is {loss} at step {step}.", "The training has diverged.",
                        "Lower lr, or raise warmup; the last checkpoint is from before.")  # fmt: skip


class Restored(TrainerCallback):
    """Puts back, when a training goes on, the sum of losses since the last log."""

    def __init__(self, trainer: MassactTrainer, record: dict[str, Any]) -> None:
        self.trainer, self.record = trainer, record

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """The Trainer has just set them to zero."""
        self.trainer._tr_loss += self.record["tr_loss"]
        self.trainer._globalstep_last_logged = self.record["last_logged"]


class MassactTrainer(Trainer):
    """The Trainer of `train`: own optimizer, schedule and loss; sealed checkpoints that hold the tables as well.

    Args:
        config: what is trained.
        recorder, watcher: the tables, saved with every checkpoint; watcher None: no monitor.
        options: of `transformers.Trainer`.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self, config: TrainConfig, recorder: Recorder, watcher: MassiveActivationsCallback | None, **options: Any
    ) -> None:
        self.config, self.recorder, self.watcher = config, recorder, watcher
        self._saving: Path | None = None
        if watcher is not None:
            watcher.trainer = self
        callbacks = [recorder, *([watcher] if watcher else []), *options.pop("callbacks", ())]
        super().__init__(compute_loss_func=Loss(config.tweo), callbacks=callbacks, **options)
        self._loss_shifts_labels = False  # our windows come with the token after each

    def compute_loss(self, model: nn.Module, inputs: Row, *args: Any, **kwargs: Any) -> Any:
        """The loss; the outputs of the blocks are asked for only where a penalty is on them."""
        extra = {"output_hidden_states": True} if self.config.tweo and model.training else {}
        return super().compute_loss(model, inputs | extra, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the configuration."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.config, self.model if model is None else model)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the configuration."""
        if self.lr_scheduler is None:
            over = optimizer or self.optimizer
            schedule = torch.optim.lr_scheduler.LambdaLR(over, lambda step: rate(self.config, step))
            self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the monitor's numbers have a table of their own and would only swell the state of every checkpoint."""
        super().log(logs, start_time)
        if any(key.startswith("massact/") for key in logs):
            self.state.log_history.pop()

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with without_bars():
            super()._save(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving is None else str(self._saving)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a hidden folder, seal it, rename it."""
        root, step = Path(self.args.output_dir), self.state.global_step
        check_finite_loss(self._tr_loss.item(), step)
        self._saving = root / checkpoints.SAVING
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self._saving, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                made = self._saving / f"checkpoint-{step}"
                self.save_tables(made)
                alarms = alarms_as_dicts(self.watcher.monitor.alarms) if self.watcher else []
                more = {"config": self.config.as_dict(), "alarms": alarms, "tr_loss": self._tr_loss.item(),
                        "last_logged": self._globalstep_last_logged}  # fmt: skip
                checkpoints.publish(root, step, more, self.config.keep)
                self.save_tables(root.parent)
            self.accelerator.wait_for_everyone()
        except BaseException:
            shutil.rmtree(root / checkpoints.SAVING, ignore_errors=True)
            raise
        finally:
            self._saving = None

    def save_tables(self, folder: Path) -> None:
        """Write both tables."""
        write_table(folder, "training", frame("training", self.recorder.rows))
        write_table(folder, "monitor", self.watcher.monitor.history if self.watcher else frame("monitor"))

    def restore(self, checkpoint: Path) -> None:
        """Take up the tables, the alarms and the running loss of a checkpoint."""
        record = checkpoints.sealed(checkpoint)
        self.recorder.rows = read_table(checkpoint, "training").to_dict(orient="records")
        if self.watcher is not None:
            self.watcher.monitor.restore(read_table(checkpoint, "monitor"), record["alarms"])
        self.add_callback(Restored(self, record))
