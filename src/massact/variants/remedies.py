"""Remedies of the architecture that are not attention: norms in place of norms. Each a small switch.

What a remedy changes is written into the configuration, as with attention variants.
Shapes: B batch, T tokens, D width of the residual stream, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from massact.records.errors import UserError, check_options, near
from massact.records.extensions import extensions
from massact.variants.changes import changeable, changes_of, note_change


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
        made = make(norm, len(norm.weight)).to(norm.weight.device, norm.weight.dtype)
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


def remedies() -> dict[str, Remedy]:
    """Name -> remedy: ours, and those that other packages name (entry point `massact.remedies`).

    Raises:
        UserError: what another package names is no remedy, or is called like another.
    """
    return extensions("massact.remedies", Remedy, REMEDIES)


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
    known = remedies()
    if name not in known:
        raise UserError(f"There is no remedy {name!r}.", do=near(name, known))
    remedy = known[name]
    check_options(f"The remedy {name!r}", options, remedy.options)
    changeable(model)
    if name in changes_of(model):
        raise UserError(f"This {type(model).__name__} already has the remedy {name!r}.")
    resolved = remedy.options | options
    if not remedy.change(model, **resolved):
        raise UserError(f"{type(model).__name__} cannot have the remedy {name!r}.", f"It needs {remedy.needs}.")
    note_change(model, apply_remedy, name, resolved)
    return model
