"""The monitor as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from massact.records.errors import UserError
from massact.training.monitor import Alarm, Monitor


class MassiveActivationsCallback(TrainerCallback):
    """Monitor massive activations in any Trainer: `Trainer(..., callbacks=[MassiveActivationsCallback(every=100)])`.

    The forward pass that is looked at is the first micro-batch of steps 1, N, 2 N, ... of the training itself. The
    numbers go through `trainer.log`, so every integration of the Trainer (TensorBoard, W&B, trackio: `report_to`) gets
    `massact/top1_max`, `massact/ratio_max` and `massact/onset`, with `train/` in front; all are in `monitor.history`.

    Args:
        every: N. sequences, warn, probe_batch, on_alarm: see `Monitor`. With torch.compile probe_batch is needed.
        per_layer: also hand on `massact/layer_03/top1` and so on, seven numbers of every layer.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        sequences: int = 4,
        warn: tuple[float, float] = (10.0, 100.0),
        probe_batch: Mapping[str, Tensor] | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
        per_layer: bool = False,
    ) -> None:
        self.options = dict[str, Any](
            sequences=sequences, warn=warn, probe_batch=probe_batch, on_alarm=on_alarm, per_layer=per_layer
        )
        self.every = every
        self._monitor: Monitor | None = None
        self.trainer: Trainer | None = None

    @property
    def monitor(self) -> Monitor:
        """The monitor; it is made when the Trainer is."""
        if self._monitor is None:
            raise UserError("There is no monitor yet.", "The callback belongs to no Trainer.",
                            "Give it to Trainer(callbacks=[...]) or call attach(trainer).")  # fmt: skip
        return self._monitor

    def attach(self, trainer: Trainer) -> MassiveActivationsCallback:
        """Add the callback to a Trainer that was made before it."""
        self.trainer = trainer
        trainer.add_callback(self)
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        return self

    # A model is read here because later it may be sharded or compiled.
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Find and prove what is to be watched."""
        if args.torch_compile and self.options["probe_batch"] is None:
            raise UserError("The monitor cannot see into a compiled model.", "torch.compile does not run later hooks.",
                            "Give MassiveActivationsCallback(probe_batch=...).")  # fmt: skip
        self.trainer = self.trainer or _trainer_above()
        self._monitor = Monitor(kw["model"], self.every, **self.options)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Go on at the step where a resumed training is."""
        if self._monitor is None:
            self.on_init_end(args, state, control, **kw)
        self.trainer = self.trainer or _trainer_above()
        self.monitor.n_steps = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Before the first micro-batch of a step."""
        self.monitor.__enter__()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """After the first of several micro-batches."""
        self.monitor.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """After the only micro-batch."""
        self.monitor.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Reduce and log."""
        rows = self.monitor.step()
        if rows and self.trainer is not None:
            asked = control.should_log
            self.trainer.log(self.monitor.as_logged(rows))
            control.should_log = asked  # a log of ours must not stand for the Trainer's own of this step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Leave nothing behind."""
        self.monitor.close()


def _trainer_above() -> Trainer | None:
    """The Trainer that is calling, of one that was not named by `attach`.

    A callback is handed arguments, state, model and loaders, and none of them knows the Trainer, which alone can log.
    """
    at: FrameType | None = sys._getframe(1)
    while at is not None:
        held = at.f_locals.get("self")
        if isinstance(held, Trainer):
            return held
        at = at.f_back
    return None
