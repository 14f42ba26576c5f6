"""Loading and measuring leave a user's model as it was, also where its own forward pass changes it."""

import copy

import pytest
import torch
import transformers
from torch import nn

import massact as ma
from massact.records.errors import MassactError
from massact.trace import unchanged
from tests.families import build


def _state(module: nn.Module) -> dict:
    """Everything about a model that its user may rely on."""
    plain = (bool, int, float, str, type(None))
    return {
        "weights": {n: t.clone() for n, t in module.state_dict().items()},
        "more": {n: t.clone() for n, t in module.named_buffers()},
        "identity": [(n, id(p), p.requires_grad, p.dtype) for n, p in module.named_parameters()],
        "training": [(n, m.training) for n, m in module.named_modules()],
        "classes": [(n, type(m)) for n, m in module.named_modules()],
        "plain": [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in module.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in module.modules()],
        "config": copy.deepcopy(module.config.to_dict()) if hasattr(module, "config") else None,
        "random": torch.get_rng_state(),
    }


def _assert_same(before: dict, after: dict) -> None:
    for key in before:
        if key in ("weights", "more"):
            assert before[key].keys() == after[key].keys()
            assert all(torch.equal(t, after[key][n]) for n, t in before[key].items()), key
        elif key == "random":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


def _big_bird() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, block_size=4,
        num_random_blocks=2, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.BigBirdForMaskedLM(config)


@pytest.mark.parametrize("name", ["llama", "gpt2", "albert", "t5", "vit", "mixtral", "gemma3", "big_bird"])
@pytest.mark.parametrize("training", [True, False])
def test_loading_and_scanning_change_nothing(name: str, training: bool) -> None:
    module = (_big_bird() if name == "big_bird" else build(name)).train(training)
    next(module.children()).eval()  # a part that its user has frozen
    next(module.parameters()).requires_grad_(False)
    ids = torch.randint(5, 90, (2, 48))
    before = _state(module)
    model = ma.load(module)
    _assert_same(before, _state(module))
    corpus = ids if "input_ids" in model.inputs_accepted() else {"pixel_values": model.example["pixel_values"]}
    before = _state(module)
    ma.scan(model, ma.corpus(corpus), null=False)
    _assert_same(before, _state(module))


def test_big_bird_is_measured_in_its_own_attention_behind_a_short_batch() -> None:
    """A batch of few tokens switches the model to full attention for good; the next long one must not see that."""
    module = _big_bird().eval()
    long_ids = torch.randint(5, 99, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # block-sparse attention draws its blocks by numpy, from a seed of the layer
        truth = module.bert(long_ids, output_hidden_states=True).hidden_states
    model = ma.load(module)
    assert module.bert.attention_type == "block_sparse"
    layers = ma.scan(model, ma.corpus(long_ids), null=False).layers
    for layer, h in enumerate(truth[:-1]):
        measured = layers.loc[layers.layer == layer, "max"].iloc[0]
        assert measured == pytest.approx(float(h.abs().max()), rel=1e-5)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.map, self.norm, self.drop = nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.map(self.drop(self.norm(x)))


class _Counting(nn.Module):
    """Counts its calls in a buffer, keeps its last input, and fails on long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(16) for _ in range(3))
        self.register_buffer("calls", torch.zeros(1))
        self.last = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x
        for block in self.blocks:
            x = block(x)
        if x.shape[1] > 30:
            raise RuntimeError("too long")
        return x


def test_a_model_that_writes_its_own_buffers_and_fails_is_as_before() -> None:
    module = _Counting().train()
    model = ma.load(module, inputs={"x": torch.randn(2, 7, 16)})
    assert float(module.calls) == 0 and module.last is None and module.training
    ma.scan(model, ma.corpus({"x": torch.randn(2, 9, 16)}), null=False)
    assert float(module.calls) == 0 and module.last is None and module.training
    with pytest.raises((RuntimeError, MassactError)), unchanged(module, values=True):
        module(torch.randn(1, 40, 16))
    assert float(module.calls) == 0 and module.last is None and all(m.training for m in module.modules())


def test_effects_and_attention_of_a_model_in_training_mode_are_those_in_evaluation_mode() -> None:
    """Dropout must not reach a measurement, whatever mode the user's model is in."""
    ids = torch.randint(5, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for training in (True, False):
        module = build("gpt2").train(training)
        assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
        model = ma.load(module)
        scan = ma.scan(model, ma.corpus(ids), null=False, thresholds={"magnitude": 0.1, "ratio": 1})
        effects = ma.intervene(model, ma.corpus(ids), scan).effects
        heads = ma.explain(model, ma.corpus(ids), scan).heads
        found.append((effects[effects.metric.astype(str).str.contains("perplexity|nats")], heads))
        assert module.training is training
    for one, other in zip(*found, strict=True):
        assert len(one)
        assert one.select_dtypes("number").equals(other.select_dtypes("number"))
