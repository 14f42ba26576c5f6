"""A report and a model card on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from massact.records.errors import UserError, WorkError, class_and_line
from massact.records.reachability import check_on_hub
from massact.reports.contents import Contents
from massact.reports.model_cards import merged, model_card

PAGE, CARD = "massact/report.html", "README.md"


def check_repository(repository: str) -> None:
    """Refuse, before a page is written, a repository that there cannot be, or that nobody may write to here.

    Raises:
        UserError: no such name, no network, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no repository of the Hub.", do="Give OWNER/NAME.")
    with tempfile.TemporaryDirectory() as nothing:  # what is in the cache does not help where something is sent
        check_on_hub(repository, cache=nothing)
    if get_token() is None:
        raise UserError("You are not logged in to the Hub.", "Only its owner may write to a repository.",
                        "Log in with `hf auth login`, or set HF_TOKEN.")  # fmt: skip


def push(page: Path, runs: Sequence[Contents], repository: str, private: bool | None = None) -> str:
    """Put a page and a model card into a repository of models, in one commit; it is made where there is none.

    A card that is there keeps all it says: only our section of it is written anew.

    Args:
        page: the HTML file. runs: that it is of.
        repository: OWNER/NAME.
        private: of a new repository; None: as its owner has it by default.

    Returns:
        The address of the commit.

    Raises:
        UserError: it may not be written to.
        WorkError: the Hub failed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _told(repository, page):
        api.create_repo(repository, private=private, exist_ok=True)
        before = _card_of(api, repository)
    card = model_card(runs, repository) if before is None else merged(before, runs)
    files = {PAGE: page.read_bytes(), CARD: card.encode("utf-8", "backslashreplace")}
    with _told(repository, page):
        done = api.create_commit(
            repository, [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message="Massive activations: report and section of the model card",
        )  # fmt: skip
    return str(done.commit_url)


@contextmanager
def _told(repository: str, page: Path) -> Iterator[None]:
    """What the Hub's library raises as one message; it and the library under it have many kinds of errors."""
    try:
        yield
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403, 404):
            raise UserError(f"You may not write to {repository!r}.", class_and_line(error),
                            "Log in as one who may (`hf auth login`), or name another one.") from None  # fmt: skip
        raise WorkError(f"The Hub did not take the report for {repository!r}.", class_and_line(error),
                        f"It is whole on this machine: {page}. Try again.") from error  # fmt: skip


def _card_of(api: Any, repository: str) -> str | None:
    """The model card that is there; None where there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as place:
        try:
            return Path(api.hf_hub_download(repository, CARD, local_dir=place)).read_text(encoding="utf-8")
        except EntryNotFoundError:
            return None
