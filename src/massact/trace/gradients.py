"""The gradient of a loss with respect to the output of attention calls, from which that of every probability follows.

With out_t = sum_j P[t, j] v_j of one head, before the output projection, and g_t = dL/dout_t:
    dL/dP[t, j] = g_t . v_j
exactly, whatever kernel made the output: no (T, T) matrix has to be in the graph.

Shapes: B batch, H heads, T queries, F width of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from massact.corpora import Batch
from massact.records.anatomy import AttentionPlace
from massact.records.errors import WorkError
from massact.stats import Where
from massact.stats.attention_call import Attended
from massact.trace.attention import AttentionCall, attending
from massact.trace.updates import attended_sequences


class Graphed:
    """The attention calls of the last forward pass, whose outputs are in the graph of what the model gives.

    Args:
        places: that are watched.

    `calls`: what each call was given and gave, out of the graph.
    """

    def __init__(self, places: Iterable[AttentionPlace]) -> None:
        self.places = tuple(places)
        self.calls: dict[AttentionPlace, AttentionCall] = {}
        self._outputs: dict[AttentionPlace, Tensor] = {}
        self._start: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """To be called before every forward pass; forgets the one before."""
        self.calls.clear()
        self._outputs.clear()
        self._start()

    def see(self, place: AttentionPlace) -> Callable[[AttentionCall], Tensor]:
        """What sees the calls of a place: it hands on a copy of the output, which is a node of the graph."""

        def keep(call: AttentionCall) -> Tensor:
            assert call.out_BHTF is not None
            # A copy, as the output may be a view through which no gradient passes. Equal bit for bit.
            out_BHTF = call.out_BHTF.clone()
            if not out_BHTF.requires_grad:  # nothing before it needs a gradient: the graph starts here
                out_BHTF.requires_grad_()
            self._outputs[place] = out_BHTF
            tensors = {k: x.detach() for k, x in vars(call).items() if isinstance(x, Tensor)}
            self.calls[place] = replace(call, **tensors)
            return out_BHTF

        return keep

    def gradients(self, loss: Tensor) -> dict[AttentionPlace, Tensor]:
        """dL/dout of every watched call, in the shape of its output; frees the graph.

        Args:
            loss: a scalar, made from what the model gave in the last forward pass.

        Returns:
            place -> gradient (B, H, T, F), in units of the loss per unit of the output; zero where the loss does not
            depend on the call. No parameter gets a `.grad`.

        Raises:
            WorkError: a place was not reached, or the loss is not in the graph.
        """
        missing = [p.module for p in self.places if p not in self._outputs]
        if missing:
            raise WorkError(f"Attention in {missing[0]!r} was not reached by the forward pass, so it has no gradient.")
        if not loss.requires_grad:
            raise WorkError("The loss does not depend on any attention call that is watched.")
        outputs = [self._outputs[p] for p in self.places]
        found = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        self._outputs.clear()
        return dict(zip(self.places, found, strict=True))


@contextmanager
def attention_gradients(root: nn.Module, places: Iterable[AttentionPlace]) -> Iterator[Graphed]:
    """Run a model with its attention outputs in the autograd graph, for the length of a `with`.

    Inside, gradients are recorded and no parameter asks for one; outputs are bit for bit as before. On leaving, also
    by an error, every `requires_grad` is as it was.

    Args:
        root: the model that the places were found in.
        places: attention calls.

    Yields:
        `Graphed`: call `begin`, run the model, make a loss, call `gradients`.
    """
    graph = Graphed(places)
    asked = [p for p in root.parameters() if p.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in asked:  # else the graph would also hold what only their gradients need
                parameter.requires_grad_(False)
            with attending(root, {place: graph.see(place) for place in graph.places}) as heads:
                graph._start = heads.begin
                yield graph
        finally:
            graph.calls.clear()
            graph._outputs.clear()
            for parameter in asked:
                parameter.requires_grad_(True)


def sequences_with_gradients(
    call: AttentionCall, gradient: Tensor, place: AttentionPlace, batch: Batch
) -> Iterator[tuple[Attended, Tensor, Where]]:
    """The call of each sequence of a batch and the gradient of its output (H, T, F), of the positions that count.

    Args:
        call, gradient: of `Graphed`.
        place: of the call.
        batch: that the model ran on.

    Raises:
        WorkError: the call has another number of rows than the batch has sequences.
    """
    beside = attended_sequences(replace(call, out_BHTF=gradient), place, batch)  # cut in the same way as the output
    for (attended, where), (other, _) in zip(attended_sequences(call, place, batch), beside, strict=True):
        assert other.out_HTF is not None
        yield attended, other.out_HTF, where
