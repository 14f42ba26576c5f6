"""How an explanation is read: words, sections, small tables, figures."""

from massact.reports.kinds.explanation import sections, tables
from massact.reports.kinds.explanation.attention import EXPLAIN_FIGURES
from massact.reports.kinds.explanation.collapse import collapsed, draw_collapse
from massact.reports.kinds.explanation.spectrum import draw_spectrum, spectra
from massact.reports.kinds.explanation.states import left_in_states
from massact.reports.kinds.explanation.words import story_in_words
from massact.reports.kinds.scan import images
from massact.reports.kinds.scan.nouns import in_nouns
from massact.reports.readings import Reading

FIGURES = {
    **EXPLAIN_FIGURES,
    "collapse": draw_collapse,
    "spectrum": draw_spectrum,
    "attention_patches": images.draw_patch_attention,
}
SECTIONS = (images.attended, sections.attention, sections.bias, collapsed, spectra, left_in_states, sections.writers)
READING = Reading(
    words=story_in_words,
    sections=[in_nouns(section) for section in SECTIONS],
    brief=in_nouns(tables.brief),
    figures={name: in_nouns(draw) for name, draw in FIGURES.items()},
    table="axes",
)
