"""Settings for all tests: offline, quiet, one thread, reproducible."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too: two wait 6 times as long for a core

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("massact", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("massact")
_BESIDE = Path(__file__).parents[2] / "shared" / "data"  # real models beside the checkout are used where they lie
if _BESIDE.is_dir():
    os.environ.setdefault("MASSACT_TEST_DATA", str(_BESIDE))
torch.set_num_threads(1)  # many tiny operations: more threads only wait for each other

REAL = {"real_data", "real_text", "smollm2", "gemma3"}
# Files that take longest, in this order: a process that came to one of them last would work alone.
LONGEST = ("labs/test_lab", "real/test_smollm2", "cli/test_output", "cli/test_cli", "cli/test_images",
           "cli/test_killed_verbs", "test_site")  # fmt: skip

# Marked `long`: the same as others on more inputs (other families, dtypes, processes), and slow. `make test-long`.
LONG = re.compile("|".join((
    r"test_merge\.py::test_any_split_and_any_order_of_merges\[.*torch\.float(64|16)\]",
    r"test_killed_verbs\.py::", r"test_own_code\.py::test_a_real_stdin", r"test_scheme_tasks\.py::test_answers_are",
    r"test_output\.py::(test_files_stay_whole|test_a_scan_on_a_full_disk\[(layers|portrait))",
    r"test_reach\.py::test_sharing.*\[(?!gpt2|llama|t5|vit\b|albert)",
    r"test_application\.py::test_(a_captured_graph.*gated|scan_explain_and_intervene_run\[(?!.*kv-bias))",
    r"test_quantised\.py::test_explain_and_intervene_read_it\[(?!W8A8)", r"test_lab\.py::test_the_same_seed_gives",
    r"test_wrappers\.py::test_numbers_are_those_of_the_model_inside\[.*(blocks|forward|in training|averaged)",
    r"test_patch_grids\.py::test_attention_of_several_images.*\[2\]",
    r"test_several_streams\.py::test_a_planted.*hy_v4", r"training/test_killed\.py::test_killed_20_times",
    r"training/test_job\.py::test_(two_processes|a_full_disk_keeps|a_corrupt)",
    r"test_runs\.py::test_damaged_runs_are_pr",
    r"test_figures\.py::test_files_are_valid_and_not_blank\[(?!massive|empty|hostile)",
    r"test_trajectory\.py::test_words_tables_json_and_figure_of_everything\[(?!many)",
    r"scans/test_revisions\.py::test_resumed_after", r"test_offloaded\.py::test_packed_weights.*\[(?!bitsandbytes 4)",
    r"test_smollm2\.py::test_(golden|norms_at)", r"test_effects\.py::test_real_vit_needs",
)))  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """`-m real` chooses the tests on real models and data: `make test-real`."""
    config.addinivalue_line("markers", "real: needs a real model, text or picture; by its fixtures or name")
    config.addinivalue_line("markers", "minutes: takes minutes on a real model: in `make test-real` alone")
    config.addinivalue_line("markers", "long: the same as others on more inputs, and takes long: in `make test-long`")
    config.addinivalue_line("markers", "rendered: of the command line, and its figures are rendered")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes a fixture of real things, or is named so; put the files first that take longest."""
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())) or item.name.startswith("test_real_"):
            item.add_marker("real")
        if LONG.search(item.nodeid):
            item.add_marker("long")
    first = {f"tests/{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what takes minutes or long, where it was not asked for."""
    real = item.get_closest_marker("real") and os.environ.get("MASSACT_TEST_REAL")
    if item.get_closest_marker("long") and not real and not os.environ.get("MASSACT_TEST_LONG"):
        pytest.skip("takes long: make test-long (see tests/SKIPS.md)")
    if item.get_closest_marker("minutes") and not os.environ.get("MASSACT_TEST_REAL"):
        pytest.skip("takes minutes: make test-real (see tests/SKIPS.md)")


def pytest_collection_finish() -> None:
    """What is there for good, 5,000 tests and all modules, is not gone through again by every `gc.collect`."""
    gc.collect()
    gc.freeze()


def _missing(what: str, do: str) -> NoReturn:
    """Skip; in `make test-real`, which is there to run them all, fail."""
    message = f"no {what}: {do} (see tests/SKIPS.md)"
    if os.environ.get("MASSACT_TEST_REAL"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def _test_data(folder: str) -> Path:
    path = Path(os.environ.get("MASSACT_TEST_DATA", "nowhere"))
    if not (path / folder).is_dir():
        _missing(f"real {folder}", f"set MASSACT_TEST_DATA to a folder that has {folder}/")
    return path


@pytest.fixture
def real_data() -> Path:
    """Folder with real models, texts and images: `models/`, `text/`, `images/`. Not part of the repository."""
    return _test_data("models")


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder `text/` of the same: WikiText-2 and others."""
    return _test_data("text") / "text"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which `make test` fetches."""
    path = Path(__file__).parents[1] / ".cache" / "smollm2-135m-instruct.gguf"
    if not path.is_file():
        _missing("SmolLM2", "python recipes/fetch_smollm2.py fetches it")
    return path


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M: its GGUF file or a folder of Hugging Face, in `MASSACT_REAL_MODELS`; may not be redistributed."""
    folder = Path(os.environ.get("MASSACT_REAL_MODELS", "nowhere"))
    for path in (folder / "gemma-3-270m.gguf", folder / "gemma-3-270m"):
        if path.exists():
            return path
    _missing("Gemma 3", "set MASSACT_REAL_MODELS to a folder with gemma-3-270m.gguf or the model folder gemma-3-270m/")


@pytest.fixture
def hub_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all of the Hub were in the cache: for tests that put what it answers in its place, and stay offline."""
    monkeypatch.setattr("massact.records.reachability._cached", lambda *_: True)
