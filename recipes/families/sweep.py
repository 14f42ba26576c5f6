"""Try every family of transformers: is a tiny random model of it proved, refused (why), or not to be built (why)?

python -m recipes.families.sweep                    # all of them, into docs/families.md
python -m recipes.families.sweep --only bert,t5     # some, printed
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

import massact
from massact.records.errors import ProofError, UserError
from recipes.families.shrinking import POLICIES, awake, holders, shrunk

NO_EXAMPLE = "no example"
TRIED = ("proved", "refused", NO_EXAMPLE)
# Of each kind the first auto class that a family has; a family may be of several kinds.
KINDS: dict[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": ("IMAGE_CLASSIFICATION", "MASKED_IMAGE_MODELING", "VIDEO_CLASSIFICATION", "OBJECT_DETECTION",
               "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION",
               "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "IMAGE_MATTING", "IMAGE_TO_IMAGE",
               "TEXT_RECOGNITION", "TABLE_RECOGNITION", "MASK_GENERATION", "IMAGE", "BACKBONE"),
    "speech": ("CTC", "SPEECH_SEQ_2_SEQ", "TDT", "RNNT", "AUDIO_CLASSIFICATION", "AUDIO_XVECTOR", "TEXT_TO_SPECTROGRAM",
               "TEXT_TO_WAVEFORM"),
    "mixed": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION",
              "VISUAL_QUESTION_ANSWERING", "RETRIEVAL"),
}  # fmt: skip
# What cannot be guessed from the defaults of a class.
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "reformer causal": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "chameleon": {"vocabulary_map": {"<image>": 5, "<racm3:break>": 6, "<eoss>": 7}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
}
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
PATIENCE_S = 300
_TRIES_S = 12  # other sizes are tried for so long
_MOST_PARAMETERS = 60e6


@dataclass
class Row:
    """What came of one family: `status` is proved, refused or not buildable; `why` says why not."""

    family: str
    kind: str
    model: str
    status: str
    why: str = ""
    parameters: int = 0
    stacks: str = ""
    policy: int = 0
    wall_s: float = 0.0
    attends: bool = True


def classes_of(family: str) -> dict[str, type]:
    """The model classes of a family: kind -> class; "other" with its base class where it is of no kind."""
    config = CONFIG_MAPPING[family]
    found: dict[str, type] = {}
    for kind, names in KINDS.items():
        for name in names:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING")
            model = _model(mapping, config)
            if model is not None and model not in found.values():
                found[kind] = model
            if model is not None:
                break
    if not found:
        model = _model(modeling_auto.MODEL_MAPPING, config)
        if model is not None:
            found["other"] = model
    return found


def _model(mapping: Any, config: type) -> type | None:
    model = mapping[config] if config in mapping else None
    return model[0] if isinstance(model, tuple) else model


def built(family: str, kind: str, model: type, policy: int, seed: int = 0) -> torch.nn.Module:
    """A tiny random model of a family."""

    def config() -> Any:
        extra = EXTRA.get(family, {}) | EXTRA.get(f"{family} {kind}", {})
        default = CONFIG_MAPPING[family](**extra)
        made = type(default)(**{**extra, **shrunk(default, POLICIES[policy])})
        wanted = getattr(model, "config_class", None)
        parts = [c for c in holders(made) if wanted is not None and type(c) is wanted]
        return (parts or [made])[0]

    with torch.device("meta"):
        size = sum(p.numel() for p in model(config()).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    return awake(model(config()).eval(), seed)


def tried(family: str, kind: str, model: type) -> Row:
    """One family of one kind: with the first policy that builds a model that runs."""
    began, why, runs = time.time(), "", None
    for policy in range(len(POLICIES)):
        if time.time() - began > _TRIES_S:
            break
        row = Row(family, kind, model.__name__, "not buildable", policy=policy)
        try:
            module = built(family, kind, model, policy)
        except Exception as error:
            why = why or f"{type(error).__name__}: {error}"
            continue
        if type(module).forward is torch.nn.Module.forward or "unimplemented" in type(module).forward.__name__:
            return _done(Row(family, kind, model.__name__, "not buildable", "it has no forward pass"), began)
        row.parameters = sum(p.numel() for p in module.parameters())
        try:
            loaded = massact.load(module)
        except (ProofError, UserError) as error:
            row.status, row.why = "refused" if isinstance(error, ProofError) else NO_EXAMPLE, str(error)
            row = _done(row, began, module)
            if isinstance(error, ProofError):
                return row
            runs = runs or row
            continue
        except Exception as error:
            row.status, row.why = "crash", f"{type(error).__name__}: {error}"
            return _done(row, began)
        row.status = "proved"
        row.stacks = ", ".join(f"{s.path} {s.n_layers}" for s in loaded.anatomy.stacks)
        row.why = " ".join(loaded.anatomy.left_out)
        return _done(row, began)
    return runs or _done(Row(family, kind, model.__name__, "not buildable", why), began)


def _done(row: Row, began: float, module: torch.nn.Module | None = None) -> Row:
    row.wall_s = round(time.time() - began, 1)
    if module is not None:
        row.attends = any("attention" in type(m).__name__.lower() for m in module.modules())
    return row


def _child(pipe: Any, family: str, kind: str, model: type) -> None:
    sys.stderr = sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    pipe.send(tried(family, kind, model))


def apart(family: str, kind: str, model: type) -> Row:
    """`tried`, in a process of its own that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(its, family, kind, model))
    process.start()
    its.close()
    try:
        row = mine.recv() if mine.poll(PATIENCE_S) else None
        why = f"it took more than {PATIENCE_S} s"
    except EOFError:
        row, why = None, "the process died"
    process.kill()
    process.join()
    return row or Row(family, kind, model.__name__, "not buildable", why)


def families() -> Iterator[tuple[str, str, type | None, str]]:
    """Every family, kind and class; a family without a class of its own with the reason."""
    seen: set[type] = set()
    for family in sorted(CONFIG_MAPPING_NAMES):
        try:
            found = classes_of(family)
        except Exception as error:
            yield family, "other", None, f"{type(error).__name__}: {error}"
            continue
        if not found:
            yield family, "part", None, "a part of another family: no auto class builds it"
        for kind, model in found.items():
            if model not in seen:
                seen.add(model)
                yield family, kind, model, ""


def table(rows: list[Row]) -> str:
    """The page docs/families.md: what came of every family, by kind."""
    lines = [
        "# Families of transformers",
        "",
        f"Every family of `transformers.CONFIG_MAPPING` ({transformers.__version__}), built tiny, with random weights,",
        "by `make families`, and loaded: *proved*, or *refused* with the reason. No family is named by massact. What",
        "cannot be built (a library that is not installed, a configuration whose defaults do not build) is listed at",
        "the end with the reason. *No example*: built, and not run: no input that massact makes by itself fits this",
        "tiny model; a real one may be given one (`inputs=`). *Without attention*: convolutions and codecs, which are",
        "no transformers.",
        "",
        "| kind | ran | proved | refused | of these without attention | proved of those with attention | no example |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = [*KINDS, "other"]
    for kind in kinds:
        n = Counter(row.status for row in rows if row.kind == kind)
        bare = sum(row.kind == kind and row.status == "refused" and not row.attends for row in rows)
        ran = n["proved"] + n["refused"]
        share = f"{100 * n['proved'] / max(ran - bare, 1):.0f} %"
        lines.append(f"| {kind} | {ran} | {n['proved']} | {n['refused']} | {bare} | {share} | {n[NO_EXAMPLE]} |")
    for kind in kinds:
        lines += ["", f"## {kind.capitalize()}", "", "| family | class | | |", "| --- | --- | --- | --- |"]
        lines += [_line(row) for row in rows if row.kind == kind and row.status in TRIED]
    lines += ["", "## Not buildable", "", "| family | kind | class | why |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.family} | {row.kind} | {row.model} | {_cell(row.why)} |"
        for row in rows
        if row.status == "not buildable"
    ]
    parts = ", ".join(row.family for row in rows if row.status == "part")
    lines += ["", f"Parts of other families, which no auto class builds: {parts}."]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    bare = "" if row.attends or row.status != "refused" else "Without attention. "
    said = paths_of(row) if row.status == "proved" else f"{bare}{_cell(row.why)}"
    return f"| {row.family} | {row.model} | {row.status} | {said} |"


def paths_of(row: Row) -> str:
    """The lists of blocks that were proved, once each."""
    return ", ".join(dict.fromkeys(f"`{stack.rpartition(' ')[0]}`" for stack in row.stacks.split(", ")))


def _cell(text: str) -> str:
    """A few sentences, as a cell of a table."""
    words = re.sub(r" from '/[^']*'", "", " ".join(text.split()))  # where a package lies is of this machine alone
    words = words.replace("|", "\\|").replace("<", "&lt;")
    return words if len(words) < 500 else words[:500].rpartition(" ")[0] + " ..."


def main() -> None:
    """Try all families, or some; write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of families, with commas; printed, no page")
    parser.add_argument("--rows", type=Path, default=Path("runs/families.jsonl"), help="what was found, as it comes")
    parser.add_argument("--again", action="store_true", help="only those that --rows has not as proved")
    given = parser.parse_args()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    known = _read(given.rows) if given.again else {}
    if not given.again and not given.only:
        given.rows.unlink(missing_ok=True)
    only = set(given.only.split(",")) - {""}
    with given.rows.open("a") as file:
        for family, kind, model, why in families():
            old = known.get((family, kind))
            if (only and family not in only) or (old is not None and old.status == "proved"):
                continue
            if model is None:
                row = Row(family, kind, "", "part" if kind == "part" else "not buildable", why)
            else:
                row = apart(family, kind, model)
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            if only:
                print(f"{row.family} [{row.kind}] {row.model}: {row.status}. {row.stacks} {row.why}")
    if not only:
        found = sorted(_read(given.rows).values(), key=lambda row: row.family)
        PAGE.write_text(table(found))


def _read(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of every family and kind."""
    rows = (Row(**json.loads(line)) for line in path.read_text().splitlines()) if path.exists() else ()
    return {(row.family, row.kind): row for row in rows}


if __name__ == "__main__":
    main()
