"""What users put around a model: the numbers are those of the model inside, or one message says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import massact as ma
from massact.records.errors import ProofError, UserError
from massact.stats import HiddenStats
from massact.trace import Probe, observing
from tests.facts import tells
from tests.families import build
from tests.wrapped import IDS, RULE, everything, logits, same, tiny


class Passing(nn.Module):
    """A wrapper of one's own that adds nothing."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


class Logits(Passing):
    """A wrapper that gives the logits alone, and names what it takes."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.inside(input_ids=input_ids, use_cache=use_cache).logits


class Bare(Passing):
    """A wrapper that takes ids and nothing else, by a name of its own."""

    def forward(self, tokens: Tensor) -> Any:
        return self.inside(tokens)


class Named(Passing):
    """A wrapper that takes ids and nothing else, by their name."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inside(input_ids).logits


class Thrice(Passing):
    """One that changes what the model gives, and takes nothing but ids."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return 3 * self.inside(input_ids).logits


class Doubled(Passing):
    """A wrapper that changes what the model gives."""

    def forward(self, **kwargs: Any) -> Tensor:
        return 2 * self.inside(**kwargs).logits


class Scored(Passing):
    """A wrapper with weights of its own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__(inside)
        self.score = nn.Linear(99, 1)

    def forward(self, **kwargs: Any) -> Tensor:
        return self.score(self.inside(**kwargs).logits)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """One process is a group of its own."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    return everything(tiny())


def _parts(make: Callable[[nn.Module], nn.Module], part: str) -> Callable[[], nn.Module]:
    """A model whose blocks, or one part of each, are replaced by what `make` makes of them."""

    def build() -> nn.Module:
        module = tiny()
        for i in range(3):
            path = f"model.layers.{i}{part}"
            module.set_submodule(path, make(module.get_submodule(path)))
        return module

    return build


def _in_place(compile_: Callable[[Any], Any], *paths: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = tiny()
        for path in paths:
            compile_(module.get_submodule(path))
        return module

    return build


def _forward_compiled(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def _checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


def _checkpointing(training: bool) -> nn.Module:
    module = tiny()
    module.gradient_checkpointing_enable()
    return module.train(training)


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(tiny()),
    "compiled in place": _in_place(lambda m: m.compile(), ""),
    "a compiled forward": _in_place(_forward_compiled, ""),
    "compiled blocks": _parts(torch.compile, ""),
    "blocks compiled in place": _in_place(lambda m: m.compile(), *(f"model.layers.{i}" for i in range(3))),
    "compiled MLPs": _parts(lambda m: torch.compile(m, backend="eager"), ".mlp"),
    "compiled forwards of attention": _in_place(_forward_compiled, *(f"model.layers.{i}.self_attn" for i in range(3))),
}
AROUND: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(tiny()),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(tiny()),
    "Passing": lambda: Passing(tiny()),
    "Logits": lambda: Logits(tiny()),
    "Bare": lambda: Bare(tiny()),
    "Named": lambda: Named(tiny()),
    "Passing, DataParallel": lambda: Passing(nn.DataParallel(tiny())),
}
OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "gradient checkpointing": lambda: _checkpointing(False),
    "gradient checkpointing in training": lambda: _checkpointing(True),
    "blocks in a CheckpointWrapper": _parts(_checkpointed, ""),
    "training with dropout": lambda: tiny(attention_dropout=0.4).train(),
}


@pytest.mark.parametrize("name", [*COMPILED, *AROUND, *OTHERWISE])
def test_numbers_are_those_of_the_model_inside(name: str, bare: dict[str, Any]) -> None:
    module = (COMPILED | AROUND | OTHERWISE)[name]()
    training = module.training
    same(everything(module), bare)
    assert module.training == training
    model = ma.load(module)
    assert model.info().weights_sha256 == ma.load(tiny()).info().weights_sha256
    if name in AROUND:
        assert tells(" ".join(model.around), "wrapped", *name.split(", "))
    assert bool(tells(" ".join(model.around), "torch.compile")) == (name in COMPILED)


def test_what_is_around_stands_in_the_notes_of_the_run() -> None:
    scan = ma.scan(torch.compile(nn.DataParallel(tiny())), IDS, null=False, **RULE)
    assert tells(scan.info.notes, "DataParallel") and tells(scan.info.notes, "torch.compile")


def test_a_compiled_model_is_compiled_again_afterwards() -> None:
    """Inside a `with observing` hooks see the original; behind it torch.compile runs as before."""
    runs = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append(graph)
        return graph.forward

    module = tiny()
    whole = torch.compile(module, backend=backend)
    model = ma.load(whole)
    assert model.module is module and not runs
    with torch.no_grad(), observing(model, [Probe("h", "*.resid_post", HiddenStats)]) as seen:
        whole(IDS)
    assert not runs and len(seen.sites("h")) == 4
    with torch.no_grad():
        whole(IDS, use_cache=False)
    assert runs


def test_data_parallel_processes(group: None, bare: dict[str, Any]) -> None:
    module = nn.parallel.DistributedDataParallel(tiny())
    same(everything(module), bare)
    assert ma.load(module).module is module.module


def test_sharded_weights_are_refused_with_the_way_out(group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    flat = FullyShardedDataParallel(tiny(), device_id=torch.device("cpu"))
    sharded = tiny()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for module in (flat, sharded):
        with pytest.raises(UserError, match="sharded") as refused:
            ma.load(module)
        assert "full_state_dict" in refused.value.do and "save_pretrained" in refused.value.do


@pytest.mark.parametrize(("make", "why"), [(Doubled, "something else"), (Thrice, "something else"),
                                           (Scored, "weights of its own"),
                                           (lambda m: nn.Sequential(Doubled(m), nn.Flatten()), "take")])  # fmt: skip
def test_a_wrapper_that_does_something_is_not_taken_off(make: Any, why: str) -> None:
    module = make(tiny())
    with pytest.raises(UserError) as refused:
        ma.load(module)
    path = next(name for name, part in module.named_modules() if name.endswith("inside"))
    assert "LlamaForCausalLM" in refused.value.what and why in refused.value.why and repr(path) in refused.value.do
    assert ma.load(module.get_submodule(path)).anatomy.stacks[0].n_layers == 3


def test_with_an_example_it_is_a_module_of_ones_own() -> None:
    model = ma.load(Doubled(tiny()), inputs={"input_ids": IDS})
    assert type(model.module) is Doubled and model.anatomy.stacks[0].path == "inside.model.layers" and not model.around
    inside = ma.load(torch.compile(Doubled(tiny())), inputs={"input_ids": IDS})
    assert type(inside.module) is Doubled and tells(" ".join(inside.around), "torch.compile")


def test_shared_blocks_are_shared_in_the_random_twin() -> None:
    """A block that stands in two places runs twice; the null is of that architecture."""
    module = tiny()
    module.model.layers[2] = module.model.layers[1]
    scan = ma.scan(module, IDS, **RULE)
    assert "n_findings" in scan.info.answer["null"]
    twin = ma.models.random_twin(ma.load(module))
    assert not isinstance(twin, str) and twin.module.model.layers[2] is twin.module.model.layers[1]
    alone = tiny()
    alone.model.layers[2].load_state_dict(module.model.layers[1].state_dict())
    assert torch.equal(logits(alone), logits(module))
    other = ma.scan(alone, IDS, **RULE)
    assert (
        scan.layers[["top1", "median", "mean"]].to_numpy() == other.layers[["top1", "median", "mean"]].to_numpy()
    ).all()


def test_a_twin_of_what_was_changed_after_it_was_built() -> None:
    module = tiny()
    module.model.layers = module.model.layers[:2]
    module.config.num_hidden_layers = 3  # what makes the twin
    found = ma.models.random_twin(ma.load(module))
    assert isinstance(found, str) or found.anatomy.stacks[0].n_layers == 2


def test_a_refusal_inside_is_still_the_models_own() -> None:
    """Nothing of the wrapper stands in the message about a model that is not understood."""

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    with pytest.raises(ProofError, match="Row"):
        ma.load(nn.DataParallel(Row()), inputs={"x": torch.randn(2, 13, 4)})


class Louder(nn.Module):
    """Takes ids as the model inside does, and makes its embeddings 50 times as large before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs_embeds=self.inner.get_input_embeddings()(input_ids) * 50).logits


def test_what_a_wrapper_with_inputs_of_its_own_does_is_measured() -> None:
    """It is the model: no part of it runs in its place, though one takes inputs of the same name."""
    module = Louder(build("llama")).eval()
    ids = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(5))
    model = ma.load(module, inputs={"input_ids": ids[:, :13]})
    layers = ma.scan(model, ma.corpus(ids), null=False).layers.set_index("layer")
    seen: list[torch.Tensor] = []
    handle = module.inner.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        module(ids)
    handle.remove()
    wanted = seen[0].abs().flatten(1).max(1).values.mean()
    assert float(layers.loc[2, "top1"]) == pytest.approx(float(wanted), rel=1e-6)
