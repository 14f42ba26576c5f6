"""What a model says of inputs that it does not run on, as an error with three parts."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from massact.records.errors import MassactError, UserError, WorkError, class_and_line
from massact.trace.hooks import AllSeen
from massact.trace.measurements import out_of_memory

_OURS = Path(__file__).parents[1]


def failure_of(error: Exception, part: nn.Module, inputs: Mapping[str, Any]) -> MassactError | None:
    """The error to be told of a forward pass; None where it is no failure of the model on its inputs.

    Args:
        error: raised in the pass; what probes and edits raise, and lack of memory, is told elsewhere.
        part: what was run.
        inputs: its inputs.
    """
    ours = [f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__) if _is_ours(f.f_code.co_filename)]
    if isinstance(error, MassactError | AllSeen) or out_of_memory(error) or Path(ours[-1]).name != "loading.py":
        return None
    if "pixel_values" in inputs and "image size" in str(error):
        return UserError("The model does not take images of this size.", str(error),
                         "Change --preprocess (crop=, resize=), or leave it out.")  # fmt: skip
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))
    kind = WorkError if isinstance(error, RuntimeError) else UserError
    return kind(
        f"{type(part).__name__} does not run on these inputs: {shapes}.",
        f"{class_and_line(error).rstrip('.')}.",
        "Give the inputs that it was built for, of a length that it takes.",
    )


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(_OURS)
