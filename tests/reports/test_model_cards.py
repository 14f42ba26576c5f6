"""Model cards: YAML that can be read, text that can be read, and nobody's card is overwritten."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from massact.cli import app
from massact.records.errors import UserError, WorkError
from massact.reports import publish, report
from massact.reports.contents import contents_of
from massact.reports.model_cards import BEGIN, END, TAGS, card_section, merged
from tests.facts import tells
from tests.reports import compared, hostile_run, labs, synthetic


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_card_has_front_matter_the_answer_and_where_it_comes_from(tmp_path: Path) -> None:
    scan = synthetic.massive()
    path = report(compared.write(tmp_path / "run", None, scan), kind="card")
    assert path.name == "model_card.md"
    front, body = parts(path.read_text(encoding="utf-8"))
    assert front == {"base_model": "acme/tiny-llama", "tags": TAGS}
    answer = next(line for line in body.splitlines() if line.startswith("**Yes: "))
    assert tells(answer, "acme/tiny-llama") and tells(body, f"{len(scan.findings)} findings")
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.M))
    assert rows["criterion"].startswith("sun2024") and rows["seed"] == str(scan.info.seed)
    assert rows["SHA-256 of the weights"] == "not recorded"
    for row in scan.clusters.head(5).itertuples():
        assert f"| {row.label} | {row.dim} | {row.position_class} | {row.onset} to {row.offset} |" in body
    assert re.search(r"```bash\nmassact scan acme/tiny-llama .+\n```", body)
    assert r"\(" not in body and r"\>" not in body, "a reader of the file should not stumble over backslashes"


def test_what_was_not_scanned_says_so(tmp_path: Path) -> None:
    front, body = parts(report(labs.lab(), tmp_path / "card.md", kind="card").read_text())
    assert front == {"tags": TAGS}
    assert tells(body, "not", "scanned") and "Yes:" not in body and "No:" not in body


def test_names_that_are_no_words_stay_names(tmp_path: Path) -> None:
    run = hostile_run.write(tmp_path / "run")
    front, body = parts(report(run, kind="card").read_text(encoding="utf-8"))
    assert front["tags"] == TAGS
    outside = re.sub(r"```+bash\n.*?\n```+", "", body, flags=re.S).replace(BEGIN, "").replace(END, "")
    assert not re.search(r"(?<!\\)<", outside)
    for block in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


OTHERS = """---
license: mit
tags:
- text-generation
---

# My model

Do not touch this.
"""


def test_a_card_that_is_there_keeps_all_it_says() -> None:
    run = contents_of(synthetic.massive(), "")
    once = merged(OTHERS, [run])
    front, body = parts(once)
    assert front == {"license": "mit", "tags": ["text-generation", *TAGS]}
    assert body.startswith(OTHERS.split("---\n", 2)[2]) and card_section(run) in body
    assert merged(once, [run]) == once
    more = once + "\n## Behind\n"
    other = contents_of(synthetic.empty(), "")
    again = merged(more, [other])
    assert card_section(other) in again and card_section(run) not in again
    assert again.count(BEGIN) == again.count(END) == 1 and again.endswith("\n## Behind\n")
    bare, text = parts(merged("# Bare\n", [run]))
    assert bare == {"tags": TAGS} and text.startswith("# Bare\n")
    assert parts(merged("---\ntags: one\n---\nText", [run]))[0] == {"tags": ["one", *TAGS]}


# ------------------------------------------------------------------------------------------ a Hub of our own
@dataclass
class Hub:
    """What a fake of the Hub was asked and given."""

    files: dict[str, bytes] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuses: int = 0
    address: str = ""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:  # noqa: N802
            name = self.path.partition("?")[0].rpartition("/")[2]
            data = hub.files.get(name)
            if data is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            self.answer(200, data, ETag=f'"{len(data):040d}"', X_Repo_Commit="a" * 40)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:  # noqa: N802
            given = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.tokens.add(self.headers["Authorization"])
            if hub.refuses:
                return self.answer(hub.refuses, json.dumps({"error": "not yours"}).encode())
            if self.path.startswith("/api/repos/create"):
                hub.made.append(json.loads(given))
                said: dict[str, Any] = {"url": f"{hub.address}/acme/report", "name": "acme/report"}
            elif "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(given)["files"]]
                said = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in given.splitlines()]
                hub.commits.append(next(x["value"] for x in lines if x["key"] == "header"))
                for file in (x["value"] for x in lines if x["key"] == "file"):
                    hub.files[file["path"]] = base64.b64decode(file["content"])
                said = {
                    "commitUrl": f"{hub.address}/acme/report/commit/{'a' * 40}",
                    "commitOid": "a" * 40,
                    "success": True,
                }
            else:
                said = {"errors": [], "warnings": []}
            self.answer(200, json.dumps(said).encode(), Content_Type="application/json")

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    fake = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.address = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    template = fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield fake
    server.shutdown()
    server.server_close()


def test_report_and_card_are_pushed_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.massive())
    done = CliRunner().invoke(app, ["report", str(run), "--push-to-hub", "acme/report", "--private"])
    assert done.exit_code == 0, done.output
    assert f"{hub.address}/acme/report/commit/" in done.output
    assert len(hub.commits) == 1 and hub.tokens == {"Bearer hf_of_a_test"}
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("acme", "report")
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.files["massact/report.html"] == (run / "report.html").read_bytes()
    front, body = parts(hub.files["README.md"].decode())
    assert front["base_model"] == "acme/tiny-llama" and "**Yes: " in body


def test_a_pushed_card_is_merged_with_the_one_that_is_there(hub: Hub, tmp_path: Path) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.massive())
    hub.files["README.md"] = OTHERS.encode()
    page = report(run)
    for _ in range(2):
        assert publish(run, page, "acme/report").startswith(hub.address)
        assert hub.files["README.md"].decode() == merged(OTHERS, [contents_of(run, "")])


@pytest.mark.parametrize(("status", "kind"), [(401, UserError), (403, UserError), (418, WorkError)])
def test_what_the_hub_refuses(status: int, kind: type[Exception], hub: Hub, tmp_path: Path) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.massive())
    page = report(run)
    hub.refuses = status
    with pytest.raises(kind, match="acme/report"):
        publish(run, page, "acme/report")
    assert not hub.commits


def test_a_hub_that_goes_away_under_way(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.massive())
    page = report(run)

    def fails(*args: object, **kwargs: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fails)
    with pytest.raises(WorkError, match="acme/report") as failed:
        publish(run, page, "acme/report")
    assert "gone" in failed.value.why and str(page) in failed.value.do


def test_what_cannot_be_pushed_is_refused_before_a_page_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compared.write(tmp_path / "run", None, synthetic.massive())

    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["report", str(run), *arguments])
        assert isinstance(done.exception, UserError) and not (run / "report.html").exists()
        return str(done.exception)

    assert "OWNER/NAME" in refused("--push-to-hub", "report")
    assert "--format" in refused("--push-to-hub", "acme/report", "--format", "md")
    assert "--push-to-hub" in refused("--private")
    with monkeypatch.context() as away:
        away.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        assert "Hub" in refused("--push-to-hub", "acme/report")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in refused("--push-to-hub", "acme/report")
