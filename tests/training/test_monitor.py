"""The monitor sees what is there: against NumPy on the same batch, without changing the training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from massact.records.errors import UserError, WorkError
from massact.stats import Where
from massact.training import MassiveActivationsCallback, Monitor
from massact.training.monitor import HiddenSums, dynamics_of, unwrapped
from tests.facts import tells

V, T, B = 50, 16, 3


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    given = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": T, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**given | options)).train()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=T, initializer_range=0.3)).train()  # fmt: skip


def ids(seed: int = 0, n: int = B) -> torch.Tensor:
    return torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(seed))


def last_rows(monitor: Monitor) -> pd.DataFrame:
    rows = monitor.history
    return rows[rows["step"] == rows["step"].max()].reset_index(drop=True)


def naive(model: torch.nn.Module, x: torch.Tensor) -> pd.DataFrame:
    """The table from output_hidden_states and output_attentions; the last hidden state is behind the final norm."""
    held = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    caught: list[torch.Tensor] = []
    last = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[-1]
    handle = last.register_forward_hook(lambda _, a, out: caught.append(out if torch.is_tensor(out) else out[0]))
    values: list[torch.Tensor] = []
    handles = [
        m.register_forward_hook(lambda _, a, out: values.append(out)) for n, m in model.named_modules()
        if n.endswith(("c_attn", "v_proj"))
    ]  # fmt: skip
    with torch.no_grad():
        out = model(input_ids=x, output_hidden_states=True, output_attentions=True)
    for h in (handle, *handles):
        h.remove()
    model.config._attn_implementation = held
    states = [*(h.numpy() for h in out.hidden_states[:-1]), caught[0].numpy()]
    rows = []
    for layer, h in enumerate(states):
        flat = np.sort(np.abs(h.reshape(len(h), -1)), axis=1)
        median = flat[:, (flat.shape[1] - 1) // 2]
        first = np.abs(h).reshape(len(h), -1).argmax(1) < h.shape[-1]
        row = {"layer": layer, "top1": flat[:, -1].mean(), "top2": flat[:, -2].mean(), "top3": flat[:, -3].mean(),
               "median": median.mean(), "ratio": (flat[:, -1] / median).mean(), "at_first": first.mean(),
               "sink_mass": math.nan, "value_drain": math.nan}  # fmt: skip
        if layer:
            p = out.attentions[layer - 1].numpy()
            v = values[layer - 1].numpy()
            v = v[..., -32:] if v.shape[-1] == 96 else v
            norm = np.linalg.norm(v.reshape(len(v), T, -1, 8), axis=-1)  # (B, T, K)
            row["sink_mass"] = p[:, :, 1:, 0].mean()
            row["value_drain"] = (norm[:, 0] / norm[:, 1:].mean(1)).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    for column in expected:
        np.testing.assert_allclose(found[column], expected[column], rtol=2e-5, err_msg=column)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_numbers_are_those_of_the_training_pass(make: Any) -> None:
    model, x = make(), ids()
    monitor = Monitor(model, every=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(1, 5):
        expected = naive(model, x) if monitor.due(step) else None
        with monitor:
            loss = model(input_ids=x, labels=x).loss
        with torch.no_grad():
            model(input_ids=ids(9))  # an evaluation is not looked at
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = monitor.step()
        assert (rows is None) == (expected is None)
        if expected is not None:
            same(last_rows(monitor), expected)
            assert set(last_rows(monitor)["step"]) == {step} and set(last_rows(monitor)["n_sequences"]) == {B}
    assert sorted(set(monitor.history["step"])) == [1, 2, 4] and monitor.notes == []


def test_step_alone_is_enough_and_only_the_first_sequences_are_read() -> None:
    model, x = gpt2(), ids(n=6)
    naive(model, x)  # transformers installs hooks of its own and leaves them
    before = hooks(model)
    monitor = Monitor(model, every=1, sequences=2)
    for step in range(3):
        expected = naive(model, x[:2])
        with torch.no_grad():
            model(input_ids=ids(9))
        model(input_ids=x).logits.sum().backward()
        assert (monitor.step() is None) == (step == 0)
        if step:
            same(last_rows(monitor), expected)
    monitor.close()
    assert hooks(model) == before


def test_several_micro_batches_the_first_is_seen() -> None:
    model = gpt2()
    monitor = Monitor(model, every=1)
    expected = naive(model, ids(1))
    for seed in (1, 2, 3):
        with monitor:
            model(input_ids=ids(seed)).logits.sum().backward()
    monitor.step()
    same(last_rows(monitor), expected)


def test_vision_and_wrapped_models() -> None:
    vit = ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0)).train()  # fmt: skip
    wrapped = torch.nn.DataParallel(vit)
    assert unwrapped(wrapped) is vit
    monitor = Monitor(wrapped, every=1)
    with monitor:
        vit(pixel_values=torch.randn(2, 3, 16, 16)).logits.sum().backward()
    monitor.step()
    assert list(monitor.last().index) == [0, 1, 2] and monitor.last()["sink_mass"][1:].between(0, 1).all()
    assert all(m.training for m in vit.modules()), "the mode was changed"


def test_dropout_and_random_state_are_left_alone() -> None:
    def losses(watch: bool) -> list[float]:
        model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1)
        torch.manual_seed(5)
        monitor = Monitor(model, every=1, probe_batch={"input_ids": ids(3)}) if watch else None
        found = []
        for seed in range(3):
            loss = model(input_ids=ids(seed), labels=ids(seed)).loss
            loss.backward()
            found.append(loss.item())
            if monitor:
                monitor.step()
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_bit_identical_under_the_monitor(make: Any, bf16: bool) -> None:
    def gradients(watch: bool) -> list[torch.Tensor]:
        model = make()
        looked = Monitor(model, every=1) if watch else torch.enable_grad()
        with looked, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_probe_batch_instead_of_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    expected = naive(model, ids(4))
    monitor = Monitor(model, every=3, probe_batch={"input_ids": ids(4), "labels": ids(4)})
    model(input_ids=ids(5)).logits.sum().backward()
    monitor.step()
    same(last_rows(monitor), expected)


def test_a_compiled_model_needs_a_probe_batch() -> None:
    model = torch.compile(gpt2(), backend="eager")
    with pytest.raises(UserError, match="probe_batch"):
        Monitor(model)
    monitor = Monitor(model, every=1, probe_batch={"input_ids": ids(4)})
    monitor.step()
    same(last_rows(monitor), naive(unwrapped(model), ids(4)))


def test_nothing_seen_is_an_error() -> None:
    model = gpt2()
    monitor = Monitor(model, every=1)
    with monitor:
        pass
    with pytest.raises(WorkError, match="saw nothing"):
        monitor.step()
    with pytest.raises(UserError):
        Monitor(model, every=0)
    with pytest.raises(UserError):
        Monitor(torch.nn.Linear(3, 3))


def test_nonfinite_values_are_counted_and_left_out() -> None:
    h = torch.arange(24.0).reshape(2, 3, 4)
    h[0, 0, 0], h[0, 2, 3] = float("nan"), float("inf")
    sums = _summed(h)
    assert sums[0] == 10 + 23 and sums[3] == 5 + 17 and sums[-2] == 2 and sums[-1] == 2
    assert _summed(h.bfloat16()) == sums


def _summed(h_BTD: torch.Tensor) -> list[float]:
    statistic = HiddenSums((1, 1))
    for b, h_TD in enumerate(h_BTD):
        statistic.update(h_TD, Where(b))
    return statistic.result().tolist()


def test_alarms(caplog: pytest.LogCaptureFixture) -> None:
    model, heard = gpt2(initializer_range=0.02), []
    monitor = Monitor(model, every=1, warn=(20.0, 50.0), on_alarm=heard.append)

    def step(value: float) -> None:
        with torch.no_grad():
            model.transformer.h[0].mlp.c_proj.bias[3] = value
        with monitor:
            model(input_ids=ids()).logits.sum().backward()
        monitor.step()

    for value in (0.0, 50.0, 60.0, 500.0, 600.0):
        step(value)
    assert [(a.level, a.step, a.layer) for a in heard] == [
        ("warning", 2, 1), ("warning", 2, 2), ("massive", 4, 1), ("massive", 4, 2)]  # fmt: skip
    assert monitor.onset is heard[2] and monitor.onset.top1 == pytest.approx(500, rel=0.01)
    assert monitor.onset.share == 1 and tells([str(monitor.onset)], "massive activations", "layer 1")
    silent = Monitor(model, every=1)
    with caplog.at_level(logging.WARNING, "massact"), silent:
        model(input_ids=ids()).logits.sum().backward()
        silent.step()
    assert "massive" in caplog.text


def test_dynamics_of_a_history() -> None:
    steps = np.arange(0, 3000, 100)
    x = 2e-3 * steps + 1.5
    planted = {"step": steps, "stack": "", "layer": 1, "ratio": 40 * np.exp(-0.3 * x) * np.log(x) + 5}
    flat = {"step": steps, "stack": "", "layer": 2, "ratio": 5.0}
    fits = dynamics_of(pd.concat([pd.DataFrame(planted), pd.DataFrame(flat)]))
    assert fits["r2"][0] == pytest.approx(1) and fits["A"][0] == pytest.approx(40, rel=1e-3)
    assert math.isnan(fits["r2"][1]) and "equal" in fits["reason"][1]


# ------------------------------------------------------------------------------------------------ any Trainer
class Collect(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


@pytest.fixture
def data() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": x, "labels": x} for x in ids(n=64)]


def trained(data: Any, tmp: Any, attach: bool, per_layer: bool = False, **options: Any) -> Iterator[Any]:
    seen, watch = Collect(), MassiveActivationsCallback(every=2, per_layer=per_layer)
    given = {"report_to": "none"} | options
    args = TrainingArguments(
        output_dir=str(tmp), max_steps=4, per_device_train_batch_size=B, use_cpu=True,
        disable_tqdm=True, logging_steps=2, save_strategy="no", train_sampling_strategy="sequential", **given,
    )  # fmt: skip
    mine = [seen] if attach else [watch, seen]
    trainer = Trainer(gpt2(), args, train_dataset=data, callbacks=mine)
    if attach:
        watch.attach(trainer)
    trainer.train()
    return trainer, watch.monitor, seen.logs


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_callback_in_any_trainer(data: Any, tmp_path: Any, attach: bool, accumulate: int) -> None:
    _, monitor, logs = trained(data, tmp_path, attach, True, gradient_accumulation_steps=accumulate)
    assert sorted(set(monitor.history["step"])) == [1, 2, 4]
    same(monitor.history[monitor.history["step"] == 1], naive(gpt2(), torch.stack([d["input_ids"] for d in data[:B]])))
    ours = [entry for entry in logs if "massact/layer_01/top1" in entry]
    assert [entry["step"] for entry in ours] == [1, 2, 4]
    last = monitor.last()
    for name in ("top1", "top2", "top3", "median", "ratio", "sink_mass", "value_drain"):
        assert ours[-1][f"massact/layer_02/{name}"] == last[name][2]
    assert "massact/layer_00/sink_mass" not in ours[-1]
    # The Trainer's own logs of the same steps are still there.
    assert [entry["step"] for entry in logs if "loss" in entry] == [2, 4]


def test_three_numbers_a_step_unless_layers_are_asked_for(data: Any, tmp_path: Any) -> None:
    _, monitor, logs = trained(data, tmp_path, False)
    ours = [{k: v for k, v in entry.items() if k.startswith("massact/")} for entry in logs]
    steps = monitor.history.groupby("step")[["top1", "ratio"]].max()
    assert [o for o in ours if o] == [
        {"massact/top1_max": row["top1"], "massact/ratio_max": row["ratio"]} for _, row in steps.iterrows()
    ]


def test_onset_is_logged_once_there_is_one() -> None:
    monitor = Monitor(gpt2(), every=1, on_alarm=lambda alarm: None)
    onsets = []
    for value in (0.0, 1e5, 1e5):
        with torch.no_grad():
            monitor.model.transformer.h[0].mlp.c_proj.bias[3] = value
        with monitor:
            monitor.model(input_ids=ids()).logits.sum().backward()
        logged = monitor.as_logged(monitor.step())
        onsets.append(logged.get("massact/onset"))
        assert logged["massact/top1_max"] >= value
    assert onsets == [None, 2.0, 2.0]


def test_what_is_not_known_is_not_logged() -> None:
    monitor = Monitor(gpt2(), every=1)
    nan = dict.fromkeys(("top1", "top2", "top3", "median", "ratio", "sink_mass", "value_drain"), math.nan)
    rows = [{"step": 1, "stack": "", "layer": i, **nan} for i in range(3)]
    assert monitor.as_logged(rows) == {}
    rows[1]["top1"] = 5.0
    assert monitor.as_logged(rows) == {"massact/top1_max": 5.0}


def test_the_last_step_can_be_read() -> None:
    monitor = Monitor(gpt2(), every=1)
    assert monitor.last().empty
    for _ in range(2):
        with monitor:
            monitor.model(input_ids=ids()).logits.sum().backward()
        monitor.step()
    last, rows = monitor.last(), last_rows(monitor)
    assert last.columns.name == "step 2" and last.index.name == "layer" and list(last.index) == [0, 1, 2]
    np.testing.assert_array_equal(last["ratio"], rows["ratio"])
    assert "nonfinite" not in last and list(last["massive"]) == [0, 0, 0]
    assert max(map(len, str(last.round(2)).splitlines())) <= 80
    monitor.rows[-1]["nonfinite"] = 3
    assert list(monitor.last()["nonfinite"]) == [0, 0, 3]
    monitor.rows[-1]["stack"] = "decoder"
    assert monitor.last().index.names == ["stack", "layer"]


def test_checkpointed_activations_are_seen_once(data: Any, tmp_path: Any) -> None:
    _, plain, _ = trained(data, tmp_path, False)
    _, again, _ = trained(data, tmp_path, False, gradient_checkpointing=True)
    pd.testing.assert_frame_equal(plain.history, again.history, rtol=1e-6)


def test_a_callback_without_a_trainer_says_so() -> None:
    with pytest.raises(UserError, match="attach"):
        MassiveActivationsCallback().monitor  # noqa: B018
