"""Files, folders, the embedded text, and what `corpus()` makes of each kind of name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from massact.corpora import PRESETS, Source, corpus
from tests.facts import tells


class TestFiles:
    @pytest.mark.parametrize("ending", [".txt", ".md", ".py", ""])
    def test_any_text_file(self, tmp_path, ending, plain):
        file = tmp_path / f"notes{ending}"
        file.write_bytes(b"\xef\xbb\xbfa b\r\nc d\re")
        source = corpus(str(file))
        assert isinstance(source, Source) and source.name == file.name
        assert source.documents() == ["a b\nc d\ne"]
        assert corpus(file, tokenizer=plain).info()["source"]["kind"] == "file"

    def test_folder(self, tmp_path, plain):
        for name, text in {
            "b/2.md": "c d",
            "a.txt": "a b",
            "B.txt": "e",
            "c.bin": "\0",
            ".git/x.txt": "no",
            "e.md": " ",
        }.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "z.jsonl").write_text('{"text": "x"}\n\n{"text": "y\u2028z"}\n')
        source = corpus(tmp_path)
        assert source.documents() == ["e", "a b", "c d", "x", "y\u2028z"]
        made = source.encode(plain)
        assert made.name == tmp_path.name and made.info()["packing"]["n_documents"] == 5
        assert made.seq_len == 8

    def test_jsonl_column(self, tmp_path):
        file = tmp_path / "d.jsonl"
        file.write_text('{"body": "a"}\n{"body": "b"}')
        assert corpus(file, text_column="body").documents() == ["a", "b"]

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "n.txt").write_text("a b")
        assert corpus("~/n.txt").documents() == ["a b"]

    def test_a_name_without_ending_is_a_file_if_it_is_there(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("essay").write_text("a b c")
        assert corpus("essay").documents() == ["a b c"]


class TestFileRefusals:
    def test_missing(self, tmp_path, refused):
        (tmp_path / "notes.txt").write_text("a")
        error = refused(corpus, str(tmp_path / "note.txt"))
        assert "note.txt" in error.what and "'notes.txt'" in error.do
        assert tells([refused(corpus, str(tmp_path / "no" / "a.txt")).why], "not exist")
        (tmp_path / "empty").mkdir()
        assert "is empty" in refused(corpus, str(tmp_path / "empty" / "a.txt")).do

    def test_a_missing_file_is_answered_with_what_can_be_a_corpus(self, tmp_path, refused):
        for name in ("notes.txt", "Makefile", "model.safetensors", ".hidden.txt", "run.json"):
            (tmp_path / name).write_text("a")
        (tmp_path / "folder.txt").mkdir()
        error = refused(corpus, str(tmp_path / "nothing.txt"))
        there, _, named = error.do.partition("Named corpora: ")
        assert "notes.txt" in there
        for name in ("Makefile", "model.safetensors", "hidden", "run.json", "folder"):
            assert name not in error.do
        assert all(name in named for name in (*PRESETS, "embedded"))

    def test_empty(self, tmp_path, refused):
        (tmp_path / "e.txt").write_text(" \n")
        assert "no text" in refused(corpus, tmp_path / "e.txt").what
        assert "no text" in refused(corpus, tmp_path).what

    def test_folder_without_text(self, tmp_path, refused):
        (tmp_path / "a.gif").write_text("x")
        error = refused(corpus, tmp_path)
        assert "1 files, ending in .gif" in error.why and ".md" in error.do
        (tmp_path / "none").mkdir()
        assert "0 files" in refused(corpus, tmp_path / "none").why

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"abc\xff", "Byte 3 (0xff)"),
            (b"\xef\xbb\xbfab\xc3", "Byte 5 (0xc3)"),
            (b"ab\0c", "byte 2 is zero"),
            ("ab".encode("utf-16"), "UTF-16"),
        ],
    )
    def test_not_text(self, tmp_path, refused, data, why):
        (tmp_path / "x.txt").write_bytes(data)
        error = refused(corpus, tmp_path / "x.txt")
        assert "x.txt" in error.what and why in error.why

    def test_unreadable(self, tmp_path, refused, monkeypatch):
        (tmp_path / "x.txt").write_text("a")

        def deny(path, most=0):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("massact.corpora.plain_files.read_given", deny)  # a mode of 000 does not stop root
        assert "Permission denied" in refused(corpus, tmp_path / "x.txt").why

    @pytest.mark.parametrize(
        ("line", "what", "why"),
        [
            ('{"text": ', "Line 2", "column 10"),
            ("[1, 2]", "Line 2", "a list"),
            ('"a"', "Line 2", "a string"),
            ('{"txt": "a", "id": 3}', "no column 'text'", "'txt', 'id'"),
            ("{}", "no column 'text'", "none"),
            ('{"text": 3}', "no text in column 'text'", "a number"),
            ('{"text": null}', "no text in column 'text'", "null"),
            ('{"text": {}}', "no text in column 'text'", "an object"),
        ],
    )
    def test_broken_jsonl(self, tmp_path, refused, line, what, why):
        (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        error = refused(corpus, tmp_path / "x.jsonl")
        assert what in error.what and "Line 2" in error.what and why in error.why

    def test_options_that_mean_nothing(self, tmp_path, refused):
        (tmp_path / "x.txt").write_text("a")
        assert "no columns" in refused(corpus, tmp_path / "x.txt", text_column="body").why
        assert "split='test'" in refused(corpus, tmp_path / "x.txt", split="test").what
        assert "text_column" in refused(corpus, "embedded", text_column="x").what
        assert "split" in refused(corpus, ["a"], split="x").what


class TestNames:
    def test_embedded(self):
        source = corpus()
        assert source.name == "embedded" == corpus("embedded").name
        documents = source.documents()
        assert len(documents) > 5 and sum(map(len, documents)) > 60_000
        assert not any("* * *" in document or document != document.strip() for document in documents)

    def test_what_was_asked_for_is_kept_for_the_model(self, llama):
        source = corpus("embedded", seq_len=16, n_sequences=3, bos="never", seed=5)
        made = source.encode(llama, context=64)
        assert (made.seq_len, made.n_sequences, made.info()["bos"], made.info()["seed"]) == (
            16,
            3,
            "never",
            5,
        )
        other = source.encode(llama, seq_len=8, n_sequences=2, bos="always", seed=1)
        assert (other.seq_len, other.n_sequences, other.info()["bos"], other.info()["seed"]) == (
            8,
            2,
            "always",
            1,
        )
        assert corpus("embedded", tokenizer=llama, seq_len=16, n_sequences=3, bos="never").sha256 == made.sha256

    def test_info_does_not_tell_where_the_file_was(self, tmp_path, plain):
        (tmp_path / "n.txt").write_text("a b c")
        assert str(tmp_path) not in json.dumps(corpus(tmp_path / "n.txt", tokenizer=plain).info())

    @pytest.mark.parametrize("spec", ["The quick brown fox.", "a" * 3000 + " b", "two\nlines"])
    def test_a_prompt_is_not_a_name(self, refused, spec):
        assert tells([refused(corpus, spec).do], "list")

    def test_refused(self, refused):
        assert "empty" in refused(corpus, "  ").what
        assert "no prompts" in refused(corpus, []).why
        assert "only strings" in refused(corpus, ["a", 3]).why
        assert "A float" in refused(corpus, 3.5).what
