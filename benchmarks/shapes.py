"""The vision toy lab over several seeds, and settings that are not its default.

    python benchmarks/shapes.py --seeds 3                                # the table of docs/toy-vit.md
    python benchmarks/shapes.py --attention softmax --set weight_decay=0 --set steps=2000 --json long.json

One line for each training, all at its end and on held-out images: loss, accuracy, greatest |h| and ratio, norm of the
largest patch, register and class token over the median patch, attention of the patches on registers, slot and the most
attended patch (mean over blocks), of the class token on the same, and the change of the loss when states after the
middle block are set to zero and to their mean, with their 95 % intervals. docs/toy-vit.md says what all of it means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = ("nats", "top-1", "|h|", "ratio", "patch", "reg", "class", "p>reg", "p>slot", "p>top", "c>reg", "c>slot",
           "c>top")  # fmt: skip
EDITS = (("registers", "zero"), ("registers", "mean"), ("other patches", "zero"),
         ("top patch", "zero"), ("top patch", "mean"), ("another patch", "zero"))  # fmt: skip


def line(lab: Any, arm: str, seed: int) -> str:
    """One training."""
    from massact.reports.shapes import mean_attention

    end, layers, looks = lab.last(arm), lab.layers(arm), mean_attention(lab, arm)
    numbers = [end["nats"], end["accuracy"]]
    numbers += [layers[c].max() for c in ("top1", "ratio", "patch_norm_ratio", "register_norm_ratio",
                                          "class_norm_ratio")]  # fmt: skip
    numbers += [looks[f"{q}_to_{k}"] for q in ("patches", "class") for k in ("registers", "slot", "top_patch")]
    said = f"{arm:20s}{seed:5d}" + "".join(f"{x:8.3f}" for x in numbers)
    for what in EDITS:
        e = lab.effect(arm, *what)
        said += "  -" if e is None else f"  {e['delta_nats']:+.4f} [{e['ci_low']:+.4f}, {e['ci_high']:+.4f}]"
    return said


def main() -> None:
    from massact.training.lab import STORY, cores
    from massact.training.shape_lab import run_shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--attention", nargs="+", default=list(STORY))
    parser.add_argument("--set", dest="sets", action="append", default=[], help="field=value, can be repeated")
    parser.add_argument("--workers", type=int, default=min(2, cores()))
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    args = parser.parse_args()
    options: dict[str, Any] = dict(text.split("=", 1) for text in args.sets)
    print(f"{'arm':20s} seed" + "".join(f"{name:>8s}" for name in COLUMNS) + "  "
          + ", ".join(f"{target} to {edit}" for target, edit in EDITS), flush=True)  # fmt: skip
    records = []
    for seed in range(args.first, args.first + args.seeds):
        lab = run_shapes(args.attention, workers=args.workers, **options | {"seed": seed})
        for arm in lab.arms:
            print(line(lab, arm, seed), flush=True)
        records.append(lab.as_dict())
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
