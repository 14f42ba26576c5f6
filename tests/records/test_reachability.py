"""A name of the Hub that cannot be had is refused in a moment: measured on sockets of our own, without any network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import massact as ma
from massact.cli.early_checks import data_set_meant, name_on_hub
from massact.records import reachability
from massact.records.errors import UserError
from massact.records.reachability import check_on_hub, unreachable


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No proxy, an empty cache, online mode."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HOME", str(tmp_path)), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    return tmp_path


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_what_answers_is_reachable(alone: Path, listening: int) -> None:
    assert unreachable(f"http://127.0.0.1:{listening}") == ""


def test_what_refuses_is_not(alone: Path) -> None:
    assert "127.0.0.1" in unreachable(f"http://127.0.0.1:{closed_port()}")


def test_what_never_answers_is_not_waited_for(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")

    def waits(*args: object, **kwargs: object) -> None:
        time.sleep(4)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", waits)
    began = time.monotonic()
    assert "0.2 s" in unreachable("http://hub.invalid")
    assert time.monotonic() - began < 2


def test_a_proxy_is_asked_in_its_place(alone: Path, listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for written in (f"http://127.0.0.1:{listening}", f"127.0.0.1:{listening}"):
        monkeypatch.setenv("HTTPS_PROXY", written)
        assert unreachable("https://hub.invalid") == ""
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    monkeypatch.setattr(reachability, "PATIENCE_S", 0.5)
    assert "hub.invalid" in unreachable("https://hub.invalid")


def test_offline_only_what_is_in_the_cache_passes(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reachability, "unreachable", lambda address: asked.append(address) or "no route")
    for kind in ("model", "dataset"):
        with pytest.raises(UserError, match="org/name") as refused:
            check_on_hub("org/name", kind)
        assert refused.value.why == "no route" and len(asked) == 1
        (alone / "hub" / f"{kind}s--org--name" / "snapshots" / "abc").mkdir(parents=True)
        check_on_hub("org/name", kind)
        assert asked.pop() == constants.ENDPOINT and not asked
    with pytest.raises(UserError):
        check_on_hub("org/name", cache=alone / "elsewhere")
    (alone / "datasets" / "org___words" / "default").mkdir(parents=True)
    check_on_hub("org/words", "dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked.clear()
    with pytest.raises(UserError, match="offline"):
        check_on_hub("org/another")
    assert not asked, "offline mode asks nobody"


@pytest.mark.parametrize("name", ["a/b/c", "org/na me", "org/name..", "--x", "org/" + "n" * 200])
def test_what_is_no_name_of_the_hub(name: str, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "unreachable", lambda address: pytest.fail("was asked for"))
    with pytest.raises(UserError) as refused:
        check_on_hub(name)
    assert name in refused.value.what


@pytest.mark.parametrize(("spec", "name"), [
    ("gpt2", "gpt2"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("embedded", ""), ("", ""), (".", ""), ("/a/b", ""),
    ("~/model", ""), ("a/b/c", ""), ("owner/name/part/file.gguf", "owner/name"), ("file.gguf", ""), ("a/file.gguf", ""),
    ("timm:vit_tiny_patch16_224", ""), ("timm:hf-hub:owner/name@main", "owner/name"), ("timm:local-dir:x", ""),
])  # fmt: skip
def test_names_that_can_only_be_on_the_hub(spec: str, name: str) -> None:
    assert name_on_hub(spec) == name


@pytest.mark.parametrize(("corpus", "name"), [
    ("imdb", "imdb"), ("org/words:fr", "org/words"), ("wikitext-2", "Salesforce/wikitext"), ("embedded", ""),
    ("notes.txt", ""), ("two words", ""), ("./notes", ""), ("", ""),
])  # fmt: skip
def test_texts_that_can_only_be_data_sets(
    corpus: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_set_meant(corpus) == name
    (tmp_path / "imdb").touch()
    assert data_set_meant("imdb") == ""


def test_a_misspelt_corpus_is_told_what_is_near(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "unreachable", lambda address: "no route")
    with pytest.raises(UserError) as refused:
        check_on_hub("wikitext2", "dataset")
    assert "'wikitext-2'" in refused.value.do


def test_a_folder_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert name_on_hub("owner/name") == "" and name_on_hub("owner/other") == "owner/other"


def test_in_python_too(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "unreachable", lambda address: "no route")
    for name in ("org/name", "org/name/model.gguf"):
        with pytest.raises(UserError, match="no route"):
            ma.load(name)


@pytest.mark.parametrize("arguments", [
    ("scan", "org/no-such-model"), ("explain", "org/no-such-model"), ("scan", "--corpus", "org/no-such-text"),
    ("scan", "no-such-model"), ("scan", "--corpus", "no-such-text"), ("scan", "--corpus", "c4"),
])  # fmt: skip
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_process_ends_within_two_seconds_of_work(arguments: tuple[str, ...], offline: str, tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    there = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}", "HF_HUB_OFFLINE": offline}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "massact", *arguments], env=kept | there, capture_output=True, text=True
    )
    after = os.times()
    assert done.returncode == 2 and arguments[-1] in done.stderr and "Traceback" not in done.stderr
    # Its processor time: on a busy machine the clock says nothing. What waits for the network is tested above.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
