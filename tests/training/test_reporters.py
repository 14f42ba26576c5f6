"""What the monitor sees arrives at TensorBoard, W&B and trackio through the Trainer's own `report_to`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from massact.records.errors import UserError
from massact.training import train
from massact.training.job import check_reporters
from tests.training.small import small
from tests.training.test_monitor import data, trained  # noqa: F401

NAMES = ("train/massact/top1_max", "train/massact/ratio_max")


def numbers(monitor: Any) -> list[tuple[float, float]]:
    rows = monitor.history.groupby("step")[["top1", "ratio"]].max()
    return [(row["top1"], row["ratio"]) for _, row in rows.iterrows()]


def test_tensorboard(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    _, monitor, _ = trained(data, tmp_path, False, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    top1, ratio = ([(e.step, e.value) for e in events.Scalars(name)] for name in NAMES)
    assert [step for step, _ in top1] == [step for step, _ in ratio] == [1, 2, 4]
    for (_, t), (_, r), expected in zip(top1, ratio, numbers(monitor), strict=True):
        assert (t, r) == pytest.approx(expected, rel=1e-6)
    assert not [tag for tag in events.Tags()["scalars"] if "layer_" in tag]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_other_loggers(package: str, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    logger = MagicMock()
    logger.__spec__, logger.__version__ = ModuleSpec(package, None), "1.0.0"
    monkeypatch.setitem(sys.modules, package, logger)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", MagicMock(ConfigError=ValueError))
    _, monitor, _ = trained(data, tmp_path, False, report_to=package)
    given = [call.args[0] for call in logger.log.call_args_list]
    ours = [entry for entry in given if NAMES[0] in entry]
    assert [tuple(entry[name] for name in NAMES) for entry in ours] == numbers(monitor)
    assert not [key for entry in given for key in entry if "layer_" in key]


def test_reporters_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb") as refused:
        check_reporters(["wandbb"])
    assert "wandb" in refused.value.do
    check_reporters(["tensorboard", "none"])
    if "trackio" not in sys.modules:
        with pytest.raises(UserError, match="trackio") as refused:
            train(small(report_to=("trackio",)), tmp_path / "run", tmp_path / "no text")
        assert refused.value.do.endswith("pip install trackio")
