"""Write the pages that are made of the code (`PAGES` at the end). A test fails when they are stale.

python docs/generate.py
python docs/generate.py --figures        # also the pictures of the gallery, from the runs that the tests keep
python docs/generate.py --reproduce      # also what reproduce.md says of the embedded model, measured anew
"""

from __future__ import annotations

import ast
import io
import math
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from massact import trace
from massact.classics import CLASSICS
from massact.cli import app
from massact.corpora import PRESETS, Preset
from massact.interventions.edit_names import edits
from massact.records.kinds import kinds
from massact.records.kinds.comparison import TABLES as COMPARED
from massact.records.kinds.comparison import open_compared
from massact.records.kinds.reproduction import Reproduction
from massact.records.sites import POINTS
from massact.records.tables import Columns
from massact.reports import READINGS, claim_in_words, compare, findings_in_words
from massact.reports.contents import contents_of
from massact.reports.panels import Sheet, caption_of, parts_in
from massact.reports.render.markup import md
from massact.reproductions import ENTRIES, KNOWN, PUBLISHED, reproduce
from massact.scans.criteria import criteria
from massact.variants.registry import variants
from massact.verbs import verbs

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
SOURCE = DOCS.parent / "src" / "massact"

FILES = """# Tables of a run

Made by `python docs/generate.py` from the code; a test fails when it is stale.

Every table is a parquet file, which anything reads:

```python
pandas.read_parquet("runs/demo/layers.parquet")
polars.read_parquet("runs/demo/layers.parquet")
duckdb.sql("select layer, top1, ratio from 'runs/demo/layers.parquet' where ratio > 1000")
```

What a column means stands on the pages below, and in the file itself, as metadata of its field:

```python
pyarrow.parquet.read_schema("runs/demo/layers.parquet").field("ratio").metadata[b"description"]
```
"""

TOP = """# Reference

Made by `python docs/generate.py` from the code; a test fails when it is stale.

## Criteria

Select one with `--criterion NAME`, change a constant of it with `--threshold name=value`. A near miss reaches half of
every constant (`cluster`, an upper bound, is kept). Rules about attention maps are not here: they are no function of
the residual stream.
"""

CLUSTERS = """
### Clusters

What passes, or nearly does, is put together by dim and class of tokens (start, delimiter, padding, other): a cluster.
With n(l) the sequences in which it passes at layer l, and m(l) its mean |h| there, near misses included:

* **onset, offset**: the first and the last layer with n(l) >= max n / 2, so a stray finding moves neither.
* **peak**: of the layers with n(l) = max n the one of the greatest m(l). Size, spread, tokens are of that layer.
* **last**: the last layer behind the peak, without a gap, with m(l) >= m(peak) / 3, whether it passes there or not.
* **hump**: at the layer of max n, fewer than half of the sequences that have it there pass; or entries outside the
  layers of onset to offset with m(l) < 1/3 of the greatest m between them. Of a hump n counts near misses, too.
* **outlier feature**: that dim is large on more than 2 tokens of a sequence and half of all, or on more than 8 and
  6 % of all (Dettmers 2022; Sun 2024 found at most 8), at the peak and over all classes; or over this one alone where
  it is ten times as large as the rest.
* **massive activation**: any other. The largest comes first: massive activations, outlier features, humps.
"""

EDITS = """
## Edits

`massact intervene RUN --set NAME`, as often as wanted; the first four are the default. Massive activations are found
again in any text by their dims and a cut on |h|, half of the smallest finding at that dim: all that reach it are edited
(of an outlier feature, more entries than were found), and a note says how many. `--exact` (in Python `exactly(target,
findings)`) edits the findings alone, in the scanned text. In Python each is a function of `massact.interventions`.
"""

WORKS = """
## Classic works

`massact classics RUN --which NAME`; without `--which` all of them. Definitions and constants are those of the work, see
[classics.md](classics.md).
"""

CHANGES = """
## Attention variants

`massact train --attention NAME`, `massact.training.apply_variant(model, NAME, ...)`. z = scale q.k are the logits, v
the values, x the attention module's input; a row that sums to less than 1 leaves the rest to an extra slot.
"""

SITES = """
## Sites

A site is `layer.point`, or `stack/layer.point` in a model with several stacks; layer 0 is the embedding output, layer l
the residual stream after block l. Selectors are globs: `*.resid_post`, `3.mlp_*`, `encoder/*.attn_out`.

The name of a stack is also the column `stack` of every table and what `--stack` takes. Blocks that carry n streams
(hyper-connections, AltUp) have n + 1 stacks: `stream_0`, `stream_1`, ..., one for each, with what is added to it, so
that the table `writers` is of these; and `collapsed`, what the blocks read of all streams together, which has the
sublayers, so that the tables of attention (`heads`, `axes`, `sinks`, ...) are of it
([Several streams](residual-stream.md#several-streams)).
"""


def constants(thresholds: dict[str, float]) -> str:
    return ", ".join(f"{k} = {'none published' if math.isnan(v) else f'{v:g}'}" for k, v in thresholds.items())


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def help_of(*arguments: str) -> str:
    """`massact ... --help` at a fixed width."""
    runner = CliRunner(env={"COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"})
    said = runner.invoke(app, [*arguments, "--help"], prog_name="massact").output
    return "\n".join(line.rstrip() for line in said.strip().splitlines())


def _documents(preset: Preset) -> str:
    if preset.random:
        return f"{preset.random} at random (NumPy seed {preset.random_seed})"
    return f"the first {preset.first:,}" if preset.first else "all"


def reference_page() -> str:
    """Criteria, clusters, edits, classic works, variants, sites, corpora."""
    out = [TOP]
    out += table(
        ["name", "finds", "rule", "constants", "source"],
        [
            [f"`{c.name}`", c.kind + "s", c.formula, constants(dict(c.thresholds)), c.source]
            for c in criteria().values()
        ],
    )
    out += [CLUSTERS, EDITS]
    out += table(["name", "what it does"], [[f"`{e.name}`", e.says] for e in edits().values()])
    out += [WORKS]
    out += table(["name", "asks", "source"], [[f"`{c.name}`", c.asks, c.source] for c in CLASSICS.values()])
    out += [CHANGES]
    out += table(
        ["variant", "formula", "a row sums to", "options", "source", "note"],
        [
            [
                f"`{v.name}`",
                f"`{v.formula}`",
                v.row_sum,
                ", ".join(f"{k} = {x}" for k, x in v.options.items()),
                v.source,
                v.note,
            ]
            for v in variants().values()
        ],
    )
    out += [SITES]
    out += table(["point", "what it is"], [[f"`{k}`", v] for k, v in POINTS.items()])
    out += ["", "## Named corpora", ""]
    out += table(
        ["name", "data set", "split", "documents", "joined by", "special tokens"],
        [
            [
                f"`{n}`",
                p.dataset,
                p.split,
                _documents(p),
                repr(p.join),
                "none" if p.special_tokens == "never" else "once, around the whole text",
            ]
            for n, p in PRESETS.items()
        ],
    )
    return "\n".join(out) + "\n"


def _tables() -> dict[str, dict[str, Columns]]:
    """The tables of each verb."""
    found: dict[str, dict[str, Columns]] = {}
    for kind in kinds().values():
        found.setdefault(kind.VERB, {}).update(kind.TABLES)
    return {verb: of for verb, of in {**found, "compare": COMPARED}.items() if of}


def tables_page() -> str:
    """Which tables there are, with the pages of their columns."""
    rows = [
        [
            f"[{verb}](tables/{page_name(verb)}.md)",
            ", ".join(f"[{name}](tables/{page_name(verb)}.md#{name}parquet)" for name in of),
        ]
        for verb, of in _tables().items()
    ]
    return "\n".join([FILES, *table(["of", "tables"], rows)]) + "\n"


def columns_page(verb: str) -> str:
    """The columns of the tables of a verb."""
    out = [
        f"# Tables of {verb}",
        "",
        "Made by `python docs/generate.py` from the code ([all tables](../tables.md)).",
        "",
    ]
    for name, columns in _tables()[verb].items():
        out += [f"## {name}.parquet", ""]
        out += table(["column", "type", "meaning"], [[f"`{c}`", t, m] for c, (t, m) in columns.items()]) + [""]
    return "\n".join(out)


def command_line_page() -> str:
    """The help of every verb."""
    out = ["# Command line", "", "Made by `python docs/generate.py` from the code; a test fails when it is stale.", ""]
    for arguments in ((), *((verb,) for verb in (*verbs(), "compare", "show", "report"))):
        out += [f"## {' '.join(('massact', *arguments))}", "", "```text", help_of(*arguments), "```", ""]
    return "\n".join(out)


def experiments() -> list[str]:
    """The tables of reproduce.md: all entries, and what was published of which model."""
    out = table(
        ["", "experiment", "Sun 2024", "of", "what is computed", "needs"],
        [[e.id, e.title, e.section, {"any": "text, images, other"}.get(e.domain, e.domain), e.computation,
          ", ".join(e.needs)] for e in ENTRIES.values()],
    )  # fmt: skip
    out += ["", "What the paper finds (of those beyond it: what is expected), and what would falsify it here:", ""]
    out += table(["", "the paper", "it does not hold if"], [[e.id, e.says, e.claim.fails_if] for e in ENTRIES.values()])
    out += ["", "Published values, by model:", ""]
    rows = []
    for name, k in KNOWN.items():
        mine = [p for p in PUBLISHED if p.model == name]
        tags = ", ".join(f"{sum(p.tag == t for p in mine)} {t}" for t in dict.fromkeys(p.tag for p in mine))
        ids = ", ".join(f"`{i}`" for i in k.ids)
        rows.append([name, f"{k.n_layers} x {k.d_model}", ids,
                     ", ".join(e for e in ENTRIES if any(p.experiment == e for p in mine)), tags])  # fmt: skip
    return out + table(["model", "layers x width", "ids", "experiments", "values"], rows)


def outcome(r: Reproduction) -> list[str]:
    """What was found, a row for each experiment that applies."""
    rows = []
    for name, e in r.info.experiments.items():
        here = findings_in_words(r.reproduced[r.reproduced["experiment"] == name])
        if e["verdict"] != "not applicable":
            claim = claim_in_words(r, name) if here else e["claim"]
            rows.append([name, e["says"], here or f"{e['verdict']}: {e['reason']}", claim])
    return table(["", "the paper", "the embedded model", "its claim here"], rows)


def between(text: str, mark: str, lines: list[str]) -> str:
    """A page with the part between two marks replaced."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    head, rest = text.split(begin)
    return "\n".join([head + begin, "", *lines, "", end + rest.split(end)[1]])


def reproduce_page() -> str:
    """reproduce.md with today's entries; what was measured stays as it is."""
    return between((DOCS / "reproduce.md").read_text(encoding="utf-8"), "experiments", experiments())


def rooms() -> list[str]:
    """The table of architecture.md: what each room is and may import, as tests/test_structure.py enforces it."""
    sys.path.insert(0, str(SOURCE.parents[1]))
    from tests.test_structure import ARROWS, NO_TORCH

    rows = []
    for room, others in ARROWS.items():
        said = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        allowed = ", ".join(other for other in ARROWS if other in others) or "-"
        rows.append([f"`{room}/`", said.splitlines()[0], allowed, "no" if room in NO_TORCH else "yes"])
    door = ["`massact.cli`", "the door: the command line, made of the verbs", "everything, lazily"]
    return table(["room", "one line", "may import", "torch"], [*rows, [*door, "lazy"]])


def architecture_page() -> str:
    """architecture.md with today's rooms."""
    return between((DOCS / "architecture.md").read_text(encoding="utf-8"), "rooms", rooms())


GALLERY = """# Gallery

Every figure that a run directory or a report can have, and how to read it. Made by `python docs/generate.py`, of the
small runs that the tests keep: of one's own runs a verb draws them into `figures/`, and `massact report` on a page."""

ERRORS_TOP = """# Errors

Made by `python docs/generate.py` from the code; a test fails when it is stale.

Every error says what happened, why, and what to do. On the command line it is printed without a traceback; in Python it
is a `MassactError`. The exit status tells whose turn it is:

| class | meaning | exit status |
|---|---|---|
| `UserError` | bad usage or bad input (also a `ValueError`) | 2 |
| `ProofError` | a `UserError`: the model could not be proved to be understood, so nothing is measured on it | 2 |
| `WorkError` | the input was fine, the work failed (also a `RuntimeError`) | 1 |
| - | interrupted with Ctrl-C; the message says what is kept and how to go on | 130 |
| - | stdout is closed or full, or the disk is; files are whole, or as they were | 1 |
| - | the reader of a pipe has left (`massact show RUN \\| head -1`): nothing is said | 141 |

Below are all of them by room, with the user's own values in braces. Where a cell is empty the first one says it all.
"""
ERRORS = ("UserError", "ProofError", "WorkError")


def _said(node: ast.expr | None) -> str:
    """A message as its reader knows it: what is filled in stands in braces."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _said(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _said(node.left) + _said(node.right)
    if isinstance(node, ast.IfExp):
        return " / ".join(x for x in (_said(node.body), _said(node.orelse)) if x)
    if isinstance(node, ast.BoolOp):
        return _said(node.values[0])
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "near":
        return "Did you mean {...}? Known: {...}."
    if isinstance(node, ast.Name) and isinstance(shared := getattr(trace, node.id, None), str):
        return shared
    if isinstance(node, ast.Attribute | ast.Name):
        return "{" + (node.attr if isinstance(node, ast.Attribute) else node.id) + "}"
    return "{...}"


def errors_page() -> str:
    """Every error that the code raises, by room."""
    out = [ERRORS_TOP]
    for room in sorted(p for p in SOURCE.iterdir() if p.is_dir()):
        rows = set()
        for path in sorted(room.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                    named = {k.arg: k.value for k in node.keywords}
                    parts = [*node.args, None, None, None][:3]
                    said = [_said(named.get(n, p)) for n, p in zip(("what", "why", "do"), parts, strict=True)]
                    rows.add((f"`{node.func.id}`", *(" ".join(text.split()) for text in said)))
        if rows:
            out += ["", f"## {room.name}/", ""]
            out += table(["class", "what", "why", "what to do"], [list(r) for r in sorted(rows, key=lambda r: r[1:])])
    return "\n".join(line.replace("<", "&lt;").replace("[", "\\[") for line in out) + "\n"


@cache
def gallery() -> dict[tuple[str, str], Sheet]:
    """Every figure that the runs of the tests have: verb and name, and the sheet of the newest run that has it."""
    sys.path.insert(0, str(TESTS / "reports"))
    import pictured_run

    kept = [place for place in sorted((TESTS / "golden").iterdir()) if re.fullmatch(r"[a-z]+_\d+", place.name)]
    runs = [result for place in kept for result in contents_of(place).results.values()]
    compared = compare(open_compared([TESTS / "golden" / name for name in ("explained_6", "folded_1")]))
    found: dict[tuple[str, str], Sheet] = {}
    for result in [pictured_run.scan(), compared, *runs]:
        for name, make in READINGS[result.KIND].figures.items():
            if parts_in(sheet := make(result)):
                found[getattr(result, "VERB", "compare"), name] = sheet
    return found


def gallery_page() -> str:
    """Each figure: what it is of, what to see in it, and a picture."""
    out = [GALLERY]
    shown = gallery()
    for verb in dict.fromkeys(verb for verb, _ in shown):
        out += ["", f"## {verb}"]
        for (of, name), sheet in shown.items():
            if of == verb:
                out += ["", f"### {name}", "", f"![{name}](figures/gallery/{picture(verb, name)})", ""]
                out += [" ".join(md(text) for text in caption_of(part)) for part in parts_in(sheet)[:1]]
    return "\n".join(out).rstrip() + "\n"


def picture(verb: str, name: str) -> str:
    return f"{page_name(verb)}-{name}.png"


def page_name(verb: str) -> str:
    """A verb, or a kind of run, as a file is called."""
    return verb.replace(" ", "-")


def draw_gallery() -> None:
    """The pictures, small."""
    from massact.reports.render.figures import png_of, shown_figure

    (DOCS / "figures" / "gallery").mkdir(exist_ok=True)
    for key, sheet in gallery().items():
        with Image.open(io.BytesIO(png_of(shown_figure(sheet), dpi=75))) as drawn:
            small = drawn.convert("RGB").quantize(64)
            small.save(DOCS / "figures" / "gallery" / picture(*key), optimize=True)


PAGES: dict[str, Callable[[], str]] = {
    "reference.md": reference_page, "tables.md": tables_page, "command-line.md": command_line_page,
    "errors.md": errors_page, "gallery.md": gallery_page, "reproduce.md": reproduce_page,
    "architecture.md": architecture_page,
    **{f"tables/{page_name(verb)}.md": partial(columns_page, verb) for verb in _tables()},
}  # fmt: skip


if __name__ == "__main__":
    if "--figures" in sys.argv:
        draw_gallery()
    (DOCS / "tables").mkdir(exist_ok=True)
    for file, make in PAGES.items():
        (DOCS / file).write_text(make(), encoding="utf-8")
    if "--reproduce" in sys.argv:  # a minute: measure what the page says of the embedded model
        with tempfile.TemporaryDirectory() as place:
            found = outcome(reproduce(out=Path(place) / "run"))
        REPRODUCE = DOCS / "reproduce.md"
        REPRODUCE.write_text(between(REPRODUCE.read_text(encoding="utf-8"), "outcome", found), encoding="utf-8")
