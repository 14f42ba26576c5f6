"""Training that goes on from a model: its weights, its slots, its tokenizer; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from massact.models import load
from massact.models.loading import location_of
from massact.prefixes import build
from massact.prefixes.position_shift import positions_of
from massact.records.errors import UserError
from massact.training import TrainConfig, train
from massact.training.components import build_model


def test_it_has_the_weights_of_the_folder_and_its_tokenizer() -> None:
    config = TrainConfig.of("tiny", start="embedded", seq_len=64)
    assert config.tokenizer == "embedded" and not config.model
    theirs = load().module.state_dict()
    mine = build_model(config).state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].float()) for k in mine)


def test_a_variant_is_added_to_what_is_there() -> None:
    model = build_model(TrainConfig.of("tiny", start="embedded", seq_len=64, variant="kv-bias"))
    assert sum("massact_" in name for name, _ in model.named_parameters()) == 12  # keys and values of six blocks


def test_slots_of_a_folded_model_are_trained_on(tmp_path: Path) -> None:
    model = load()
    folded = build(model, (29,), positions_of(model))
    folder = tmp_path / "folded"
    folded.model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    config = TrainConfig.of("tiny", start=str(folder), seq_len=32, steps=2, batch=2, eval_windows=2, warmup=0,
                            eval_every=0, save_every=0, monitor_every=0, device="cpu", dtype="float32")  # fmt: skip
    before = {n: p.clone() for n, p in build_model(config).named_parameters() if "massact_" in n}
    assert before and all(torch.equal(p, dict(folded.model.module.named_parameters())[n]) for n, p in before.items())
    train(config, tmp_path / "run")
    after = dict(load(str(tmp_path / "run" / "model")).module.named_parameters())
    assert all(not torch.equal(after[n].float(), p) for n, p in before.items())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"start": "embedded", "model.n_layer": 2}, "model"),
        ({"start": "embedded", "seq_len": 4096}, "seq_len"),
        ({"start": "nowhere/at-all"}, "nowhere/at-all"),
        ({"seq_len": 4096}, "seq_len"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as refused:
        build_model(TrainConfig.of("tiny", **options))
    assert word in str(refused.value)
    assert Path(location_of("embedded")).is_dir()
