"""How an explanation is read: words, sections, small tables, figures."""

from massact.reports.kinds.explanation import sections, tables
from massact.reports.kinds.explanation.attention import EXPLAIN_FIGURES
from massact.reports.kinds.explanation.states import left_in_states
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.scan import images
from massact.reports.readings import Reading

READING = Reading(
    words=story_in_words,
    sections=(images.attended, sections.attention, sections.bias, left_in_states, sections.writers),
    brief=tables.brief,
    figures={**EXPLAIN_FIGURES, "attention_patches": images.draw_patch_attention},
    table="axes",
)
