"""Options of what only reads runs."""

from __future__ import annotations

from typing import Annotated

import typer

from massact.verbs.inputs import Inputs

Json = Annotated[bool, typer.Option("--json", help=Inputs.model_fields["json_"].description)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help=Inputs.model_fields["quiet"].description)]
