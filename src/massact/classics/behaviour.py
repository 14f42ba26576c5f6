"""What a list of edits does to a model's predictions, or why a model has none to speak of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from massact.classics.works import Ground, Unavailable
from massact.interventions.effects import Paired, evaluate
from massact.interventions.predictions import logits_of
from massact.records.errors import UserError, first_line
from massact.trace.edits import AnyEdit


def behaviour(ground: Ground, edits: Sequence[AnyEdit]) -> Paired:
    """A paired run of every edit, see `massact.interventions.evaluate`.

    Raises:
        Unavailable: the model predicts no token and no class on this corpus, with the reason.
    """
    if reason := no_predictions(ground):
        raise Unavailable(reason)
    return evaluate(ground.model, ground.corpus, edits, batch_size=ground.batch_size)


def no_predictions(ground: Ground) -> str:
    """Why no prediction can be compared with another one; empty where they can, found by running one sequence."""
    batch = next(iter(ground.corpus.batches(1)))
    try:
        with torch.inference_mode():
            logits = logits_of(ground.model, batch)
    except UserError as error:
        return error.what
    except (TypeError, ValueError) as error:  # one tower of two, say: the whole wants more inputs than there are
        why = first_line(error)
        return f"The whole model does not run on this corpus: {why}"
    if logits.ndim == 2 or (logits.ndim == 3 and "input_ids" in batch.inputs):
        return ""
    return f"The model's logits, of shape {tuple(logits.shape)}, are predictions of neither tokens nor classes."
