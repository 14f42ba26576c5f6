"""The toy lab over several seeds, and settings that are no part of its story.

    python benchmarks/lab.py --seeds 5                                   # the outcomes behind the margins of the tests
    python benchmarks/lab.py --attention softmax --set optimiser=sgd --set starts=bos --steps 500 --json sgd.json

One line for each training: losses in nats, attention on the first position (mean over heads, greatest head), mass of
the slot, ratio of norms, and the change of the loss when the state after block 1 at the first position is set to zero
and to its mean, and at position 9, each with its 95 % interval (on far targets, and on the next ones). docs/toy-lab.md
says what all of it means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("nats", "copy", "bigram", "first", "most", "slot", "norms")
HEAD = f"{'variant':20s}{'seed':>5s}" + "".join(f"{name:>7s}" for name in COLUMNS)
EDITS = (("zero", 0, "far"), ("mean", 0, "far"), ("zero", 9, "far"), ("zero", 0, "next"), ("zero", 9, "next"))


def line(lab: Any, name: str, seed: int) -> str:
    """One training."""
    row = lab.last(name)
    said = f"{name:20s}{seed:5d}"
    for column in ("nats", "backcopy_nats", "bigram_excess_nats", "first_attention", "first_attention_max", "slot_mass",
                   "norm_ratio"):  # fmt: skip
        said += f"{row[column]:7.3f}"
    for what in EDITS:
        e = lab.effect(name, *what)
        said += "  none" if e is None else f"  {e['delta_nats']:+.4f} [{e['ci_low']:+.4f}, {e['ci_high']:+.4f}]"
    cosine = lab.effect(name, "zero", 0)
    return said + ("" if cosine is None else f"  {cosine['cosine']:.2f}")


def main() -> None:
    from massact.labs.job import STORY, cores, run_lab

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--attention", nargs="+", default=list(STORY))
    parser.add_argument("--preset", default="story")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", dest="sets", action="append", default=[], help="field=value, can be repeated")
    parser.add_argument("--workers", type=int, default=min(2, cores()))
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    args = parser.parse_args()
    options: dict[str, Any] = dict(text.split("=", 1) for text in args.sets)
    if args.steps:
        options["steps"] = args.steps
    print(HEAD + "  far: zero at 0, mean at 0, zero at 9; next: zero at 0, zero at 9; cosine", flush=True)
    records = []
    for seed in range(args.seeds):
        lab = run_lab(args.attention, args.preset, workers=args.workers, **options | {"seed": seed})
        for name in lab.variants:
            print(line(lab, name, seed), flush=True)
        records.append(lab.as_dict())
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
