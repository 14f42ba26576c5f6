"""How a scan is read: words, sections, small tables, figures."""

from massact.reports.kinds.scan import criteria, images, sections, tables
from massact.reports.kinds.scan.by_input import by_input, draw_by_input
from massact.reports.kinds.scan.census import draw_census
from massact.reports.kinds.scan.cluster_curves import draw_clusters
from massact.reports.kinds.scan.curves import draw_headroom, draw_layers, draw_norms
from massact.reports.kinds.scan.images import PATCH_FIGURES
from massact.reports.kinds.scan.origins import draw_origins, origins
from massact.reports.kinds.scan.portrait import draw_magnitudes
from massact.reports.kinds.scan.text_strip import text_strip
from massact.reports.kinds.scan.words import answer_in_words
from massact.reports.readings import Reading

READING = Reading(
    words=answer_in_words,
    sections=(
        sections.layers,
        text_strip,
        sections.where,
        by_input,
        origins,
        criteria.criteria,
        images.patches,
        sections.portrait,
        sections.ranks,
    ),
    brief=tables.brief,
    definition=sections.definition,
    noun="",
    figures={
        "layers": draw_layers,
        "clusters": draw_clusters,
        "magnitudes": draw_magnitudes,
        "census": draw_census,
        "headroom": draw_headroom,
        "norms": draw_norms,
        "by_input": draw_by_input,
        "origins": draw_origins,
        **PATCH_FIGURES,
    },
    table="clusters",
    columns=("stack", "site", "label", "dim", "position_class", "onset", "offset", "share", "mean", "spread"),
)
