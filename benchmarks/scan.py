"""What a scan costs over the bare forward pass, beside the ways people measure the same today.

Every approach does the same work: for each layer of a sequence of T tokens the 3 greatest |h| with their place and
the median |h|. `massact` does all of its statistics (and layer 0), which is more.

    python benchmarks/scan.py                              # all models, 1024 and 2048 tokens, all approaches
    python benchmarks/scan.py --models llama --tokens 1024 --approaches massact hidden_states
    python benchmarks/scan.py --device cuda --tokens 4096      # on a GPU: its clock and its memory

Time: one fresh process for each approach; inside it the bare forward pass A of the base model (no head) and the
approach B run on the same weights and take turns A B, B A, ...; printed is the median over the pairs of
wall(B) / wall(A), and their range. Memory: one fresh process for each cell, in which glibc returns every freed block at
once, so that peak RSS is that of live memory; printed is (weights + peak of B) / (weights + peak of A), and the extra
megabytes of each over the loaded model. One thread. Peers that are not installed are said to be so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

from side_by_side import ask, machine, one_thread, pairs_of, peak_mb

one_thread()

MODELS = {
    "gpt2": "GPT-2 124M shape, fp32",
    "llama": "12 x 768 Llama shape, bf16",
    "doge": "12 x 768 Doge shape, whose stream is scaled by parameters, bf16",
    "hyper": "6 x 768 HY V4 shape, four streams (hyper-connections), bf16",
}
MASSIVE = ((447, 900.0), (138, -600.0), (600, 250.0))  # planted at token 0, so that there is something to find
Scan = Callable[[Any], Any]


# ------------------------------------------------------------------------------------------------ models
def build(name: str, device: str = "cpu") -> Any:
    """A random-weight model with fixed seed, and massive activations at the first token."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
                 intermediate_size=2048, vocab_size=32000, max_position_embeddings=4096)  # fmt: skip
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=4096))
    elif name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape))
    elif name == "doge":
        model = hf.DogeForCausalLM(hf.DogeConfig(**shape))
    else:
        latent = dict(q_lora_rank=256, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64,
                      index_head_dim=32, index_n_heads=2, index_topk=4096, mlp_layer_types=["dense"] * 6)  # fmt: skip
        shape |= dict(num_hidden_layers=6, num_key_value_heads=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = hf.HYV4ForCausalLM(hf.HYV4Config(**shape, **latent))
    with torch.no_grad():
        for dim, value in MASSIVE:
            model.get_input_embeddings().weight[0, dim] = value
    return model.to(device, torch.float32 if name == "gpt2" else torch.bfloat16).eval()


def tokens(length: int, device: str = "cpu") -> Any:
    import torch

    ids = torch.randint(1, 32000, (1, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    return ids.to(device)


def device_of(model: Any) -> str:
    return str(next(model.parameters()).device)


def blocks_of(base: Any) -> Any:
    return base.h if hasattr(base, "h") else base.layers


# -------------------------------------------------------------------------------------------- approaches
def top3_and_median(h: Any) -> Any:
    """What a user writes with plain torch."""
    import torch

    a = h.abs().flatten()
    top = torch.topk(a, 3)
    return top.values, top.indices, a.median()


def bare(model: Any) -> Scan:
    import torch

    def run(ids: Any) -> None:
        with torch.inference_mode():
            model.base_model(ids, use_cache=False)

    return run


def massact(model: Any, at_length: bool = False) -> Scan:
    """measure() with the default probes of a scan, and the tables and findings made of them."""
    import massact as ma
    from massact.scans import AtLength
    from massact.scans.job import _Job
    from massact.scans.layer_columns import layer_columns
    from massact.verbs.scan import ScanConfig

    loaded = ma.load(model)
    stacks = [stack.name for stack in loaded.anatomy.stacks]
    extra = layer_columns(loaded, (), stacks)
    rule = ma.criterion("sun2024")

    def run(ids: Any) -> Any:
        corpus = ma.corpus(ids)
        job = _Job(extra, corpus, corpus, ScanConfig(), rule, rule.resolved(), lambda *_: None)
        checker = AtLength(loaded, stacks) if at_length else None
        done = job.complete(loaded, corpus, stacks, None, checker)
        assert len(done.rows) >= 3, "the planted activations must be found"
        return done.evidence

    return run


def massact_first(model: Any) -> Scan:
    """The first sequence of a scan, which also pays for the proof at length; the others do not."""
    return massact(model, at_length=True)


def store_and_sort(model: Any) -> Scan:
    """The paper's method: float64 clones of every layer, the whole model with its head, a full sort of each."""
    import torch

    blocks = blocks_of(model.base_model)

    def run(ids: Any) -> Any:
        kept: dict[int, Any] = {}

        def keep(i: int) -> Any:
            def hook(module: Any, args: Any, out: Any) -> None:
                kept[i] = (out[0] if isinstance(out, tuple) else out).clone().detach().cpu().double()

            return hook

        handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(blocks)]
        with torch.no_grad():
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        result = []
        for i in range(len(blocks)):
            a = kept[i].abs()
            ordered = torch.sort(a.flatten(), descending=True)
            result.append((ordered.values[:3], ordered.indices[:3], torch.median(a)))
        return result

    return run


def hidden_states(model: Any) -> Scan:
    """output_hidden_states=True on the base model (whose last entry is after the final norm)."""
    import torch

    def run(ids: Any) -> Any:
        with torch.inference_mode():
            states = model.base_model(ids, use_cache=False, output_hidden_states=True).hidden_states
            return [top3_and_median(h) for h in states[1:]]

    return run


def transformer_lens(model: Any) -> Scan:
    """TransformerBridge.run_with_cache, only resid_post cached."""
    import tempfile

    import torch
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    name = "gpt2" if hasattr(model, "transformer") else "meta-llama/Llama-2-7b-hf"
    bridge = TransformerBridge.boot_transformers(
        name,
        hf_model=build("gpt2" if name == "gpt2" else "llama", device_of(model)),
        device=device_of(model),
        dtype=next(model.parameters()).dtype,
        tokenizer=AutoTokenizer.from_pretrained(folder, add_bos_token=True, trust_remote_code=False),
    )
    names = [f"blocks.{i}.hook_resid_post" for i in range(12)]

    def run(ids: Any) -> Any:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(ids, names_filter=names, return_type=None)
            return [top3_and_median(cache[n]) for n in names]

    return run


def nnsight(model: Any) -> Scan:
    """A trace on the base model that saves every layer's output."""
    import torch
    from nnsight import NNsight

    wrapped = NNsight(model.base_model)

    def run(ids: Any) -> Any:
        with torch.inference_mode():
            with wrapped.trace(ids, use_cache=False):
                saved = list().save()
                for i in range(12):
                    saved.append(blocks_of(wrapped)[i].output)
            return [top3_and_median(s[0] if isinstance(s, tuple) else s) for s in saved]

    return run


APPROACHES: dict[str, Callable[[Any], Scan]] = {
    "massact": massact, "massact_first": massact_first, "hidden_states": hidden_states,
    "store_and_sort": store_and_sort, "transformer_lens": transformer_lens, "nnsight": nnsight}  # fmt: skip


# ------------------------------------------------------------------------------------------------ worker
def worker(args: argparse.Namespace) -> None:
    """One process: build, run, print one JSON line."""
    try:
        model = build(args.worker_model, args.device)
        plain, scan = bare(model), (bare if args.approach == "bare" else APPROACHES[args.approach])(model)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    short, ids = tokens(16, args.device), tokens(args.length, args.device)
    if args.memory:
        (plain if args.approach == "bare" else scan)(short)
        weights = sum(p.numel() * p.element_size() for p in model.base_model.parameters()) / 2**20
        print(json.dumps({"extra_mb": peak_mb(lambda: scan(ids), args.device), "weights_mb": weights}))
        return
    plain(ids)
    scan(ids)
    pairs = pairs_of(lambda: plain(ids), lambda: scan(ids), args.pairs, args.device)
    print(json.dumps({"pairs": pairs}))


# ------------------------------------------------------------------------------------------------ driver
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), choices=list(APPROACHES))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="Python with transformer-lens and nnsight, where they are not in this environment",
    )
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker-model", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--approach", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker_model:
        worker(args)
        return
    print(f"{machine(args.device)}, Python {platform.python_version()}")
    rows = []
    for name in args.models:
        for length in args.tokens:
            print(
                f"\n{MODELS[name]}, {length} tokens\n{'':18s}{'time / bare':>12s}{'range':>16s}{'pairs':>7s}"
                f"{'memory / bare':>15s}{'extra MB':>10s}",
                flush=True,
            )
            cell = {"device": args.device, "worker_model": name, "length": length}
            base = ask(sys.executable, __file__, approach="bare", memory=True, **cell)
            print(f"{'bare forward':18s}{1.0:12.3f}{'':16s}{'':7s}{1.0:15.3f}{base['extra_mb']:10.0f}", flush=True)
            for approach in args.approaches:
                python = args.peer_python if approach in ("transformer_lens", "nnsight") else sys.executable
                timed = ask(python, __file__, approach=approach, pairs=args.pairs, **cell)
                if "missing" in timed:
                    print(f"{approach:18s}not measured: {timed['missing']}")
                    continue
                held = ask(python, __file__, approach=approach, memory=True, **cell)
                ratios = [b / a for a, b in timed["pairs"]]
                memory = (held["weights_mb"] + held["extra_mb"]) / (base["weights_mb"] + base["extra_mb"])
                print(
                    f"{approach:18s}{statistics.median(ratios):12.3f}{min(ratios):9.3f}-{max(ratios):.3f} "
                    f"{len(ratios):6d}{memory:15.3f}{held['extra_mb']:10.0f}",
                    flush=True,
                )
                rows.append(
                    {
                        "model": name,
                        "tokens": length,
                        "approach": approach,
                        "ratios": ratios,
                        "memory_ratio": memory,
                        "extra_mb": held["extra_mb"],
                        "bare_extra_mb": base["extra_mb"],
                    }
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
