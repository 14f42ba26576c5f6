"""What a model in a folder is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from massact.models.names import folder_name


@pytest.mark.parametrize(("folder", "name"), [
    ("/models/smollm2-135m", "smollm2-135m"), ("/models/smollm2-135m/", "smollm2-135m"),
    ("/models/smollm2-135m/hf", "smollm2-135m"), ("/models/smollm2-135m/HF/", "smollm2-135m"),
    ("/runs/kv-bias/model", "kv-bias"), ("/hf", "hf"), ("/models/hf-mirror", "hf-mirror"),
    ("/hub/models--acme--tiny-lm/snapshots/0123abc", "acme/tiny-lm"), ("/hub/models--gpt2/snapshots/0123abc/", "gpt2"),
    ("/hub/models--acme--tiny--lm/snapshots/0123abc", "acme/tiny--lm"), ("/a/snapshots/step100", "step100"),
])  # fmt: skip
def test_a_folder_is_called_by_what_says_which_model_it_is(folder: str, name: str) -> None:
    assert folder_name(folder) == name


def test_a_relative_folder_is_called_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-lm" / "hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny-lm")
    assert folder_name(".") == folder_name("./hf") == folder_name("hf/") == "tiny-lm"
