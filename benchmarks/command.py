"""What a whole command costs over a script that loads the model and runs just the forward passes that it needs.

    python benchmarks/command.py                                   # SmolLM2-135M of .cache, 8 x 256 tokens
    python benchmarks/command.py --model DIR --verbs scan explain --pairs 3 --sequences 8 --tokens 256

Each side is a fresh process with one thread; the two take turns, and printed are the ratios of CPU time (user and
system, which a busy machine changes little), of wall time, and of peak resident memory: medians over the pairs, and
their range. What a script has to do for a verb:

* scan: import the library, load the model and its tokenizer, one forward pass without the head;
* explain: the same;
* intervene: loading and (1 + edits) forward passes with the head and the loss over the sequences that it edits;
* classics: one forward pass with the head.

`show` and `--help` have no such script: their CPU seconds are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from side_by_side import machine, one_thread

one_thread()

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, n, tokens, passes, head = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0][: n * tokens].view(n, tokens)
with torch.inference_mode():
    for _ in range(passes):
        for row in ids:
            model(row[None], labels=row[None], use_cache=False) if head else model.model(row[None], use_cache=False)
"""
FOLDER = ".cache/smollm2-135m-instruct"
EDITS = 4


def measured(command: list[str]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak resident MiB of one process.

    Raises:
        SystemExit: it failed; says what it printed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - began,
        "peak_mib": used.ru_maxrss / 1024,
    }


def verbs(options: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Of each verb the arguments of `massact`, and those of the script."""
    n, tokens, run = str(options.sequences), str(options.tokens), str(folder / "run")
    size = ["--n-sequences", n, "--seq-len", tokens]
    some = str(max(1, options.sequences // 2))
    own = [options.model, options.text]
    return {
        "scan": (["scan", options.model, "--corpus", options.text, *size, "--out", run], [*own, n, tokens, "1", "0"]),
        "explain": (["explain", run], [*own, n, tokens, "1", "0"]),
        "intervene": (["intervene", run], [*own, some, tokens, str(1 + EDITS), "1"]),
        "classics": (["classics", options.model, "--corpus", options.text, *size], [*own, n, tokens, "1", "1"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=FOLDER, help="a folder of a causal language model")
    parser.add_argument("--text", help="a text file; default: the text that massact carries")
    parser.add_argument("--verbs", nargs="+", default=["scan", "explain", "intervene"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    options.text = options.text or str(Path(find_spec("massact").submodule_search_locations[0], "corpora/embedded.txt"))
    found: dict[str, Any] = {"machine": machine("cpu"), "options": {k: str(v) for k, v in vars(options).items()}}
    print(json.dumps(found["machine"]))
    massact = [sys.executable, "-m", "massact"]
    jobs = verbs(options, folder)
    if "scan" not in options.verbs:
        measured([*massact, *jobs["scan"][0]])
    for name in options.verbs:
        ours, script = jobs[name]
        pairs = []
        for i in range(options.pairs):
            sides = [("bare", [sys.executable, "-c", SCRIPT, *script]), ("massact", [*massact, *ours])]
            pair = {}
            for which, command in sides if i % 2 == 0 else sides[::-1]:
                if which == "massact" and name == "scan":
                    shutil.rmtree(folder / "run", ignore_errors=True)
                pair[which] = measured(command)
            pairs.append(pair)
        found[name] = pairs
        print(f"{name:10}", *(_ratio(pairs, key) for key in ("cpu_s", "wall_s", "peak_mib")), sep="  ", flush=True)
    for said, arguments in (("--help", ["--help"]), ("show", ["show", str(folder / "run")])):
        seconds = statistics.median(measured([*massact, *arguments])["cpu_s"] for _ in range(options.pairs))
        found[said] = seconds
        print(f"{said:10}  {seconds:.2f} s of CPU")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    shutil.rmtree(folder, ignore_errors=True)


def _ratio(pairs: list[dict[str, dict[str, float]]], key: str) -> str:
    ratios = [p["massact"][key] / p["bare"][key] for p in pairs]
    bare, ours = (statistics.median(p[side][key] for p in pairs) for side in ("bare", "massact"))
    unit = {"cpu_s": "s CPU", "wall_s": "s", "peak_mib": "MiB"}[key]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of {bare:,.1f} {unit}: {ours:,.1f}"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
