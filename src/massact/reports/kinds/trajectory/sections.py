"""The section of a trajectory: where in a training massive activations emerge."""

from __future__ import annotations

from massact.records.kinds.trajectory import Trajectory
from massact.reports.kinds.trajectory.steps import draw_trajectory
from massact.reports.kinds.trajectory.words import trajectory_in_words
from massact.reports.parts import Section, Words, parts_of, table_of


def checkpoints(t: Trajectory) -> Section:
    """Where in a training massive activations emerge, over published checkpoints."""
    table = table_of("revisions", t.revisions, "Every checkpoint and layer", most=600)
    parts = parts_of(Words(trajectory_in_words(t)), *draw_trajectory(t).parts, table)
    return Section("checkpoints", "Checkpoints", parts)
