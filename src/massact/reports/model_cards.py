"""What a run says in a model card: YAML that the Hub reads, and text that a reader of the card understands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from massact.reports.contents import Contents
from massact.reports.kinds.scan.views import rule_of
from massact.reports.kinds.scan.words import answer_in_words
from massact.reports.provenance import command_of, corpus_in_words
from massact.reports.render.markup import plain
from massact.reports.spelling import number

TAGS = ["massact", "massive-activations"]
BEGIN, END = "<!-- massact -->", "<!-- end of massact -->"
WHAT = (
    "Massive activations are a handful of scalars in the hidden states of a transformer that are thousands of times "
    "larger than the rest. They sit at fixed dims, mostly on the first token, act as constant biases, and pull "
    "attention onto their tokens ([Sun et al. 2024](https://arxiv.org/abs/2402.17762)). They matter where activations "
    "are quantised or overflow."
)
ROWS = 5  # clusters that are shown


def model_card(runs: Sequence[Contents], repository: str = "") -> str:
    """A whole model card: front matter, title and a section for each run.

    Args:
        runs: opened run directories.
        repository: OWNER/NAME that it is for, which is no base model of itself.
    """
    bases = [base for run in runs if (base := _on_hub(_model(run))) and base != repository]
    front: dict[str, Any] = {"tags": TAGS}
    if bases:
        front = {"base_model": bases[0] if len(bases) == 1 else list(dict.fromkeys(bases))} | front
    name = _called(runs[0]) if len(runs) == 1 else ", ".join(_called(run) for run in runs)
    return "\n".join([_yaml(front), f"# {name}: massive activations", "", marked(runs)])


def merged(card: str, runs: Sequence[Contents]) -> str:
    """Somebody's model card with our section in it, in place of an earlier one; all else stays as it is.

    Args:
        card: with or without front matter.
    """
    head, body = _split(card)
    front = yaml.safe_load(head) if head else {}
    front = front if isinstance(front, dict) else {}
    had = front.get("tags")
    tags = had if isinstance(had, list) else [had] if had else []
    missing = [tag for tag in TAGS if tag not in tags]
    if missing:  # otherwise it stays to the letter
        head = yaml.safe_dump(front | {"tags": [*tags, *missing]}, sort_keys=False, allow_unicode=True)
    ours = marked(runs)
    if BEGIN in body and END in body:
        before, _, rest = body.partition(BEGIN)
        body = f"{before}{ours.rstrip()}{rest.partition(END)[2]}"
    else:
        body = f"{body.rstrip()}\n\n{ours}" if body.strip() else ours
    return f"---\n{head.strip()}\n---\n{body}"


def marked(runs: Sequence[Contents]) -> str:
    """The sections between two marks, by which they are found again."""
    return "\n".join([BEGIN, *(card_section(run, _called(run) if len(runs) > 1 else "") for run in runs), END, ""])


def card_section(run: Contents, of: str = "") -> str:
    """A section for a model card, in Markdown: what was found, by which rule, on what, with which hash.

    Args:
        of: name of the model, where there are several.
    """
    lines = [f"## Massive activations{f' of {of}' if of else ''}", "", WHAT, ""]
    if run.scan is None:
        return "\n".join([*lines, "The hidden states of this model have not been scanned.", ""])
    said = [s for s in answer_in_words(run.scan) if not s.startswith("Note: ")]
    lines += [f"**{_text(said[0])}**", "", *(f"- {_text(s)}" for s in said[1:]), "", *_clusters(run.scan)]
    lines += ["### How this was measured", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _measured(run.scan)]
    command = plain(command_of("scan", run.scan.info))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return "\n".join([*lines, "", f"{fence}bash", command, fence, ""])


def _measured(scan: Any) -> list[tuple[str, str]]:
    info, rule = scan.info, rule_of(scan)
    facts = {
        "tool": f"massact {info.versions.get('massact', '(version not recorded)')}",
        "criterion": f"{rule.in_words() or 'not recorded'}, {rule.source or 'source not recorded'}",
        "corpus": corpus_in_words(info.corpus) or "not recorded",
        "seed": str(info.seed),
        "SHA-256 of the weights": str(info.model.get("weights_sha256") or "not recorded"),
    }
    return [(name, _cell(value)) for name, value in facts.items()]


def _clusters(scan: Any) -> list[str]:
    """The largest clusters as a table."""
    if scan.clusters.empty:
        return []
    rows = ["| | dim | tokens | layers | mean value | x the median |", "|---|---|---|---|---|---|"]
    for row in scan.clusters.head(ROWS).to_dict(orient="records"):
        dim = "-" if row["dim"] < 0 else str(row["dim"])
        cells = (row["label"], dim, row["position_class"], f"{row['onset']} to {row['offset']}", number(row["mean"]),
                 number(row["ratio"]))  # fmt: skip
        rows.append(f"| {' | '.join(_cell(str(c)) for c in cells)} |")
    more = len(scan.clusters) - ROWS
    return [*rows, "", *([f"{more:,} more are in the run.", ""] if more > 0 else [])]


def _text(text: str) -> str:
    """Text that Markdown shows as it is, and that can be read in the file: only what would mean something is escaped.

    Brackets stay: with a backslash some pages take them for a formula.
    """
    return re.sub(r"([\\`*_\[\]<~$])", r"\\\1", plain(text))


def _cell(text: str) -> str:
    """The same in a cell of a table."""
    return " ".join(_text(text).split()).replace("|", r"\|")


def _model(run: Contents) -> Mapping[str, Any]:
    return run.scan.info.model if run.scan is not None else {}


def _called(run: Contents) -> str:
    model = _model(run)
    return _text(" ".join(str(model.get("name") or model.get("id") or "This model").split()))


def _on_hub(model: Mapping[str, Any]) -> str:
    """OWNER/NAME of a model that can only have come from the Hub; "" for anything else."""
    name = str(model.get("id") or "")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not name.endswith(".gguf") else ""


def _yaml(front: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n"


def _split(card: str) -> tuple[str, str]:
    """Front matter and body of a card."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.S)
    return (found[1], card[found.end() :]) if found else ("", card)
