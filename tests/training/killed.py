"""Train in children that are killed at random moments; run by test_killed.py as a process of its own.

The parent has imported everything and never trains, so that a child is there at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

KILLS = 20


def child(out: Path, resume: bool) -> int:
    """Fork a process that trains into `out`."""
    from massact.training import train
    from tests.training.small import small

    pid = os.fork()
    if pid:
        return pid
    try:
        train(small(save_every=1), out, resume=resume)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(pid: int, after_s: float) -> int | None:
    """Exit status of a child, or None if it still runs after some seconds."""
    until = time.monotonic() + after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def main(folder: Path) -> None:
    """Print the record of the baseline, of every killed training, and where the kills fell, as JSON."""
    import torch

    import massact.training.callback
    import massact.training.job
    import massact.training.loop  # noqa: F401
    from massact.training.checkpoints import listed

    torch.set_num_threads(1)
    rng = random.Random(0)
    began = time.monotonic()
    assert ended(child(folder / "whole", False), 120) == 0
    whole_s = time.monotonic() - began
    kills, runs, steps = 0, [folder / "run0"], []
    while True:
        out = runs[-1]
        delay = rng.uniform(0.0, 1.1) * whole_s if kills < KILLS else 120.0
        pid = child(out, (out / "train.json").exists())
        status = ended(pid, delay)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            found = listed(out / "checkpoints")
            steps.append(int(found[0].name.split("-")[1]) if found else 0)
        elif status:
            sys.exit(f"a child failed with {status}")
        elif kills >= KILLS:
            break
        else:
            runs.append(folder / f"run{len(runs)}")
    records = {p.name: json.loads((p / "train.json").read_text()) for p in [folder / "whole", *runs]}
    print(json.dumps({"kills": kills, "steps": steps, "records": records}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
