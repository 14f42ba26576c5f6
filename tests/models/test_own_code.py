"""Code that comes with a model runs where --trust-remote-code is given, and nowhere else: whatever stands on stdin."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import massact as ma
from massact.models.loading import EMBEDDED, location_of
from massact.models.weight_values import weights_hash
from massact.records.errors import UserError
from massact.training import from_pretrained
from tests.cli.test_cli import FAST, run
from tests.families import build

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast, ViTImageProcessor

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaModel):
    config_class = {config}

class OwnForCausalLM(LlamaForCausalLM):
    config_class = {config}

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

class OwnImages(ViTImageProcessor):
    pass
"""
CAUSAL = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CONFIG = {"AutoConfig": "modeling_own.OwnConfig"}
# What auto_map names, model_type, architectures, class that is then measured.
MODELS = {
    "causal": (CAUSAL, "llama", ["OwnForCausalLM"], "OwnForCausalLM"),
    "causal, no architectures": (CAUSAL, "llama", None, "OwnForCausalLM"),
    "config": (CONFIG, "llama", ["LlamaForCausalLM"], None),
    "config and causal": (CONFIG | CAUSAL, "own", ["OwnForCausalLM"], "OwnForCausalLM"),
    "config and bare": (CONFIG | {"AutoModel": "modeling_own.OwnModel"}, "own", ["OwnModel"], "OwnModel"),
    "all, the bare one saved": (
        CONFIG | CAUSAL | {"AutoModel": "modeling_own.OwnModel"}, "own", ["OwnModel"], "OwnModel"
    ),
}  # fmt: skip


def own_model(folder: Path, marker: Path, name: str) -> Path:
    """A small Llama with a tokenizer, whose config.json names code that leaves a mark when it is imported."""
    auto_map, model_type, architectures, cls = MODELS[name]
    module = build("llama")
    (module.model if cls == "OwnModel" else module).save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(location_of(EMBEDDED), trust_remote_code=False)
    words.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": auto_map, "model_type": model_type, "architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    code = CODE.format(marker=str(marker), config="OwnConfig" if "AutoConfig" in auto_map else "LlamaConfig")
    (folder / "modeling_own.py").write_text(code)
    return folder


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the mark would be, with an eager user at the keyboard and modules kept in a folder of this test."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "marker"


@pytest.mark.parametrize("name", MODELS)
def test_code_runs_where_it_is_trusted_only(name: str, says_yes: Path, tmp_path: Path) -> None:
    folder = own_model(tmp_path / "model", says_yes, name)
    for read in (ma.load, from_pretrained):
        with pytest.raises(UserError, match=r"Own\w+ in modeling_own\.py\.") as refused:
            read(folder)
        assert "--trust-remote-code" in refused.value.do
    assert not says_yes.exists() and sys.stdin.read() == "y\n" * 1000, "nothing may be asked"
    cls = MODELS[name][3]
    model = ma.load(folder, options={"trust_remote_code": True})
    assert says_yes.exists() and type(model.module).__name__ == (cls or "LlamaForCausalLM")
    whole = build("llama")
    assert weights_hash(model.module) == weights_hash(whole.model if cls == "OwnModel" else whole)
    assert model.tokenizer is not None


def test_code_of_a_class_that_transformers_has_is_not_needed(says_yes: Path, tmp_path: Path) -> None:
    folder = own_model(tmp_path / "model", says_yes, "causal")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.LLaMAForCausalLM"}, "architectures": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(ma.load(folder).module).__name__ == "LlamaForCausalLM" and not says_yes.exists()


@pytest.mark.parametrize("form", ["dict", "list"])
def test_code_of_a_tokenizer_is_not_replaced_by_another(form: str, says_yes: Path, tmp_path: Path) -> None:
    folder = own_model(tmp_path / "model", says_yes, "causal")
    plain = json.loads((folder / "config.json").read_text())
    plain |= {"auto_map": {}, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(plain))
    file, named = folder / "tokenizer_config.json", [None, "modeling_own.OwnTokenizer"]
    own = {"auto_map": {"AutoTokenizer": named} if form == "dict" else named, "tokenizer_class": "OwnTokenizer"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(UserError, match=r"OwnTokenizer in modeling_own\.py"):
        ma.load(folder)
    assert not says_yes.exists()
    assert type(ma.load(folder, options={"trust_remote_code": True}).tokenizer).__name__ == "OwnTokenizer"


def test_code_of_an_image_processor_is_not_replaced_by_another(says_yes: Path, tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    folder = tmp_path / "model"
    build("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    own = {"auto_map": {"AutoImageProcessor": "modeling_own.OwnImages"}, "image_processor_type": "OwnImages"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(says_yes), config="LlamaConfig"))
    with pytest.raises(UserError, match=r"OwnImages in modeling_own\.py"):
        ma.load(folder)
    assert not says_yes.exists()
    assert type(ma.load(folder, options={"trust_remote_code": True}).processor).__name__ == "OwnImages"


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "run"
    ma.scan(None, n_sequences=2, seq_len=32, null=False, bos_contrast=False, out=out)
    return out


@pytest.mark.parametrize("verb", [
    ["scan", "MODEL", *FAST], ["scan", "MODEL", "--out", "OUT"], ["explain", "RUN", "MODEL"],
    ["intervene", "RUN", "MODEL"], ["classics", "MODEL"], ["classics", "RUN", "--model", "MODEL"],
    ["reproduce", "MODEL"], ["reproduce", "RUN", "--model", "MODEL"],
    ["reproduce", "--only", "E25", "--tuned", "MODEL", "--n-sequences", "2", "--seq-len", "32"],
    ["train", "--out", "OUT", "--steps", "1", "--set", "tokenizer=MODEL"],
    ["scan", "CHECKPOINTS", "--checkpoints", "--out", "OUT", *FAST],
], ids=" ".join)  # fmt: skip
def test_no_verb_runs_it(
    verb: list[str], says_yes: Path, scanned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = own_model(tmp_path / "checkpoints" / "step1", says_yes, "causal")
    if verb[0] == "train":  # which reads the tokenizer alone
        fields = {"auto_map": {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    places = {"MODEL": folder, "OUT": tmp_path / "out", "CHECKPOINTS": folder.parent,
              "RUN": shutil.copytree(scanned, tmp_path / "run")}  # fmt: skip
    words = [w.split("=")[0] + "=" + str(folder) if w.endswith("=MODEL") else str(places.get(w, w)) for w in verb]
    status = run(monkeypatch, *words)
    err = capsys.readouterr().err
    assert not says_yes.exists() and sys.stdin.read() == "y\n" * 1000
    steps = verb[0] == "reproduce" and ("--tuned" in verb or "RUN" in verb)  # each step fails by itself
    assert status == (1 if steps else 2), err
    assert "Own" in err and "modeling_own.py" in err and "--trust-remote-code" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "run.json").exists()
    for record in (tmp_path / "out").glob("train.json"):
        assert json.loads(record.read_text())["status"] == "failed"


def test_a_real_stdin_is_not_asked(tmp_path: Path) -> None:
    """A process of its own, with "y" on its stdin: one message, status 2, at once."""
    folder = own_model(tmp_path / "model", tmp_path / "marker", "config and causal")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", "massact", "scan", str(folder)], input="y\n" * 10, text=True,
                          capture_output=True, env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "marker").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 3 and "--trust-remote-code" in done.stderr


def test_every_read_of_transformers_states_whether_code_may_run() -> None:
    """`from_pretrained` and `from_config` ask on stdin where it is not stated: so every call states it."""
    found = 0
    for path in (p for room in ("src", "recipes", "benchmarks") for p in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if ast.unparse(node.func).startswith("peft."):
                continue  # adapters of a model that is read already: they have no code
            if name in ("from_pretrained", "from_config"):
                found += 1
                stated = {k.arg for k in node.keywords} | {
                    key.id for k in node.keywords if k.arg is None for key in ast.walk(k.value)
                    if isinstance(key, ast.Name)
                }  # fmt: skip
                assert stated & {"trust_remote_code", "TRUST"}, f"{path}:{node.lineno}"
    assert found >= 5
