"""Whether what a name of the Hub means can be had at all: known in a moment, before anything is loaded for it.

The Hub's own library tries again for half a minute and more where there is no network.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from massact.records.errors import UserError, first_line
from massact.records.presets import named_corpora

PATIENCE_S = 2.0  # or what HF_HUB_ETAG_TIMEOUT says, by which the Hub's library goes too


def check_on_hub(name: str, kind: str = "model", cache: str | os.PathLike[str] | None = None) -> None:
    """Refuse a name of the Hub that is neither in the cache nor can be fetched.

    Args:
        name: OWNER/NAME, or NAME.
        kind: model or dataset.
        cache: folder of the cache; None: the usual one.

    Raises:
        UserError: it is no name of the Hub; or it is not in the cache, and there is no network, or offline mode is on.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    what = f"Model {name!r}" if kind == "model" else f"The data set {name!r}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{what} is neither a local folder nor a name of the Hub.", first_line(error),
                        "Give a folder that exists, or OWNER/NAME.") from None  # fmt: skip
    if _cached(name, kind, Path(cache or constants.HF_HUB_CACHE), Path(constants.HF_HOME)):
        return
    why = "" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or why:
        offline = " (offline mode is on)" if constants.HF_HUB_OFFLINE else ""
        named = "" if kind == "model" or "/" in name else f" {named_corpora(name)}"
        raise UserError(f"{what} is neither a local folder nor in the cache, and the Hub cannot be reached{offline}.",
                        why, f"Check the name and the network, or give a local folder.{named}")  # fmt: skip


def _cached(name: str, kind: str, hub: Path, home: Path) -> bool:
    """Whether anything of it is in a cache of the Hub's library, or of the package `datasets`."""
    folders = [hub / f"{kind}s--{name.replace('/', '--')}" / "snapshots"]
    if kind == "dataset":
        folders.append(Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")) / name.replace("/", "___"))
    with suppress(OSError):
        return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    return False


def unreachable(address: str) -> str:
    """Why no connection to an address, or to the proxy in front of it, comes about; "" where one does."""
    url = urlsplit(address)
    proxy = getproxies().get(url.scheme)
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PATIENCE_S)
    answer: SimpleQueue[str] = SimpleQueue()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=patience).close()
            answer.put("")
        except OSError as error:
            answer.put(f"{host}: {error.strerror or error}.")

    Thread(target=knock, daemon=True).start()  # a look at names has no time limit of its own
    try:
        return answer.get(timeout=patience)
    except Empty:
        return f"{host} did not answer within {patience:g} s (HF_HUB_ETAG_TIMEOUT sets how long is waited)."
