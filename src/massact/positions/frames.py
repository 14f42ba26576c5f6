"""Names of the positions of a model of sound: the time that each is about, and which lie behind the end.

Shapes: N recordings, T positions, D width, F frames of the model's input (samples of a wave, or columns of features).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from massact.corpora import Corpus
from massact.models import Model
from massact.positions.embedding import embedding_outputs

_LOOKED_AT = (0.2, 0.5, 0.8)  # of all positions: where the experiment puts noise
_NEAR = 2  # positions that a short noise may be off by: windows overlap

_known: WeakKeyDictionary[nn.Module, dict[tuple[str, int, int], Frames | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Frames:
    """Positions of a stack that run along time.

    Args:
        n: how many, T.
        stride: input frames from one position to the next.
    """

    n: int
    stride: int

    def names(self, step_s: float) -> tuple[str, ...]:
        """'frame 0.00-0.02 s' of each position, with `step_s` seconds from one input frame to the next."""
        length = self.stride * step_s
        digits = max(2, math.ceil(-math.log10(length) - 1e-9))
        return tuple(f"frame {t * length:.{digits}f}-{(t + 1) * length:.{digits}f} s" for t in range(self.n))

    def ends(self, seconds: tuple[float, ...], step_s: float) -> tuple[int, ...]:
        """Of each recording, the first position whose step begins at or behind its end; T where there is none."""
        length = self.stride * step_s
        return tuple(min(self.n, math.ceil(s / length - 1e-6)) for s in seconds)


def frames_of(model: Model, corpus: Corpus, stack: str) -> Frames | None:
    """How the positions of a stack that reads sound run along time.

    The stride is the product of the strides of the model's one-dimensional convolutions; it must give the number of
    positions to within two. Then the experiment: other noise in a recording of noise, over the length of one position,
    at three places, must change the embedding output (layer 0) most at that position, to within two.

    Args:
        corpus: recordings, prepared for the model.
        stack: name of the stack.

    Returns:
        None where that is not so: other modalities, patches of a spectrogram, a class token in front.
    """
    name = model.sound_input
    sound = None if name is None else corpus.inputs.get(name)
    if sound is None or corpus.recordings is None or model.reads(model.anatomy.stack(stack)) != name:
        return None
    axis = corpus.recordings.time_axis
    found = _known.setdefault(model.module, {})
    key = (stack, sound.shape[axis], axis)
    if key not in found:
        try:
            found[key] = _found(model, corpus.head(1), str(name), stack)
        except Exception:  # whatever the model has against such sound, names must not cost the findings
            found[key] = None
    return found[key]


def framed(model: Model, corpus: Corpus, stack: str, n_positions: int) -> Corpus:
    """A corpus of recordings with the names of a stack's positions, and where in it each recording ends."""
    frames = frames_of(model, corpus, stack)
    recordings = corpus.recordings
    if frames is None or recordings is None or recordings.step_s is None or frames.n != n_positions:
        return replace(corpus, places=None, ends=None)
    ends = frames.ends(recordings.seconds, recordings.step_s)
    return replace(corpus, places=frames.names(recordings.step_s), ends=ends)


def _found(model: Model, one: Corpus, name: str, stack: str) -> Frames | None:
    assert one.recordings is not None
    axis, sound = one.recordings.time_axis, one.inputs[name]
    width = sound.shape[axis]
    stride = math.prod(m.stride[0] for m in model.module.modules() if isinstance(m, nn.Conv1d))
    # Noise all along, so that what is normalised over time hardly changes with a short piece of it.
    generator = torch.Generator().manual_seed(0)
    noise, fresh = (torch.randn(sound.shape, generator=generator).to(sound) for _ in range(2))
    one = replace(one, mask=None, counts=())  # noise in padding must be seen
    before = _layer_0(model, one, name, noise, stack)
    n = len(before)
    if abs(width / stride - n) > _NEAR or n < 2:
        return None
    for share in _LOOKED_AT:
        at = int(share * n)
        where = [slice(None)] * sound.ndim
        where[axis] = slice(at * stride, (at + 1) * stride)
        other = noise.clone()
        other[tuple(where)] = fresh[tuple(where)]
        after = _layer_0(model, one, name, other, stack)
        moved = int(np.abs(after - before).sum(-1).argmax()) if after.shape == before.shape else -n
        if abs(moved - at) > _NEAR:
            return None
    return Frames(n, stride)


def _layer_0(model: Model, one: Corpus, name: str, sound: torch.Tensor, stack: str) -> np.ndarray:
    """The embedding output (T, D) of one recording with other sound in it."""
    return embedding_outputs(model, replace(one, inputs={**one.inputs, name: sound}), stack)[0]
