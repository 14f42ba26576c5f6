"""Text in a chat template: the ids that transformers makes of the same message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import massact as ma
from massact.corpora import Corpus, Source, corpus
from massact.models import Model
from massact.records.errors import UserError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}|end|\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PROMPTS = ["The kettle sings.", "  Why is the lamp low? ", "one"]
OFF: dict[str, Any] = dict(null=False, bos_contrast=False)


@pytest.fixture
def model() -> Model:
    loaded = ma.load()
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def encoded(source: Any, model: Model, **options: Any) -> Corpus:
    assert isinstance(source, Source)
    return source.encode(model.tokenizer, chat_template=True, context=model.context, **options)


def rows_of(made: Corpus) -> list[list[int]]:
    ids = made.inputs["input_ids"]
    mask = made.mask if made.mask is not None else ids == ids
    return [row[counts].tolist() for row, counts in zip(ids, mask, strict=True)]


def by_transformers(model: Model, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    given = dict(tokenize=True, add_generation_prompt=True, return_dict=True)
    ids: list[int] = model.tokenizer.apply_chat_template(message, **given)["input_ids"]
    return ids


def test_prompts_are_what_transformers_makes_of_them(model: Model) -> None:
    made = encoded(corpus(PROMPTS), model)
    assert rows_of(made) == [by_transformers(model, text) for text in PROMPTS]
    assert made.origin.bos == "chat" and made.origin.special_tokens["prefix"] and made.origin.special_tokens["suffix"]


def test_each_row_of_a_table_is_a_message(model: Model, tmp_path: Path) -> None:
    pd.DataFrame({"text": PROMPTS}).to_csv(tmp_path / "a.csv", index=False)
    assert rows_of(encoded(corpus(tmp_path / "a.csv"), model)) == [by_transformers(model, text) for text in PROMPTS]
    assert len(rows_of(encoded(corpus(tmp_path / "a.csv"), model, n_sequences=2))) == 2


def test_each_window_of_a_text_is_a_message(model: Model, tmp_path: Path) -> None:
    text = "The kettle sings and the lamp is low. " * 60
    (tmp_path / "a.txt").write_text(text)
    rows = rows_of(encoded(corpus(tmp_path / "a.txt"), model, seq_len=64, n_sequences=3))
    texts = ("[user]\n", "|end|\n[assistant]\n", text)
    before, after, plain = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)
    room = 64 - len(before) - len(after)
    assert rows == [[*before, *plain[i * room : (i + 1) * room], *after] for i in range(3)]


def test_a_scan_and_what_comes_after_it_read_the_same(model: Model, tmp_path: Path) -> None:
    result = ma.scan(model, PROMPTS, chat_template=True, out=tmp_path / "run", **OFF)
    plain = ma.scan(model, PROMPTS, **OFF)
    assert result.info.corpus["sha256"] != plain.info.corpus["sha256"]
    made = encoded(corpus(PROMPTS), model)
    for text in (PROMPTS, made):
        assert ma.explain(model, text, result).info.corpus["sha256"] == result.info.corpus["sha256"] == made.sha256


@pytest.mark.parametrize(
    "template, options, told",
    [(None, {}, "no chat template"), ("{{ nothing.at.all }}", {}, "cannot be used"),
     (TEMPLATE, {"bos": "always"}, "--bos"), ("fixed", {}, "0 times"),
     ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", {}, "2 times")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_told(model: Model, template: str | None, options: dict[str, Any], told: str) -> None:
    model.tokenizer.chat_template = template
    with pytest.raises(UserError, match=told):
        ma.scan(model, None, chat_template=True, **options)


def test_tokens_have_no_template(model: Model) -> None:
    ids = corpus(["The kettle sings."], tokenizer=model.tokenizer)
    with pytest.raises(UserError, match="chat_template"):
        ma.scan(model, ids, chat_template=True)


def test_a_corpus_that_was_given_its_template(model: Model, tmp_path: Path) -> None:
    """As a scan that is asked for it; the record of the scan says so, for what comes later."""
    wanted = encoded(corpus(PROMPTS), model)
    made = corpus(PROMPTS, tokenizer=model.tokenizer, chat_template=True)
    assert isinstance(made, Corpus) and made.sha256 == wanted.sha256
    for given in (made, corpus(PROMPTS, chat_template=True)):
        result = ma.scan(model, given, **OFF)
        assert result.info.config["chat_template"] is True and result.info.corpus["sha256"] == wanted.sha256
        assert ma.explain(model, PROMPTS, result).info.corpus["sha256"] == wanted.sha256


def test_what_a_corpus_was_given_is_in_the_record_of_its_scan() -> None:
    model = ma.load()
    result = ma.scan(model, corpus(seq_len=24, n_sequences=2, bos="never"), **OFF)
    assert {n: result.info.config[n] for n in ("seq_len", "n_sequences", "bos")} == {
        "seq_len": 24, "n_sequences": 2, "bos": "never"}  # fmt: skip
    assert ma.explain(model, None, result).info.corpus["sha256"] == result.info.corpus["sha256"]


def test_what_is_no_text_has_no_template(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for given in (torch.ones(2, 3, dtype=torch.long), {"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path):
        with pytest.raises(UserError, match="chat_template"):
            corpus(given, chat_template=True)
