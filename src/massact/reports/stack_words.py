"""Sentences on several stacks of one model: what is the same is said once, with the names of the stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from massact.records.sites import runs_of
from massact.reports.spelling import listed, visible


def stream_sets(model: Mapping[str, Any]) -> dict[str, list[str]]:
    """The stacks of a model that carries several streams: what blocks read of them together -> the streams.

    Args:
        model: its record; a damaged one has none.
    """
    found = model.get("streams")
    if not isinstance(found, dict):
        return {}
    return {str(read): list(map(str, streams)) for read, streams in found.items() if isinstance(streams, list)}


def called(stacks: Sequence[str]) -> str:
    """'stream_0 to stream_3 and collapsed'."""
    return listed([visible(run) for run in runs_of(stacks)])


def said_once(told: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Sentences of several stacks, each behind the names of those that it is said of, in the order of the first.

    Args:
        told: a stack, "" for the only one, and its sentences.
    """
    of: dict[str, list[str]] = {}
    for stack, sentences in told:
        for sentence in sentences:
            names = of.setdefault(sentence, [])
            if stack and stack not in names:
                names.append(stack)
    return [f"{called(names)}: {sentence}" if names else sentence for sentence, names in of.items()]
