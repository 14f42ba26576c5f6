"""Registers at test time: the neurons that make patches massive write to an added token instead (Jiang 2025).

Shapes: B batch, T tokens, F neurons, J chosen neurons, N added tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from massact.corpora import Batch, Corpus
from massact.interventions.catalogue import cut_attention
from massact.models import Model, with_attention
from massact.positions import Layout, image_stack
from massact.records.errors import UserError
from massact.records.sites import Site
from massact.stats import PerSequence, Where
from massact.stats.positions import MagnitudesAt
from massact.trace import AddedTokens, Edit, Fired, Probe, Together, edited, measure, observing

Outliers = Mapping[int, Sequence[int]]  # image -> positions of its massive patches
COLUMNS = ("rank", "layer", "neuron", "activation", "elsewhere")


def register_neurons(
    model: Model,
    corpus: Corpus,
    outliers: Outliers,
    layout: Layout,
    *,
    layers: Sequence[int] | None = None,
    most: int = 100,
    batch_size: int | str = "auto",
) -> pd.DataFrame:
    """Rank the MLP neurons of all layers by their mean |activation| at the massive patches.

    The mean is over all massive patches of all images (an image with more of them counts more); the activation is what
    the last projection of the MLP reads (`mlp_act`).

    Args:
        model: an image model.
        corpus: images.
        outliers: image -> positions of its massive patches, see `outlier_patches` and `massive_patches`.
        layout: of its tokens.
        layers: only these, 1-based; None for all. A neuron behind the layer where patches become massive reads
            what they are and cannot make them so.
        most: rows of the table.

    Returns:
        Columns: rank (1 is the first), layer, neuron, activation (mean |a| at massive patches), elsewhere (at all
        other patches).

    Raises:
        UserError: no image has a massive patch, or a layer has no MLP neurons that can be seen.
    Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", finding register neurons.
    """
    if not any(len(p) for p in outliers.values()):
        raise UserError("No patch of any image is massive, so no neuron can be found that makes one.",
                        do="Lower the threshold.")  # fmt: skip
    n_layers = model.anatomy.stack(layout.stack).n_layers
    wanted = list(range(1, n_layers + 1) if layers is None else layers)
    sites = [Site(layout.stack, layer, "mlp_act") for layer in wanted]
    make = partial(MagnitudesAt, outliers, list(layout.patches))
    measured = measure(model, corpus, [Probe("neurons", str(s), make) for s in sites], batch_size=batch_size)
    found = [(s.layer, measured.result("neurons", s)) for s in sites]
    table = pd.DataFrame(
        {
            "layer": np.concatenate([np.full(len(r.chosen), layer) for layer, r in found]),
            "neuron": np.concatenate([np.arange(len(r.chosen)) for _, r in found]),
            "activation": np.concatenate([r.chosen for _, r in found]),
            "elsewhere": np.concatenate([r.rest for _, r in found]),
        }
    )
    table = table.sort_values("activation", ascending=False, kind="stable").head(most).reset_index(drop=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def moved_neurons(
    model: Model,
    neurons: pd.DataFrame | Sequence[tuple[int, int]],
    n: int = 1,
    *,
    stack: str | None = None,
    at: int | None = None,
    tokens_only: bool = False,
) -> Together:
    """The edit of test-time registers, for `interventions.evaluate` or `trace.edited`.

    N tokens of zeros are added, without position embeddings. At each of the neurons, the activation that is greatest in
    magnitude over all positions goes, with its sign, to each added token, and the neuron is 0 at all positions
    of the model's own. Where it is greatest it is positive with GELU, so this is the maximum that Jiang 2025 takes.

    Before it is used, it is shown on a short input that the tokens alone do nothing: with every query kept from
    attending to them, the model's outputs must be what they were, to rounding.

    Args:
        model: an image model.
        neurons: (layer, neuron) pairs, or rows of `register_neurons`.
        n: added tokens.
        stack: of several, which.
        at: index of the first added token; None: behind all tokens, or with rotary positions, which want the patches
            to be the last tokens, behind the first one.
        tokens_only: the control: the tokens are added and nothing is moved.

    Raises:
        UserError: no neurons, one that the model does not have, or a model in which added tokens do something else.
    """
    chosen = image_stack(model, stack)
    if at is None and _is_rotary(model):
        at = 1
    added = AddedTokens(f"{n} token(s) added", chosen.name, n, at)
    _check_added(model, added)
    if tokens_only:
        return Together(f"{n} token(s) of zeros", (added,))
    by_layer = _by_layer(neurons)
    edits: list[Edit] = []
    for layer, these in by_layer.items():
        site = Site(chosen.name, layer, "mlp_act")
        model.anatomy.select(str(site))  # says why where it is unavailable
        edits.append(Edit(f"{len(these)} neuron(s) moved", str(site), partial(_moved, these, n, at)))
    total = sum(map(len, by_layer.values()))
    return Together(f"{total} neuron(s) to {n} token(s)", (added, *edits))


@contextmanager
def test_time_registers(
    model: Model,
    neurons: pd.DataFrame | Sequence[tuple[int, int]],
    n: int = 1,
    *,
    stack: str | None = None,
    at: int | None = None,
) -> Iterator[list[Fired]]:
    """Run a model with registers that it was not trained with, for the length of a `with`; afterwards it is as before.

    See `moved_neurons` for the arguments. Inside, hidden states and attention have N tokens more; what comes behind
    the last block, its logits for one, has as many as ever.

    Raises:
        UserError: as `moved_neurons`.
        WorkError: on leaving, nothing was moved.
    Source: Jiang et al. 2025.
    """
    with edited(model, moved_neurons(model, neurons, n, stack=stack, at=at)) as fired:
        yield fired


test_time_registers.__test__ = False  # type: ignore[attr-defined]  # its name is that of a test, to pytest


def _by_layer(neurons: pd.DataFrame | Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    pairs = neurons[["layer", "neuron"]].to_numpy() if isinstance(neurons, pd.DataFrame) else neurons
    found: dict[int, list[int]] = {}
    for layer, neuron in sorted({(int(a), int(b)) for a, b in pairs}):
        found.setdefault(layer, []).append(neuron)
    if not found:
        raise UserError("There are no neurons to move.", do="Take some rows of register_neurons(...).")
    return found


def _moved(these: list[int], n: int, at: int | None, a_BTF: Tensor, batch: Batch) -> Tensor:
    flat = a_BTF.ndim == 2  # some MLPs see the tokens of all images in one row
    new_BTF = a_BTF.clone() if not flat else a_BTF.reshape(len(batch.sequences), -1, a_BTF.shape[-1]).clone()
    if max(these) >= new_BTF.shape[-1]:
        raise UserError(f"There is no neuron {max(these)}: the MLP has {new_BTF.shape[-1]}.")
    begin = new_BTF.shape[1] - n if at is None else at
    own = torch.ones(new_BTF.shape[1], dtype=torch.bool, device=a_BTF.device)
    own[begin : begin + n] = False
    x_BTJ = new_BTF[..., these]
    top_B1J = x_BTJ.abs().masked_fill(~own[:, None], -1).argmax(1, keepdim=True)
    value_B1J = x_BTJ.gather(1, top_B1J)
    new_BTF[..., these] = torch.where(own[:, None], torch.zeros_like(x_BTJ), value_B1J)
    return new_BTF.reshape(a_BTF.shape)


def _is_rotary(model: Model) -> bool:
    config = getattr(model.module, "config", None)
    holders = (config, getattr(config, "vision_config", None))
    return any(getattr(h, name, None) for h in holders for name in ("rope_parameters", "rope_theta"))


class _Outputs(PerSequence):
    """Hidden states as they are."""

    def update(self, h_TD: Tensor, where: Where) -> None:
        """Take the hidden state of one sequence."""
        self.rows[where.sequence] = h_TD.clone()


def _check_added(model: Model, added: AddedTokens) -> None:
    """Whether tokens that nothing attends to change nothing."""
    seen = with_attention(model)
    pattern = f"{added.stack}/*.attention" if added.stack else "*.attention"
    n_layers = model.anatomy.stack(added.stack).n_layers
    if len(seen.anatomy.select_attention(pattern)) != n_layers:
        raise UserError("It cannot be shown that added tokens do nothing by themselves in this model.",
                        "Attention is not seen in all of its blocks.")  # fmt: skip
    last = Site(added.stack, n_layers, "resid_post")

    def run(*edits: Any) -> Tensor:
        with torch.inference_mode(), observing(seen, [Probe("last", str(last), _Outputs)], edits) as found:
            model.run(model.example, places=found.places)
        return torch.stack(list(found.result("last", last).values()))

    before_BTD = run()
    T = before_BTD.shape[1]
    begin = T if added.at is None else added.at
    after_BTD = run(added, cut_attention(range(begin, begin + added.n), pattern))
    own_BTD = torch.cat([after_BTD[:, :begin], after_BTD[:, begin + added.n :]], 1)
    off = float((own_BTD - before_BTD).abs().max() / before_BTD.abs().max())
    if not off < 64 * torch.finfo(before_BTD.dtype).eps ** 0.75:
        raise UserError(
            "Added tokens do something by themselves in this model.",
            f"With no query attending to them, the hidden state is off by {off:.2g} of its greatest entry.",
            "Its blocks take a token for something by where it stands; another place may do: at=...",
        )
