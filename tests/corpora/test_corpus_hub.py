"""Data sets: the paper's protocols and any other name, with a small stand-in for the package `datasets`."""

from __future__ import annotations

import json
import sys
import types
from itertools import islice

import numpy as np
import pytest

from massact.corpora import PRESETS, corpus, hub

pytestmark = pytest.mark.usefixtures("hub_there")


class FakeHub(types.ModuleType):
    """Data sets in memory; remembers what was asked for."""

    def __init__(self, tables: dict[str, dict[str, list[dict[str, object]]]]) -> None:
        super().__init__("datasets")
        self.tables, self.calls, self.read = tables, [], 0

    def load_dataset(self, dataset, name=None, split=None, streaming=False):
        self.calls.append((dataset, name, split, streaming))
        if dataset not in self.tables:
            raise FileNotFoundError(f"Dataset '{dataset}' doesn't exist on the Hub or cannot be accessed.")
        if split not in self.tables[dataset]:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.tables[dataset])}.')
        return self._rows(self.tables[dataset][split])

    def _rows(self, rows):
        for row in rows:
            self.read += 1
            yield row

    def get_dataset_split_names(self, dataset, config):
        if dataset not in self.tables:
            raise FileNotFoundError(f"Dataset '{dataset}' doesn't exist on the Hub or cannot be accessed.")
        return list(self.tables[dataset])


def rows(*texts: str) -> list[dict[str, object]]:
    return [{"text": text} for text in texts]


@pytest.fixture()
def fake(monkeypatch):
    def install(tables):
        module = FakeHub(tables)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    return install


class TestPresets:
    def test_wikitext(self, fake, llama):
        lines = ["", " a b ", "", "c d e a b c"]
        module = fake({"Salesforce/wikitext": {"test": rows(*lines)}})
        made = corpus("wikitext-2", tokenizer=llama, seq_len=3, n_sequences="all")
        assert module.calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False)]
        stream = llama("\n\n".join(lines), add_special_tokens=False)["input_ids"]
        assert made.inputs["input_ids"].tolist() == [stream[0:3], stream[3:6]]
        info = made.info()
        assert info["name"] == "wikitext-2" and info["bos"] == "never" and info["packing"]["n_documents"] == 4
        assert info["source"]["dataset"] == "Salesforce/wikitext" and info["source"]["split"] == "test"

    def test_c4_has_one_bos_at_the_very_start(self, fake, llama):
        texts = ["a b", "c d"] * 2600
        fake({"NeelNanda/c4-10k": {"train": rows(*texts)}})
        source = corpus("c4", seq_len=100, n_sequences="all")
        assert source.documents() == texts[:5000]
        made = source.encode(llama)
        stream = llama(" ".join(texts[:5000]))["input_ids"]
        assert made.inputs["input_ids"].flatten().tolist() == stream[:10000]
        assert made.info()["bos"] == "stream" and made.info()["special_tokens"]["prefix"] == ["<s>"]

    def test_c4_without_a_bos_in_the_tokenizer(self, fake, plain):
        fake({"NeelNanda/c4-10k": {"train": rows("a b c d")}})
        assert corpus("c4", tokenizer=plain, seq_len=2).info()["bos"] == "never"

    def test_pg19_reads_five_books(self, fake):
        module = fake({"emozilla/pg19": {"validation": rows(*"abcdexyz")}})
        assert corpus("pg19").documents() == list("abcde")
        assert module.calls == [("emozilla/pg19", None, "validation", True)] and module.read == 5

    def test_a_data_set_is_read_once(self, fake, plain):
        module = fake({"emozilla/pg19": {"validation": rows(*"abcdexyz")}})
        source = corpus("pg19")
        source.encode(plain), source.encode(plain, seq_len=2)
        assert len(module.calls) == 1

    def test_redpajama_draws_as_the_paper_does(self, fake, monkeypatch, tmp_path):
        fake({})
        per_file = 100
        names = PRESETS["redpajama"].files
        texts = [f"doc {number}" for number in range(per_file * len(names))]
        for number, name in enumerate(names):
            lines = [json.dumps({"text": t, "meta": {}}) for t in texts[number * per_file : (number + 1) * per_file]]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        downloads = types.ModuleType("huggingface_hub")
        downloads.hf_hub_download = lambda dataset, file, repo_type: str(tmp_path / file)
        monkeypatch.setitem(sys.modules, "huggingface_hub", downloads)
        np.random.seed(1)  # the official code
        chosen = np.random.choice(len(texts), 500, replace=False).tolist()
        source = corpus("redpajama")
        assert source.documents() == [texts[number] for number in chosen]
        assert source.join == "\n\n" and source.protocol == "never"
        assert corpus("redpajama", seed=1).documents() != source.documents()

    def test_redpajama_has_one_split(self, fake, refused):
        fake({})
        assert "'train'" in refused(corpus, "redpajama", split="test").why

    def test_another_split_and_column(self, fake):
        module = fake({"Salesforce/wikitext": {"validation": [{"body": "a"}]}})
        assert corpus("wikitext-2", split="validation", text_column="body").documents() == ["a"]
        assert module.calls[0][2] == "validation"

    def test_table_is_the_papers(self):
        assert {name: (p.join, p.special_tokens, p.split) for name, p in PRESETS.items()} == {
            "wikitext-2": ("\n\n", "never", "test"),
            "c4": (" ", "stream", "train"),
            "pg19": (" ", "stream", "validation"),
            "redpajama": ("\n\n", "never", "train"),
        }


class TestAnyName:
    def test_split_and_column_are_found(self, fake, plain):
        module = fake({"me/stories": {"train": rows("no"), "validation": [{"id": 1, "story": "a b c"}]}})
        made = corpus("me/stories:small", tokenizer=plain)
        assert module.calls == [("me/stories", "small", "validation", True)]
        source = {
            "kind": "dataset",
            "dataset": "me/stories",
            "config": "small",
            "split": "validation",
            "column": "story",
        }
        assert made.info()["source"] == source and made.n_tokens == 3

    def test_the_column_text_is_preferred(self, fake):
        fake({"me/x": {"test": [{"title": "t", "text": "a"}]}})
        assert corpus("me/x").documents() == ["a"]

    def test_only_the_first_documents_are_read(self, fake, monkeypatch):
        module = fake({"big": {"train": rows(*["abcde"] * 100)}})
        monkeypatch.setattr(hub, "MAX_CHARACTERS", 20)
        assert len(corpus("big").documents()) == 4 and module.read == 4
        monkeypatch.setattr(hub, "MAX_DOCUMENTS", 2)
        assert len(corpus("big").documents()) == 2

    def test_columns_that_do_not_fit(self, fake, refused):
        fake({"two": {"test": [{"a": "x", "b": "y", "n": 1}]}, "num": {"test": [{"text": 3}]}})
        error = refused(corpus, "two")
        assert "not clear" in error.what and "a, b" in error.why and "text_column" in error.do
        assert corpus("two", text_column="b").documents() == ["y"]
        assert "a, b, n" in refused(corpus, "two", text_column="c").why
        assert "none" in refused(corpus, "num").why
        assert "int" in refused(corpus, "num", text_column="text").why

    def test_unknown_split(self, fake, refused):
        fake({"me/x": {"train": rows("a")}})
        error = refused(corpus, "me/x", split="tset")
        assert "['train']" in error.why and "split" in error.do


class TestRefusals:
    def test_missing_extra(self, monkeypatch, refused):
        monkeypatch.setitem(sys.modules, "datasets", None)
        for name in ("wikitext-2", "redpajama", "wikitxt-2", "me/x"):
            assert 'pip install "massact[data]"' in refused(corpus, name).do
        assert "Did you mean 'wikitext-2'" in refused(corpus, "wikitxt-2").do

    def test_a_folder_named_datasets_is_not_the_package(self, monkeypatch, refused):
        monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
        assert 'pip install "massact[data]"' in refused(corpus, "c4").do

    def test_no_such_data_set(self, fake, refused):
        fake({})
        error = refused(corpus, "wikitext-22")
        assert "no data set 'wikitext-22'" in error.what and "Did you mean 'wikitext-2'" in error.do

    @pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, type("OfflineModeIsEnabled", (Exception,), {})])
    @pytest.mark.parametrize("late", [False, True])
    def test_no_network(self, fake, refused, monkeypatch, kind, late):
        module = fake({"emozilla/pg19": {"validation": rows("a")}})

        def fail(*args, **kwargs):
            raise kind("Couldn't reach the Hub")

        def fail_while_reading(*args, **kwargs):
            yield from islice(rows("a"), 1)
            fail()

        module.load_dataset = fail_while_reading if late else fail
        error = refused(corpus, "pg19")
        assert "cannot be reached" in error.what and "no network" in error.why and "embedded" in error.do

    def test_the_cause_behind_an_error_is_read(self, fake, refused):
        module = fake({})

        def fail(*args, **kwargs):
            try:
                raise ConnectionError("down")
            except ConnectionError as error:
                raise RuntimeError("could not build") from error

        module.load_dataset = fail
        assert "cannot be reached" in refused(corpus, "c4").what

    def test_no_network_for_files(self, fake, refused, monkeypatch):
        fake({})
        downloads = types.ModuleType("huggingface_hub")

        def fail(*args, **kwargs):
            raise type("LocalEntryNotFoundError", (FileNotFoundError,), {})("not in the cache")

        downloads.hf_hub_download = fail
        monkeypatch.setitem(sys.modules, "huggingface_hub", downloads)
        assert "cannot be reached" in refused(corpus, "redpajama").what

    def test_gated(self, fake, refused):
        module = fake({})

        def fail(*args, **kwargs):
            raise FileNotFoundError("Dataset 'me/x' is a gated dataset on the Hub. Visit its page to ask for access.")

        module.load_dataset = module.get_dataset_split_names = fail
        error = refused(corpus, "me/x")
        assert "gated" in error.what and "hf auth login" in error.do
