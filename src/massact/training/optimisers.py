"""Remedies of the training: a loss, weight rescaling, optimisers. Each a small switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from massact.records.errors import UserError, near
from massact.variants.changes import PREFIX


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
