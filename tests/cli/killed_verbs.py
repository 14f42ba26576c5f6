"""Scan, explain, intervene and classics in children that are killed; run by test_killed_verbs.py in its own process.

The parent has imported everything and measured once, with one thread, so that a child is there at once. Half of the
kills fall at a random time, half just before or after a random file takes its name, where a directory is half-written
if it ever is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

SMALL = ["--n-sequences", "4", "--seq-len", "16", "--batch-size", "1"]
VERBS: dict[str, Callable[[Path], list[str]]] = {
    "scan": lambda out: ["scan", *SMALL, "--no-null", "--no-bos-contrast", "--out", str(out), "--resume"],
    "explain": lambda out: ["explain", str(out), "--batch-size", "1"],
    "intervene": lambda out: ["intervene", str(out), "--set", "zero", "--set", "mean", "--layer", "2"],
    "classics": lambda out: ["classics", str(out), "--which", "norm-growth", "--which", "norm-weights"],
}
THRESHOLDS = ["--threshold", "magnitude=1", "--threshold", "ratio=3"]  # something is found, so that edits have a target


def dying(at: int, after: bool) -> tuple[Callable[..., None], list[int]]:
    """`os.replace` that kills its process before or after its call of a number, and how often it was called."""
    real, calls = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return replace, calls


def run(verb: str, out: Path, at: int = 0, after: bool = False) -> tuple[int, int]:
    """A verb on `out` in this process: its status, and how many files took their names."""
    from massact import cli

    line = VERBS[verb](out) + (THRESHOLDS if verb == "scan" else [])
    replace, calls = dying(at, after)
    with (mock.patch.object(os, "replace", replace), mock.patch("massact.reports.draw"),
          mock.patch("massact.scans.resumption.SAVE_EVERY_S", 0.0), mock.patch.object(sys, "argv", ["massact", *line]),
          open(os.devnull, "w") as nowhere, mock.patch("sys.stdout", nowhere)):  # fmt: skip
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0), calls[0]
    return 1, calls[0]


def child(verb: str, out: Path, at: int = 0, after: bool = False) -> int:
    """Fork a process that runs a verb on `out`; it may kill itself."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os._exit(run(verb, out, at, after)[0])
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(pid: int, after_s: float = 120.0) -> int | None:
    """Exit status of a child; None if it still runs after some seconds, and is killed."""
    until = time.monotonic() + after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


def tables(directory: Path) -> dict[str, pd.DataFrame]:
    return {p.stem: pd.read_parquet(p) for p in sorted(directory.glob("*.parquet"))}


def same(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> bool:
    """Whether tables are equal but for the clock."""
    return one.keys() == other.keys() and all(t.equals(other[name]) for name, t in one.items())


def opened(verb: str, out: Path) -> Any:
    """What a verb has left, opened as a user does; None where it is as before."""
    from massact.records.errors import UserError
    from massact.records.kinds.classics import Classics
    from massact.records.kinds.explanation import Explanation
    from massact.records.kinds.intervention import Intervention
    from massact.records.kinds.scan import open_run

    if verb != "scan":
        open_run(out)
        return {"explain": Explanation.open, "intervene": Intervention.open, "classics": Classics.open}[verb](out)
    try:
        return open_run(out)
    except UserError as error:
        assert any(words in str(error) for words in ("is not finished", "no run.json", "No such run")), error
        return None


def killed(verb: str, before: Path | None, folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a verb some times, look each time at what it left, and let it end after every few kills."""

    def begun(name: str) -> Path:
        place = folder / f"{verb}-{name}"
        return place if before is None else Path(shutil.copytree(before, place))

    whole, began = begun("whole"), time.monotonic()
    status, renamed = run(verb, whole)
    whole_s, wanted = time.monotonic() - began, tables(whole)
    assert status == 0, verb
    fell, n_open, n_runs = 0, 0, 0
    while fell < kills:
        out, n_runs = begun(str(n_runs)), n_runs + 1
        for _ in range(5):
            if rng.randrange(2):
                status = ended(child(verb, out), rng.uniform(0.0, 1.0) * whole_s)
            else:
                status = ended(child(verb, out, rng.randint(1, renamed), bool(rng.randrange(2))))
            assert status in (None, 0, -signal.SIGKILL), f"{verb} failed with {status}"
            fell += status != 0
            left = opened(verb, out)
            n_open += left is not None
            assert left is None or same(tables(out), wanted), f"{verb} in {out}: it opens, and is another one"
        assert ended(child(verb, out)) == 0, f"{verb} in {out}: it does not go on"
        assert opened(verb, out) is not None and same(tables(out), wanted), f"{verb} in {out}: it ends otherwise"
        left_over = [p.name for p in out.iterdir() if p.name.startswith(".")]
        assert not left_over, f"{verb} in {out}: {left_over} was left"
    return {"kills": fell, "open": n_open, "runs": n_runs, "whole_s": whole_s, "renamed": renamed}


def main(folder: Path, kills: int) -> None:
    """Print for every verb the number of kills, and how often what was left could be opened, as JSON."""
    import torch

    import massact.classics
    import massact.explanations
    import massact.interventions
    import massact.models.transformers_models
    import massact.scans
    import massact.training  # noqa: F401

    torch.set_num_threads(1)
    rng, told = random.Random(0), {}
    assert run("scan", folder / "first")[0] == 0  # what is slow once is done
    for verb in VERBS:
        before = None if verb == "scan" else folder / "scan-whole"
        told[verb] = killed(verb, before, folder, kills, rng)
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
