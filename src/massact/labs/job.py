"""The toy lab: watch a sink and its bias grow on bigram-backcopy, and what an attention variant does to them.

In the mixed form some sequences begin with an ordinary character, so the first position is not always the same token.
What softmax parks on it, the model has to make of whatever stands there: its state becomes a bias.
"""

from __future__ import annotations

import json
import os
import queue as queues
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from massact.labs.backcopy import Backcopy
from massact.labs.looks import N_LOOKED, effects_of, key_scale, look, losses, opened, task_losses, uniform
from massact.labs.toy import FAR, FROM_QUERY, NEXT, ORDINARY, LabConfig, optimiser_of, task_of, toy_model
from massact.records.disk import write_atomic
from massact.records.errors import UserError
from massact.records.kinds.lab import Lab, LabInfo
from massact.records.run import RETIRED
from massact.records.runinfo import git_state
from massact.records.tables import frame
from massact.variants.registry import variant

STORY = ("softmax", "kv-bias", "softmax-off-by-one")
N_HELD_OUT = 512  # sequences for losses; half as many are looked into
DRAWN_AT_ONCE = 800  # sequences: one draw for many steps costs half of a draw for each
KEYS = ("kv-bias", "k-bias")  # whose k' must start at the scale of real keys: else the slot draws no attention
Row = dict[str, Any]
Progress = Callable[[str, int, int, Row], None]


def _silent(variant: str, done: int, total: int, row: Row) -> None:
    """No progress."""


@dataclass
class ToyRun:
    """What one training showed.

    Args:
        config: as it was resolved.
        module: the trained model.
        curve: rows of the table "lab"; effects: of "lab_effects".
        facts: key_std (None unless k' was drawn at the scale of real keys), uniform_attention.
    """

    config: LabConfig
    module: nn.Module
    curve: list[Row] = field(default_factory=list)
    effects: list[Row] = field(default_factory=list)
    facts: Row = field(default_factory=dict)


# -------------------------------------------------------------------------------------------- one training
def train_toy(config: LabConfig, progress: Progress = _silent) -> ToyRun:
    """Train one model on bigram-backcopy and measure what grew; one thread, the same every time for a seed.

    Args:
        config: what to train.
        progress: called at every step with (variant, steps done, steps in all, latest measurement).

    Raises:
        UserError: the variant cannot be had, or the loss is not finite.
    Source: Guo et al. 2024 (the task); Sun 2024, Sections 4.1 to 4.3 (set to mean, set to zero, explicit biases).
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        task = task_of(config)
        held_out, looked_at = held_out_of(config, task)
        module = toy_model(config, task.bos + 1)
        facts: Row = {"key_std": None, "uniform_attention": uniform(config.length)}
        if config.attention != "softmax":
            from massact.variants.application import apply_variant

            options = dict(config.options)
            if config.attention in KEYS and "std" not in options:
                options["std"] = facts["key_std"] = round(key_scale(module, looked_at), 3)
            module = apply_variant(module, config.attention, **options)
        done = ToyRun(config, module, facts=facts)
        model, began = opened(module), time.perf_counter()
        for step, loss in _steps(module, task, config):
            if step % config.every == 0 or step == config.steps:
                module.eval()
                some = looked_at if step == config.steps else looked_at[:N_LOOKED]
                row = task_losses(module, held_out, task) | look(model, some, config)
                done.curve.append({"variant": config.attention, "step": step, **row,
                                   "wall_s": time.perf_counter() - began})  # fmt: skip
                module.train()
            if not torch.isfinite(loss):
                raise UserError(f"The loss of {config.attention} is not finite at step {step:,}.",
                                do="Set a smaller learning_rate.")  # fmt: skip
            progress(config.attention, step, config.steps, done.curve[-1])
        module.eval()
        done.effects = [{"variant": config.attention} | row for row in effects_of(model, looked_at, task, config)]
    return done


def held_out_of(config: LabConfig, task: Backcopy) -> tuple[Tensor, Tensor]:
    """Held-out sequences: as in training, for losses; and those that are looked into."""
    random = torch.Generator().manual_seed(config.seed + 2)
    kind = "bos" if config.starts == "bos" else "none"
    n = max(32, N_HELD_OUT * 32 // config.length)
    return (task.draw(n, config.length, config.starts, random, config.share),
            task.draw(max(32, n // 2), config.length, kind, random))  # fmt: skip


def _steps(module: nn.Module, task: Backcopy, config: LabConfig) -> Iterator[tuple[int, Tensor]]:
    """Train; after every step give its number, from 0 before the first, and the loss of it."""
    random = torch.Generator().manual_seed(config.seed + 1)
    optimiser, schedule = optimiser_of(module, config)
    ahead = max(1, DRAWN_AT_ONCE // config.batch)
    module.train()
    yield 0, torch.zeros(())
    for step in range(config.steps):
        if step % ahead == 0:
            drawn = task.draw(ahead * config.batch, config.length, config.starts, random, config.share)
        ids_BT = drawn[step % ahead * config.batch :][: config.batch]
        loss_BT, copies_BT, bigrams_BT = losses(module, ids_BT, task)
        loss = loss_BT[copies_BT | bigrams_BT].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        yield step + 1, loss.detach()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations this small only wait for other threads; and one thread sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------- several, side by side
def run_lab(
    variants: Sequence[str] = STORY, preset: str = "story", *, out: str | Path | None = None, workers: int = 1,
    progress: Progress = _silent, **options: Any,
) -> Lab:  # fmt: skip
    """Train one toy model for each attention variant, on the same data, and put them side by side.

    Args:
        variants: names of attention variants.
        preset: "story", or "guo" for the published task and sizes (hours on a CPU).
        out: directory for lab.json, the tables, the trained models (model-VARIANT) and held-out sequences as text.
        workers: processes; more than one need a main module that can be imported (`if __name__ == "__main__":`).
        progress: called with (variant, steps done, steps in all, latest measurement).
        **options: fields of `LabConfig`.

    Raises:
        UserError: an unknown variant, option or value; `out` holds a lab, or cannot be written.
    """
    configs = configs_of(variants, preset, options)
    place = None if out is None else Path(out)
    if place is not None:
        _claim(place)
    began, info = time.perf_counter(), LabInfo(git=git_state())
    info.config = {k: v for k, v in configs[0].as_dict().items() if k not in ("attention", "options")}
    info.corpus = {"looked_at": "BOS" if configs[0].starts == "bos" else "an ordinary character",
                   "from_query": FROM_QUERY, "ordinary": ORDINARY,
                   "far": ORDINARY + FAR, "next": NEXT}  # fmt: skip
    made = _side_by_side(configs, place, workers, progress) if workers > 1 and len(configs) > 1 else [
        _one(config, place, progress) for config in configs]  # fmt: skip
    info.variants = {config.attention: facts for config, (_, _, facts) in zip(configs, made, strict=True)}
    info.wall_s = round(time.perf_counter() - began, 1)
    lab = Lab(info, frame("lab", [row for curve, _, _ in made for row in curve]),
              frame("lab_effects", [row for _, effects, _ in made for row in effects]), place)  # fmt: skip
    if place is not None:
        _write_sequences(configs[0], place)
        lab.save(place)
    return lab


def configs_of(variants: Sequence[str], preset: str, options: dict[str, Any]) -> list[LabConfig]:
    """One configuration for each variant, checked before anything is trained."""
    if not variants or len(set(variants)) < len(variants):
        raise UserError(f"The toy lab wants every variant once, not {', '.join(variants) or 'none'}.")
    base = LabConfig.of(preset, **options)
    configs = [base.for_variant(name) for name in variants]
    unknown = [k for k in base.options if not any(k in c.options for c in configs)]
    if unknown:
        raise UserError(f"None of {', '.join(variants)} has the option {unknown[0]!r}.")
    for c in configs:
        variant(c.attention).resolved(c.options)
    return configs


def _claim(place: Path) -> None:
    """Refuse a directory that cannot be used before minutes are spent."""
    others = ("run.json", "train.json", *RETIRED)
    if Lab.open(place) is not None or any((place / name).exists() for name in others):
        raise UserError(f"{place} holds a finished run.", do="Give another directory, or delete it.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".massact").touch()
        (place / ".massact").unlink()
    except OSError as error:
        raise UserError(f"{place} cannot be written.", error.strerror or str(error)) from None


def _one(config: LabConfig, place: Path | None, progress: Progress) -> tuple[list[Row], list[Row], Row]:
    """Train one and save its model; what is left can go from process to process."""
    done = train_toy(config, progress)
    if place is not None:
        folder = place / f"model-{config.attention}"
        done.module.save_pretrained(folder)
        _tokenizer(task_of(config)).save_pretrained(folder)
    return done.curve, done.effects, done.facts


def _tokenizer(task: Backcopy) -> Any:
    """One token for each character, and BOS, as transformers reads them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {c: i for i, c in enumerate(task.characters)} | {"<s>": task.bos}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<s>")


def _write_sequences(config: LabConfig, place: Path) -> None:
    """The sequences that were looked into, as text for `massact scan --corpus`."""
    task = task_of(config)
    lines = [json.dumps({"text": task.spelled(ids_T)}) for ids_T in held_out_of(config, task)[1]]
    write_atomic(place / "held_out.jsonl", lambda p: p.write_text("\n".join(lines) + "\n", encoding="utf-8"))


# -------------------------------------------------------------------------------------------- processes
_shared: tuple[Any, Any] | None = None


def _begin(rows: Any, stop: Any) -> None:
    """What a process begins with; Ctrl-C is the first process's to answer."""
    global _shared
    _shared = rows, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(config: LabConfig, place: Path | None) -> tuple[list[Row], list[Row], Row]:
    assert _shared is not None
    rows, stop = _shared

    def tell(variant: str, done: int, total: int, row: Row) -> None:
        if done % 10 == 0 or done == total:
            parent = parent_process()
            if stop.is_set() or parent is None or not parent.is_alive():
                raise SystemExit  # nobody waits for it any more
            rows.put((variant, done, total, row))

    return _one(config, place, tell)


def _side_by_side(
    configs: Sequence[LabConfig], place: Path | None, workers: int, progress: Progress
) -> list[tuple[list[Row], list[Row], Row]]:
    """What `_one` gives of each, in several processes; the first error ends them all."""
    context = get_context("spawn")
    rows, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(min(workers, len(configs)), context, _begin, (rows, stop)) as pool:
        tasks = [pool.submit(_work, config, place) for config in configs]
        try:
            while not all(task.done() for task in tasks):
                if any(task.done() and task.exception() for task in tasks):
                    break
                try:
                    progress(*rows.get(timeout=0.2))
                except queues.Empty:
                    continue
            return [task.result() for task in tasks]
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
