"""What the benchmarks share: one fresh process for each approach, its peak memory, and the name of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def one_thread() -> None:
    """To be called before torch is imported."""
    for name in THREADS:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pairs_of(plain: Callable[[], Any], other: Callable[[], Any], n: int, device: str) -> list[tuple[float, float]]:
    """Seconds of two calls that take turns: A B, B A, ..."""
    pairs = []
    for i in range(n):
        seconds = {}
        for which, run in (("A", plain), ("B", other)) if i % 2 == 0 else (("B", other), ("A", plain)):
            began = time.perf_counter()
            run()
            wait(device)
            seconds[which] = time.perf_counter() - began
        pairs.append((seconds["A"], seconds["B"]))
    return pairs


def wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def peak_mb(run: Callable[[], Any], device: str) -> float:
    """Greatest memory of a call beyond what was held before it, in MB: of the device, or resident."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field + ":"))


def ask(python: str, script: str, **options: Any) -> dict[str, Any]:
    """Run one worker and read its line."""
    command = [python, os.path.abspath(script)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    # Big blocks by mmap and returned at once, so that resident memory follows the live tensors.
    exact = (
        {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_TOP_PAD_": "0",
            "MALLOC_ARENA_MAX": "1",
        }
        if options.get("memory")
        else {}
    )
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | exact)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"missing": done.stderr.strip().splitlines()[-1] if done.stderr else "?"}


def machine(device: str) -> str:
    """What the figures were measured on."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, 1 thread"
