"""Sections at the end of a page: sources, and where every number comes from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from massact.records.runinfo import jsonable
from massact.records.weight_types import packing_in_words, packing_of
from massact.reports.contents import Contents
from massact.reports.panels import Drawn, caption_of
from massact.reports.parts import Code, Facts, Part, Section, Table, Words
from massact.reports.render.markup import plain
from massact.reports.spelling import number, shortened, visible
from massact.verbs import Verb, verbs
from massact.verbs.options import flags_of

COMMAND = "Command, from the recorded options"
GLOSSARY = (
    ("h", "a hidden state: the residual stream of one sequence, tokens by dims"),
    ("layer", "1 to L: the residual stream after that block; 0: the output of the embedding"),
    ("dim", "a coordinate of the residual stream, counted from 0"),
    ("position", "of a token in its sequence, counted from 0; its class is start (0), delimiter, padding or other"),
    ("finding", "an activation that passes the criterion of the run"),
    ("ratio", "|h| divided by the median |h| of that hidden state, over all its tokens and dims"),
    (
        "onset, offset",
        "of a cluster: first and last layer where it passes in half as many sequences as where it passes in most",
    ),
    ("headroom", "the largest value that a number format holds, divided by the largest |h|: below 1 it overflows"),
    ("sparsity", "Hoyer's, of a vector: 0 if all entries are of one size, 1 if a single one is not zero"),
    ("unavailable", "not measured in this run, or not defined there; it never stands for zero"),
)

# How works are cited on the page -> what they are.
SOURCES = {
    "Sun 2024": "Sun, Chen, Kolter, Liu: Massive Activations in Large Language Models. arXiv 2402.17762",
    "An 2025": "An et al.: Systematic Outliers in Large Language Models. arXiv 2502.06415",
    "Bondarenko 2023": "Bondarenko et al.: Quantizable Transformers. arXiv 2306.12929",
    "Clark 2019": "Clark et al.: What Does BERT Look At? arXiv 1906.04341",
    "Cancedda 2024": "Cancedda: Spectral Filters, Dark Signals, and Attention Sinks. arXiv 2402.09221",
    "Darcet 2023": "Darcet, Oquab, Mairal, Bojanowski: Vision Transformers Need Registers. arXiv 2309.16588",
    "Dettmers 2022": "Dettmers et al.: LLM.int8(): 8-bit Matrix Multiplication for Transformers. arXiv 2208.07339",
    "Gu 2025": "Gu et al.: When Attention Sink Emerges in Language Models. arXiv 2410.10781",
    "He 2024": "He et al.: Understanding and Minimising Outlier Features in Transformer Training. arXiv 2405.19279",
    "Kovaleva 2021": "Kovaleva et al.: BERT Busters: Outlier Dimensions that Disrupt Transformers. arXiv 2105.06990",
    "Namazifar 2023": "Namazifar et al.: Role of Bias Terms in Dot-Product Attention. arXiv 2302.08626",
    "OSP 2025": "Park et al.: Outlier-Safe Pre-Training for Robust 4-Bit Quantization. arXiv 2506.19697",
    "Owen 2025": "Owen et al.: A Refined Analysis of Massive Activations in LLMs. arXiv 2503.22329",
    "Parodi 2026": "Parodi et al. 2026, on controls for register ablation. arXiv 2604.14433",
    "Timkey 2021": "Timkey, van Schijndel: All Bark and No Bite: Rogue Dimensions in Transformer Language Models. "
    "arXiv 2109.04404",
    "Wong 2025": "Wong et al.: On the Existence and Behavior of Secondary Attention Sinks. arXiv 2512.22213",
    "Xiao 2023": "Xiao et al.: Efficient Streaming Language Models with Attention Sinks. arXiv 2309.17453",
    "Yu 2024": "Yu et al.: The Super Weight in Large Language Models. arXiv 2411.07191",
}

# What a model was loaded with, where that was asked for.
LOADING = ("trust_remote_code", "allow_pickle")
DTYPES = ("float32", "bfloat16", "float16")


def definitions(sections: Iterable[Section]) -> Section:
    """The words of the page, and the works that it cites."""
    said = " ".join(_said(part) for section in sections for part in section.parts)
    cited = [(name, full) for name, full in SOURCES.items() if _cited(name, said)]
    parts: list[Part] = [Facts(GLOSSARY, "Words"), *([Facts(cited, "Sources")] if cited else [])]
    return Section("definitions", "Definitions and sources", parts)


def _cited(name: str, said: str) -> bool:
    """'Sun 2024' is cited as such, or as 'Sun et al. 2024'."""
    author, year = name.rsplit(" ", 1)
    return re.search(rf"\b{author}( et al\.| and [\w ]+)?,? {year}\b", said) is not None


def _said(part: Part) -> str:
    if isinstance(part, Words):
        return " ".join(part.sentences)
    if isinstance(part, Table):
        return " ".join([part.title, *(c.meaning for c in part.columns)])
    if isinstance(part, Drawn):
        return " ".join(caption_of(part))
    return " ".join(value for _, value in part.pairs) if isinstance(part, Facts) else ""


def provenance(run: Contents, snippet: str) -> Section:
    """Model, hashes, versions, corpus, seed, commands, git: of every verb.

    Args:
        snippet: for a model card, in Markdown.
    """
    parts: list[Part] = []
    for verb, info in run.records.items():
        name = verb if len(run.records) > 1 else ""
        parts.append(Facts(_record(verb, info, run.scan.info.model if run.scan is not None else {}), name))
    parts.append(Code("Snippet for a model card (Markdown)", snippet))
    raw = {verb: jsonable(vars(info)) for verb, info in run.records.items()}
    dumped = json.dumps(raw, indent=1, ensure_ascii=True, default=str)
    parts.append(Code("The records in full (JSON)", shortened(dumped, 200_000)))
    return Section("provenance", "Provenance", parts)


def _record(verb: str, info: Any, scanned: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, corpus = info.model, info.corpus
    architecture = visible(str(model["architecture"])) if model.get("architecture") else ""
    shape = (
        "; ".join(
            f"{name or 'blocks'}: {n} layers of {model.get('d_model', {}).get(name, '?')}"
            for name, n in model["n_layers"].items()
        )
        if isinstance(model.get("n_layers"), Mapping)
        else ""
    )
    pairs: list[tuple[str, Any]] = [
        ("Model", model.get("id") or model.get("name")), ("Revision", model.get("revision")),
        ("Architecture", ", ".join(x for x in (architecture, shape) if x)),
        ("Parameters", f"{model['n_parameters']:,}" if isinstance(model.get("n_parameters"), int) else None),
        ("Weights, SHA-256", model.get("weights_sha256")), ("Weights are", model.get("dtype")),
        ("GGUF", _gguf(model.get("gguf"))), ("Quantised", " ".join(packing_in_words(packing_of(model)))),
        ("Attention", model.get("attention")), ("Proof", _proof(model.get("proof"))),
        ("Corpus", corpus_in_words(corpus)), ("Corpus, SHA-256", corpus.get("sha256") or corpus.get("tokens_sha256")),
        ("Seed", info.config.get("seed", getattr(info, "seed", None))), ("Device", getattr(info, "device", None)),
        ("Status", getattr(info, "status", None)), ("Started", info.started),
        ("Took", f"{number(info.wall_s)} s" if info.wall_s else None),
        (COMMAND, command_of(verb, info, scanned)),
        ("Versions", ", ".join(f"{k} {v}" for k, v in info.versions.items())), ("Git", _git(info.git)),
    ]  # fmt: skip
    always = {"Model", "Weights, SHA-256", "Corpus", "Corpus, SHA-256", "Seed", "Versions", "Git"}
    said = [(name, value) for name, value in pairs if value not in (None, "") or name in always]
    # A command is written for a shell already: an escape more, and it would be another prompt.
    return [(name, "not recorded" if value in (None, "") else value if name == COMMAND else visible(str(value)))
            for name, value in said]  # fmt: skip


def _proof(proof: Any) -> str:
    if not isinstance(proof, Mapping) or "closure" not in proof:
        return ""
    same = "bit-identical" if proof.get("outputs_identical") else "not identical"
    return (f"the residual stream adds up within {number(proof['closure'])} (tolerance {number(proof.get('tolerance'))}"
            f", {proof.get('n_sums', '?')} sums); outputs with taps installed are {same}")  # fmt: skip


def _gguf(gguf: Any) -> str:
    if not isinstance(gguf, Mapping):
        return ""
    types = gguf.get("types")
    counts = ", ".join(f"{n} {name}" for name, n in types.items()) if isinstance(types, Mapping) else "not recorded"
    return f"unpacked from {gguf.get('file')} (SHA-256 {gguf.get('sha256')}); tensors: {counts}"


def corpus_in_words(corpus: Mapping[str, Any]) -> str:
    """Name, size and BOS policy of a corpus, as its run keeps them."""
    said = [str(corpus["name"])] if corpus.get("name") else []
    for name, noun in (("n_sequences", "sequences"), ("seq_len", "tokens each"), ("n_tokens", "tokens in all")):
        if isinstance(corpus.get(name), int):
            said.append(f"{corpus[name]:,} {noun}")
    if corpus.get("bos"):
        said.append(f"BOS: {corpus['bos']}")
    return ", ".join(said)


def _git(git: Mapping[str, Any]) -> str:
    if not git:
        return "not from a checkout"
    return f"{git.get('commit')}{' with uncommitted changes' if git.get('modified') else ''}"


def command_of(verb: str, info: Any, scanned: Mapping[str, Any] | None = None) -> str:
    """The command line with the options that a record holds; "" for a verb without one.

    Args:
        verb, info: the verb and its record.
        scanned: what the scan that it stands on records of the model.
    """
    if verb not in verbs():
        return ""
    model = {**(scanned or {}), **info.model}
    words = ["massact", verb]
    if verb == "scan":
        words += [str(info.model["id"])] if info.model.get("id") not in (None, "embedded") else []
        words += ["--revision", str(info.model["revision"])] if info.model.get("revision") else []
        words += ["--dtype", str(model["dtype"])] if model.get("dtype") in DTYPES else []
    else:
        words.append("RUN")
    asked = model.get("asked")
    words += [f"--{name.replace('_', '-')}" for name in LOADING if isinstance(asked, Mapping) and asked.get(name)]
    for option, (flag, off) in _recorded(verbs()[verb]).items():
        value = info.config.get(option)
        if (option, value) == ("pictures", True):
            continue  # as without it; of texts there are none
        if isinstance(value, bool):
            words += [said] if (said := flag if value else off) else []
        elif isinstance(value, Mapping):
            words += [w for k, v in value.items() for w in (flag, f"{k}={_given(v)}")]
        elif option in ("layer", "tasks") and isinstance(value, list | tuple):
            words += [flag, ",".join(str(v) for v in value)] if value else []
        elif isinstance(value, list | tuple):
            words += [w for v in value for w in (flag, str(v))]
        elif value is not None and (option, value) != ("null", "auto"):
            words += [flag, str(value)]
    head = info.config.get("head")
    if isinstance(head, Mapping):
        words += ["--zero-shot"] if head.get("kind") == "zero-shot" else ["--head", str(head.get("file"))]
    return " ".join(map(_quoted, words)) + (" --out RUN" if verb == "scan" else "")


def _recorded(verb: Verb) -> dict[str, tuple[str, str]]:
    """Flags of the options that its record keeps, and of what these are of."""
    given = {name: flag for name, flag in flags_of(verb.inputs).items() if name in ("corpus", "labels")}
    return given | flags_of(verb.options)


def _given(value: Any) -> str:
    """A value as an option takes it: mean=0.5,0.5,0.5; of sizes: resize=256x128; nothing: none."""
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(v, int) for v in value) else ",").join(map(str, value))
    return "none" if value is None else str(value)


def _quoted(word: str) -> str:
    """A word for a shell; newlines and their like, and spaces that a page would swallow, as bash and zsh write them."""
    if plain(word) == word and word == word.strip() and "  " not in word:
        return shlex.quote(word)
    slashed = word.replace("\\", "\\\\").replace("'", "\\'")
    # \x80 is a byte to a shell, not a character.
    written = "".join(f"\\u{ord(c):04x}" if plain(c) != c and 0x80 <= ord(c) <= 0xFF else plain(c) for c in slashed)
    return "$'" + re.sub(r"(?<= ) |^ | $", r"\\x20", written) + "'"
