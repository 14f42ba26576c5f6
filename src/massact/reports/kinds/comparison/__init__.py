"""How a comparison of runs is made and read: its tables, words, sections, figures."""

from massact.reports.kinds.comparison.figures import COMPARE_FIGURES
from massact.reports.kinds.comparison.tables import brief
from massact.reports.kinds.comparison.words import told
from massact.reports.readings import Reading

READING = Reading(told, brief=brief, figures=COMPARE_FIGURES)
