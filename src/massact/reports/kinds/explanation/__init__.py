"""How an explanation is read: words, sections, small tables, figures."""

from massact.reports.kinds.explanation import sections, tables
from massact.reports.kinds.explanation.attention import EXPLAIN_FIGURES
from massact.reports.kinds.explanation.collapse import collapsed, draw_collapse
from massact.reports.kinds.explanation.spectrum import draw_spectrum, spectra
from massact.reports.kinds.explanation.states import left_in_states
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.scan import images
from massact.reports.readings import Reading

READING = Reading(
    words=story_in_words,
    sections=(images.attended, sections.attention, sections.bias, collapsed, spectra, left_in_states, sections.writers),
    brief=tables.brief,
    figures={
        **EXPLAIN_FIGURES,
        "collapse": draw_collapse,
        "spectrum": draw_spectrum,
        "attention_patches": images.draw_patch_attention,
    },
    table="axes",
)
