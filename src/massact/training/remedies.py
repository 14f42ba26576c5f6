"""Remedies that are not attention: norms, losses, weight rescaling, optimisers. Each a small switch.

What a remedy changes in the architecture is written into the configuration, as with attention variants.
Shapes: B batch, T tokens, D width of the residual stream, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from massact.records.errors import UserError, check_options, near
from massact.training.changes import PREFIX, changeable, changes_of, note_change


# -------------------------------------------------------------------------------------------- norms
class DyT(nn.Module):
    """y = gamma * tanh(alpha x) + beta in place of a norm (Zhu et al. 2025, dynamic tanh; DyT row of Owen et al. 2025).

    Args:
        width: of x.
        alpha: to start from; the paper's default is 0.5.
    """

    def __init__(self, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Any (..., width), the same shape."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class GatedNorm(nn.Module):
    """y = norm(x) * sigmoid(norm(x) A B), a gate of rank R after the norm (Qiu et al. 2026, arXiv 2601.22966).

    Our references say "low-rank gate after norm": what the gate reads, and that there is no activation between A and B,
    is our choice.

    Args:
        norm: the norm that it stands in place of.
        width: of x.
        rank: R.
        std: of A and B at the start.
    """

    def __init__(self, norm: nn.Module, width: int, rank: int = 16, std: float = 0.02) -> None:
        super().__init__()
        self.norm = norm
        self.massact_down = nn.Parameter(torch.randn(rank, width) * std)
        self.massact_up = nn.Parameter(torch.randn(width, rank) * std)

    def forward(self, x: Tensor) -> Tensor:
        """Any (..., width), the same shape."""
        y = self.norm(x)
        return y * torch.sigmoid(y @ self.massact_down.to(y.dtype).T @ self.massact_up.to(y.dtype).T)


class PreAffineNorm(nn.Module):
    """y = norm(a * x), a learned vector before the norm (PreAffineRMSNorm, Qiu et al. 2026, arXiv 2601.22966).

    Args:
        norm: the norm that it stands in place of.
        width: of x.
    """

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.massact_before = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Any (..., width), the same shape."""
        return self.norm(x * self.massact_before.to(x.dtype))


class NormedHeads(nn.Module):
    """y = norm(x W) head by head: QK-norm around a projection of queries or keys (Henry et al. 2020, as in Qwen3).

    Args:
        projection: gives (B, T, heads * width).
        n_heads, width: of queries or keys.
        eps: of the RMS norm.
    """

    def __init__(self, projection: nn.Module, n_heads: int, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.projection = projection
        self.massact_norm = nn.RMSNorm(width, eps=eps)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, heads * width)."""
        y = self.projection(x)
        return self.massact_norm(y.unflatten(-1, (self.n_heads, -1))).flatten(-2).to(y.dtype)


def _is_norm(module: nn.Module) -> bool:
    """A norm over the last axis: a LayerNorm or RMSNorm of any name with a weight of one axis."""
    weight = getattr(module, "weight", None)
    named = re.search(r"(Layer|RMS)_?Norm", type(module).__name__) is not None
    return named and isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def _norms_of_the_stream(model: nn.Module) -> dict[str, nn.Module]:
    """Norms as wide as the residual stream, by name; not those of the heads."""
    width = getattr(model.config, "hidden_size", None)
    return {n: m for n, m in model.named_modules() if _is_norm(m) and len(m.weight) == width}


def _replace_norms(model: nn.Module, make: Callable[[nn.Module, int], nn.Module]) -> int:
    norms = _norms_of_the_stream(model)
    for name, norm in norms.items():
        made = make(norm, len(norm.weight)).to(norm.weight.device, norm.weight.dtype)  # type: ignore[arg-type]
        _put(model, name, made)
    return len(norms)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _dyt(model: nn.Module, alpha: float) -> int:
    def make(norm: nn.Module, width: int) -> nn.Module:
        return DyT(width, alpha)

    return _replace_norms(model, make)


def _gated_norm(model: nn.Module, rank: int, std: float) -> int:
    return _replace_norms(model, lambda norm, width: GatedNorm(norm, width, rank, std))


def _pre_affine(model: nn.Module) -> int:
    return _replace_norms(model, PreAffineNorm)


def _qk_norm(model: nn.Module, eps: float) -> int:
    """Around q_proj and k_proj (or query and key) of every attention module, before rotary."""
    n = 0
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf not in ("q_proj", "k_proj", "query", "key") or not isinstance(module, nn.Linear):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        width = next((w for a in ("head_dim", "attention_head_size") if (w := getattr(parent, a, None))), None)
        if width is None or module.out_features % width or getattr(parent, leaf[0] + "_norm", None) is not None:
            continue
        made = NormedHeads(module, module.out_features // width, width, eps)
        made.massact_norm.to(module.weight.device, module.weight.dtype)
        _put(model, name, made)
        n += 1
    return n


@dataclass(frozen=True)
class Remedy:
    """A change of the architecture that is not attention.

    Args:
        name, source, formula: as for an attention variant.
        change: `change(model, **options) -> how many modules were changed`.
        options: with their defaults.
        needs: what a model must have, for the error where nothing was changed.
    """

    name: str
    source: str
    formula: str
    change: Callable[..., int]
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = "norms as wide as its residual stream (LayerNorm or RMSNorm with one weight for each dim)"


_ALL = (
    Remedy("dyt", "Zhu et al. 2025; Owen et al. 2025", "gamma tanh(alpha x) + beta", _dyt, {"alpha": 0.5}),
    Remedy("gated-norm", "Qiu et al. 2026 (arXiv 2601.22966)", "norm(x) sigmoid(norm(x) A B)", _gated_norm,
           {"rank": 16, "std": 0.02}),
    Remedy("pre-affine", "Qiu et al. 2026 (arXiv 2601.22966)", "norm(a x)", _pre_affine),
    Remedy("qk-norm", "Henry et al. 2020; Qwen3", "RMSNorm of queries and keys, head by head", _qk_norm, {"eps": 1e-6},
           needs="separate linear projections q_proj and k_proj (or query and key) without a norm behind them"),
)  # fmt: skip

REMEDIES: dict[str, Remedy] = {remedy.name: remedy for remedy in _ALL}


def apply_remedy(model: nn.Module, name: str, **options: Any) -> nn.Module:
    """Change the norms of a transformers model, in place; written into `config.massact`.

    Args:
        model: a transformers model.
        name: dyt, gated-norm, pre-affine or qk-norm.
        options: of the remedy.

    Returns:
        The same model.

    Raises:
        UserError: no such remedy or option, or the model has nothing that it could change.
    """
    if name not in REMEDIES:
        raise UserError(f"There is no remedy {name!r}.", do=near(name, REMEDIES))
    remedy = REMEDIES[name]
    check_options(f"The remedy {name!r}", options, remedy.options)
    changeable(model)
    if name in changes_of(model):
        raise UserError(f"This {type(model).__name__} already has the remedy {name!r}.")
    resolved = remedy.options | options
    if not remedy.change(model, **resolved):
        raise UserError(f"{type(model).__name__} cannot have the remedy {name!r}.", f"It needs {remedy.needs}.")
    note_change(model, apply_remedy, name, resolved)
    return model


# -------------------------------------------------------------------------------------------- losses
def tweo_loss(hidden: Sequence[Tensor], tau: float = 3.0, p: float = 4.0, eps: float = 1e-6) -> Tensor:
    """Mean over layers of E[(|h| / (tau + eps))^p] (TWEO, Liang et al. 2025, arXiv 2511.23225).

    The Trainer adds `weight * tweo_loss(outputs.hidden_states[1:])` to the loss, with output_hidden_states=True and
    weight 0.01.

    Args:
        hidden: outputs of the blocks, each (B, T, D).
        tau: the size beyond which a value costs more than 1.
        p: the power.
        eps: against tau = 0.

    Returns:
        A scalar, at least float32.
    """
    if not hidden:
        raise UserError("TWEO needs the outputs of the blocks.", do="Run the model with output_hidden_states=True.")
    wide = (h.to(torch.promote_types(h.dtype, torch.float32)) for h in hidden)
    return torch.stack([(h.abs() / (tau + eps)).pow(p).mean() for h in wide]).mean()


# -------------------------------------------------------------------------------------------- weight rescaling
@torch.no_grad()
def rescale_weights(model: nn.Module, target: float = 0.02, factor: float = 1.2) -> list[str]:
    """Give every weight matrix whose std exceeds factor * target the mean 0 and the std target (TVR).

    Target variance rescaling as Owen et al. 2025 (arXiv 2503.22329) is known to us: a matrix whose std exceeds 1.2 x
    the target is z-scored and scaled to the target, which is 0.01 to 0.02. Leaving out embeddings is our reading.

    Args:
        model: any module.
        target: std that a matrix shall have.
        factor: how far beyond it the std may go.

    Returns:
        Names of the parameters that were changed.
    """
    changed = []
    for name, w in _matrices(model):
        std, mean = torch.std_mean(w.float())
        if std > factor * target:
            w.copy_((w.float() - mean) / std * target)
            changed.append(name)
    return changed


class TargetVarianceRescaling(TrainerCallback):
    """`rescale_weights` after every `every` optimizer steps of the Hugging Face Trainer (50 in the paper's code).

    Args:
        target, factor: as in `rescale_weights`.
        every: steps between two rescalings.
    """

    def __init__(self, target: float = 0.02, factor: float = 1.2, every: int = 50) -> None:
        self.target, self.factor, self.every = target, factor, every
        self.rescaled: list[tuple[int, str]] = []  # (step, parameter), for the log

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Called by the Trainer."""
        if model is not None and state.global_step % self.every == 0:
            self.rescaled += [(state.global_step, n) for n in rescale_weights(model, self.target, self.factor)]


# -------------------------------------------------------------------------------------------- optimisers
def _matrices(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Hidden weight matrices: two axes, no embedding, not the output head, not added by a variant (k', v', gates)."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    out = set() if head is None else {id(p) for p in head.parameters()}
    outside = out | {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.requires_grad and id(p) not in outside and PREFIX not in name:
            yield name, p


def param_groups(model: nn.Module, weight_decay: float, decay: str = "matrices") -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Args:
        model: any module.
        weight_decay: of the first group; 0 for none at all.
        decay: "matrices" (two axes or more, as in the paper's recipe, so also k' and v') or "all".

    Raises:
        UserError: no such rule.
    """
    if decay not in ("matrices", "all"):
        raise UserError(f"There is no decay rule {decay!r}.", do=near(decay, ("matrices", "all")))
    params = [p for p in model.parameters() if p.requires_grad]
    with_decay = [p for p in params if p.ndim >= 2 or decay == "all"]
    without = [p for p in params if p.ndim < 2 and decay != "all"]
    groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of an optimiser; `betas` and `eps` are Adam's, `momentum` is SGD's and Muon's."""

    lr: float = 6e-4
    weight_decay: float = 0.1
    decay: str = "matrices"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    muon_lr: float = 0.02


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices and AdamW on the rest, as one optimiser (OSP, Park et al. 2025, arXiv 2506.19697).

    A scheduler that scales the learning rates of `param_groups` scales both.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts = (muon, adamw)
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        # The same dicts as in the parts: whoever changes a learning rate here changes it there.
        n = len(self.parts[0].param_groups)
        self.parts[0].param_groups, self.parts[1].param_groups = self.param_groups[:n], self.param_groups[n:]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self.parts for g in part.param_groups]
        self._share()


OPTIMIZERS = ("adamw", "sgd", "muon")


def optimizer(model: nn.Module, name: str, settings: OptimizerSettings | None = None) -> torch.optim.Optimizer:
    """An optimiser over all trainable parameters of a model, by name.

    Args:
        model: any module.
        name: adamw; sgd (with momentum); muon (torch's, on hidden matrices, AdamW on the rest).
        settings: None for the defaults; weight_decay=0 is the remedy "no weight decay".

    Raises:
        UserError: no such optimiser, or torch has no Muon.
    """
    s = settings or OptimizerSettings()
    if name not in OPTIMIZERS:
        raise UserError(f"There is no optimizer {name!r}.", do=near(name, OPTIMIZERS))
    groups = param_groups(model, s.weight_decay, s.decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            "This torch has no Muon.", f"It is version {torch.__version__}.", "Update torch to 2.9 or later."
        )
    hidden = [p for _, p in _matrices(model)]
    if not hidden:
        raise UserError("Muon has nothing to work on.", "The model has no hidden weight matrices.", "Take adamw.")
    chosen = set(map(id, hidden))
    rest = [{**g, "params": left} for g in groups if (left := [p for p in g["params"] if id(p) not in chosen])]
    muon = torch.optim.Muon(hidden, lr=s.muon_lr, weight_decay=s.weight_decay, momentum=s.momentum)
    return MuonWithAdamW(muon, torch.optim.AdamW(rest, lr=s.lr, betas=s.betas, eps=s.eps))
