"""How a scan of checkpoints is read: words, section, small tables, figure."""

from massact.reports.kinds.scan.sections import definition
from massact.reports.kinds.trajectory import sections, tables
from massact.reports.kinds.trajectory.steps import draw_trajectory
from massact.reports.kinds.trajectory.words import trajectory_in_words
from massact.reports.readings import Reading

READING = Reading(
    words=trajectory_in_words,
    sections=(sections.checkpoints,),
    brief=tables.brief,
    definition=definition,
    noun="checkpoints",
    figures={"trajectory": draw_trajectory},
    table="revisions",
)
