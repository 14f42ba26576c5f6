"""What torchao does with weights and activations: its configuration for a pair of formats, and the script of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from massact.quantisation.number_formats import Format

_WEIGHTS = {"tensor": "PerTensor()", "channel": "PerRow()"}
_INPUTS = {"tensor": "PerTensor()", "token": "PerRow()"}
_ASYMMETRIC = "Int8DynamicActivationIntxWeightConfig"
_MX = "torch.float4_e2m1fn_x2"


def config_of(weights: Format | None, activations: Format | None) -> tuple[str, list[str]]:
    """The call that makes torchao's configuration, and what of the formats it is not, one sentence each.

    Scales of activations are those of the input itself: a static scale needs a tensor in the configuration, which
    transformers cannot write to a file. Returns "" where there is none.
    """
    if weights is None:
        return "", [
            "Activations stay in full precision where weights do: they are quantised on the way to such weights."
        ]
    told = []
    if activations is not None and activations.static:
        told.append("Scales of activations are made anew from every input, not measured before: "
                    "transformers cannot save a static scale of torchao.")  # fmt: skip
    made = _both(weights, activations) if activations is not None else ""
    if made:
        if made.startswith(_ASYMMETRIC):
            told.append(
                "Activations have a zero point, not a range around zero: with such weights there is no other way."
            )
        return made, told + _needs(activations)
    made = _weights_alone(weights)
    if activations is not None:
        told = [f"Activations stay in full precision: there is no pair of {weights.spelled()} weights and "
                f"{activations.spelled()} activations."]  # fmt: skip
    if not made:
        told.append(f"There are no {weights.spelled()} weights.")
    elif _of_modules(made):
        told.append(
            "The script is for models whose Linear modules have no bias, which transformers would quantise, too."
        )
    return made, told


def _both(weights: Format, activations: Format) -> str:
    w, a = weights, activations
    pair = (w.kind, a.kind)
    shared = [_INPUTS.get(a.sharing, ""), _WEIGHTS.get(w.sharing, "")]
    if pair == ("nvfp4", "nvfp4"):
        return "NVFP4DynamicActivationNVFP4WeightConfig()"
    if pair == ("mxfp4", "mxfp4"):
        return f"MXDynamicActivationMXWeightConfig(activation_dtype={_MX}, weight_dtype={_MX})"
    if pair == ("fp8", "fp8") and shared[0] == shared[1] != "":
        return f"Float8DynamicActivationFloat8WeightConfig(granularity={shared[0]})"
    if pair == ("int", "int") and a.bits == 8:
        if w.bits == 8 and all(shared):
            return f"Int8DynamicActivationInt8WeightConfig(granularity=[{', '.join(shared)}])"
        if a.sharing == "token" and _grouped(w):
            return f"{_ASYMMETRIC}(weight_dtype=torch.int{w.bits}, weight_granularity={_grouped(w)})"
    return ""


def _weights_alone(w: Format) -> str:
    shared = _WEIGHTS.get(w.sharing) or (f"PerGroup({w.group})" if w.sharing == "group" else "")
    if w.kind == "nvfp4":
        return "NVFP4WeightOnlyConfig()"
    if w.kind == "fp8" and shared:
        return f"Float8WeightOnlyConfig(granularity={shared})"
    if w.kind == "int" and w.bits == 8 and shared:
        return f"Int8WeightOnlyConfig(granularity={shared})"
    return (
        f"IntxWeightOnlyConfig(weight_dtype=torch.int{w.bits}, granularity={_grouped(w)})"
        if w.kind == "int" and _grouped(w)
        else ""
    )


def _grouped(w: Format) -> str:
    return f"PerGroup({w.group})" if w.sharing == "group" else "PerAxis(0)" if w.sharing == "channel" else ""


def _needs(activations: Format | None) -> list[str]:
    """What such a script runs on."""
    machine = {
        "fp8": "FP8 activations need a GPU of compute capability 8.9.",
        "mxfp4": "MXFP4 activations need a GPU of compute capability 10.0, and a model in bfloat16.",
        "nvfp4": "NVFP4 activations need a GPU of compute capability 10.0.",
    }.get(activations.kind if activations else "")
    return [machine] if machine else []


def _of_modules(call: str) -> bool:
    """Whether torchao applies a configuration to modules alone, not to parameters by name."""
    return call.startswith("NVFP4WeightOnlyConfig")


def script_of(entries: Sequence[tuple[str, str]], n_quantised: int, head: str) -> str:
    """The text of the script.

    Args:
        entries: (pattern of names of modules, call that makes a configuration), in order.
        n_quantised: modules that the patterns match, which the script checks.
        head: comment lines.
    """
    ends = ["" if _of_modules(call) else r"\.weight" for _, call in entries]
    lines = [
        f'        (r"{pattern}{end}",\n         {call}),' for (pattern, call), end in zip(entries, ends, strict=True)
    ]
    words = set(re.findall(r"[A-Z]\w+", " ".join(call for _, call in entries)))
    micro = sorted(word for word in words if word.startswith(("MX", "NV")))
    imports = ", ".join(sorted({"FqnToConfig", *words} - set(micro)))
    if micro:
        imports += f"\n    from torchao.prototype.mx_formats import {', '.join(micro)}"
    made = _SCRIPT.replace("IMPORTED", imports).replace("ENTRIES", "\n".join(lines))
    return head + made.replace("N_QUANTISED", str(n_quantised))


_SCRIPT = """import argparse
import sys
from collections import OrderedDict
from pathlib import Path

# This file may be called torchao.py, which must not hide the package of that name.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != _HERE]


def configuration():
    import torch
    from torchao.quantization import IMPORTED

    # Patterns are of parameters, so that biases stay as they are. What none of them matches is not quantised.
    return FqnToConfig(OrderedDict([
ENTRIES
    ]))


def main():
    parser = argparse.ArgumentParser(description="Quantise a causal language model with torchao, and save it.")
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the Hub")
    parser.add_argument("out", metavar="OUT", help="folder for the quantised model, which from_pretrained loads")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of what stays in full precision (default: that of the files)")
    options = parser.parse_args()

    from torchao.utils import TorchAOBaseTensor
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    where = {} if options.device == "cpu" else {"device_map": options.device}
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, quantization_config=TorchAoConfig(configuration()), **where)
    done = [name for name, parameter in model.named_parameters() if isinstance(parameter, TorchAOBaseTensor)]
    if len(done) != N_QUANTISED:
        sys.exit(f"{len(done)} weights were quantised, and N_QUANTISED were meant: is this another model?")
    model.save_pretrained(options.out)
    try:
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    except (OSError, ValueError) as error:
        print(f"No tokenizer was saved: {error}", file=sys.stderr)
    print(f"{len(done)} weights quantised: {options.out}")


if __name__ == "__main__":
    main()
"""
