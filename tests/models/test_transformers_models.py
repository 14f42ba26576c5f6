"""Reading checkpoints: what the Hub, transformers and safetensors raise becomes one clear message."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import errors as hub

import massact as ma
from massact.models import transformers_models
from massact.models.weight_values import check_finite, weights_hash
from massact.records.errors import UserError
from tests.families import build


def _response(status: int) -> object:
    return SimpleNamespace(status_code=status, headers={}, request=None, url="https://example.org/model")


@pytest.mark.parametrize(("error", "says"), [
    (hub.GatedRepoError("Cannot access gated repo", response=_response(403)), "hf auth login"),
    (hub.RepositoryNotFoundError("404", response=_response(404)), "no model 'org/name' on the Hub"),
    (hub.RevisionNotFoundError("404", response=_response(404)), "--revision"),
    (hub.LocalEntryNotFoundError("no connection and not in the cache"), "Hub cannot be reached"),
    (OSError("We couldn't connect to the Hub"), "Hub cannot be reached"),
    (OSError("org/name does not appear to have a file named model.safetensors"), "--allow-pickle"),
    (ValueError("loading this requires you to execute the configuration file; set trust_remote_code=True"),
     "--trust-remote-code"),
    (RuntimeError("something else"), "cannot be read"),
])  # fmt: skip
@pytest.mark.usefixtures("hub_there")
def test_errors_are_explained(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("massact.models.own_code.cached_file", fail)
    with pytest.raises(UserError) as caught:
        transformers_models.read_pretrained("org/name", "auto", None, {})
    assert says in str(caught.value) and caught.value.what and "org/name" in caught.value.what


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "clip", "qwen3_moe", "whisper"])
def test_saved_models_come_back(name: str, tmp_path: Path) -> None:
    """A folder is read with the class it was saved from, and hashes to the same weights."""
    module = build(name)
    module.save_pretrained(tmp_path)
    model = ma.load(tmp_path)
    assert type(model.module) is type(module)
    assert weights_hash(model.module) == weights_hash(module)
    assert model.tokenizer is None


def test_dtype_is_as_asked(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert ma.load(tmp_path).dtype == torch.bfloat16
    assert ma.load(tmp_path, dtype="float32").dtype == torch.float32
    with pytest.raises(UserError, match="int3"):
        ma.load(tmp_path, dtype="int3")


def test_hash_sees_every_bit() -> None:
    module = build("llama")
    before = weights_hash(module)
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-6
    assert weights_hash(module) != before
    assert weights_hash(build("llama")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    module = build("gpt2")
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.weight[0, :2] = value
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight.* in 2 of"):
        check_finite(module)


def test_random_twin_is_the_same_architecture_with_other_weights() -> None:
    from massact.models import random_twin

    model = ma.load(build("llama", seed=3))
    state = torch.random.get_rng_state()
    twin, again = random_twin(model, seed=1), random_twin(model, seed=1)
    assert not isinstance(twin, str) and not isinstance(again, str)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers must not move"
    assert weights_hash(twin.module) == weights_hash(again.module) != weights_hash(model.module)
    assert [p.shape for p in twin.module.parameters()] == [p.shape for p in model.module.parameters()]


def test_a_twin_in_the_place_of_the_weights_is_one_of_the_same_kind() -> None:
    """Where the weights may go, they are overwritten; statistics that were learned keep a model from it."""
    from massact.models import random_twin

    model, again = ma.load(build("llama", seed=3)), ma.load(build("llama", seed=4))
    before = weights_hash(model.module)
    twin, other = random_twin(model, seed=1, spend=True), random_twin(again, seed=1, spend=True)
    assert not isinstance(twin, str) and not isinstance(other, str)
    assert twin.module is model.module and weights_hash(twin.module) == weights_hash(other.module) != before
    fresh = random_twin(ma.load(build("llama", seed=3)), seed=1)
    assert not isinstance(fresh, str)
    for mine, theirs in zip(twin.module.parameters(), fresh.module.parameters(), strict=True):
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.2, abs=1e-6)
    model.module.register_buffer("learned", torch.ones(3))
    assert random_twin(model, spend=True).module is not model.module


def test_a_local_folder_has_no_revisions(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    for spec in (tmp_path, None):
        with pytest.raises(UserError, match="has no revisions"):
            ma.load(spec, revision="step1000")


def test_a_configuration_whose_vocabulary_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_models, "read_with", lambda *_: ["a", "b"])
    config = SimpleNamespace(vocab_size=None, text_config=SimpleNamespace(vocab_size=None))
    assert transformers_models._tokenizer("nowhere", config, {}) == ["a", "b"]
