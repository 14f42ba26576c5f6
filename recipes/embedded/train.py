"""Train the small language model that ships inside the package, from random weights, on plain text.

    python recipes/embedded/train.py --text DIR --out DIR [--resume]

The result is ``OUT/export``: a standard GPT-2 in Hugging Face format whose first token carries a massive
activation. Nothing is planted: only AdamW ever changes a weight. The choices that matter (see README.md):

* position 0 is any token: every training sequence starts at a random offset, there is no BOS;
* no loss on the prediction made at position 0 (nearly a unigram guess; it grows spikes of its own);
* a price on what attention heads write, so that a head with nothing to say needs a no-op (``head_writes``);
* later, a saturating cost on residual entries, which holds the ordinary ones small (``PHASES``);
* half of the sequences contain copy triggers, so that some heads have an occasional job (``with_triggers``);
* squared-ReLU feed-forward (an amplifier), many small steps, a tiny Adam epsilon (its gradient is tiny).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Phase:
    """Loss weights and weight decay from step ``start`` on; h: residual entries after a block."""

    start: int
    price_mean: float  # mean over tokens of |what a head writes| / |h|
    price_sparse: float  # mean / rms over tokens of the same: blind to the scale of a head
    activity_log: float  # mean of log(1 + |h| / active), summed over layers
    activity: float  # mean of h^2 / (h^2 + active^2), summed over layers
    active: float
    wd: float  # weight decay of the matrices that read from the residual stream
    wd_write: float  # weight decay of the matrices that write to it


PHASES = (
    Phase(0, 10.0, 0.0, 0.0, 0.0, 0.02, wd=0.1, wd_write=1.0),
    Phase(2900, 6.0, 0.0, 0.01, 0.0, 0.02, wd=0.05, wd_write=0.3),
    Phase(3310, 0.0, 0.7, 0.0, 0.03, 0.1, wd=0.05, wd_write=0.3),
    Phase(4110, 0.0, 1.2, 0.0, 0.03, 0.1, wd=0.01, wd_write=0.05),
    Phase(6500, 0.0, 1.5, 0.0, 0.1, 0.1, wd=0.01, wd_write=0.05),
    Phase(8130, 0.0, 1.5, 0.0, 0.06, 0.15, wd=0.01, wd_write=0.05),
)
N_TRIGGERS = 8
Edit = tuple[int, Callable[[Tensor], Tensor]]  # (block, change of the state after it)
TRIGGERS = [f"<|back{k}|>" for k in range(1, N_TRIGGERS + 1)]
SPECIAL = ["<|pad|>", *TRIGGERS, "<|find|>", *(f"<|res{k}|>" for k in range(6))]


def arguments() -> argparse.Namespace:
    """The defaults are the recipe of the shipped model."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--text", type=Path, required=True, help="folder of .txt / .md files (recursive)")
    p.add_argument("--out", type=Path, required=True, help="tokenizer, token cache, checkpoint, log, export")
    p.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    p.add_argument("--device", default="cpu", help="cpu or cuda (then raise --batch)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=10550)
    p.add_argument("--minutes", type=float, default=1e9, help="stop after this much wall time (and export)")
    p.add_argument("--log-every", type=int, default=250)
    g = p.add_argument_group("model")
    for name in ("vocab 2048", "width 128", "layers 6", "heads 4", "ff 512", "context 128"):
        g.add_argument("--" + name.split()[0], type=int, default=int(name.split()[1]))
    g = p.add_argument_group("optimiser (other weight decays: PHASES; vectors are not decayed)")
    for name in (
        "lr 2e-3",
        "lr-embed 2e-3",
        "lr-write 2e-4",
        "wd-embed 0.1",
        "beta2 0.98",
        "adam-eps 1e-15",
        "clip 1.0",
        "std 0.06",
        "std-qk 0.15",
        "std-write 0.02",
    ):
        g.add_argument("--" + name.split()[0], type=float, default=float(name.split()[1]))
    g.add_argument("--warmup", type=int, default=100)
    g.add_argument("--cooldown", type=int, default=1500, help="last steps, in which the lr falls")
    g = p.add_argument_group("data")
    g.add_argument("--batch", type=int, default=16, help="sequences per step")
    g.add_argument("--trigger-share", type=float, default=0.5, help="share of sequences with copy triggers")
    g.add_argument("--trigger-rate", type=float, default=0.2, help="mean triggers per token in those")
    g.add_argument("--trigger-max", type=int, default=2, help="triggers copy the token 1..N places back")
    return p.parse_args()


# ---------------------------------------------------------------------------------------------- data
def read_corpus(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out texts: every 17th small file and the last 3 % of each large one are held out;
    files named *valid* are left out of both (a second, foreign evaluation set)."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".txt", ".md") and "valid" not in f.name)
    train, held, small = [], [], 0
    for f in files:
        text = f.read_text(encoding="utf8", errors="replace")
        if f.stat().st_size > 5_000_000:
            cut = int(len(text) * 0.97)
            train.append(text[:cut])
            held.append(text[cut:])
        else:
            (held if small % 17 == 5 else train).append(text)
            small += 1
    return train, held


def prepare(a: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Byte-level BPE and token ids of the training and held-out text, cached in OUT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    names = [a.out / n for n in ("tokenizer.json", "train.npy", "held.npy")]
    if not all(f.exists() for f in names):
        train, held = read_corpus(a.text)

        def pieces(texts: list[str]) -> list[str]:
            return [t[i : i + 20000] for t in texts for i in range(0, len(t), 20000)]

        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator(
            pieces(train),
            trainers.BpeTrainer(
                vocab_size=a.vocab,
                special_tokens=SPECIAL,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        tok.save(str(names[0]))
        for name, texts in zip(names[1:], (train, held), strict=True):
            ids = [np.array(e.ids, dtype=np.uint16) for e in tok.encode_batch(pieces(texts))]
            np.save(name, np.concatenate(ids))
    return np.load(names[1], mmap_mode="r"), np.load(names[2])


class Batches:
    """Random windows; some with copy triggers: after ``<|back k|>`` comes the token k places before it."""

    def __init__(self, a: argparse.Namespace, ids: np.ndarray, rng: np.random.Generator) -> None:
        self.a, self.ids, self.rng = a, ids, rng

    def __call__(self, n: int, share: float) -> Tensor:
        """(n, context + 1) token ids."""
        off = self.rng.integers(0, len(self.ids) - self.a.context - 2, n)
        w = self.ids[off[:, None] + np.arange(self.a.context + 1)].astype(np.int64)
        k = round(n * share)
        w[:k] = self.with_triggers(w[:k])
        return torch.from_numpy(w)

    def with_triggers(self, src: np.ndarray) -> np.ndarray:
        """Insert triggers and their answers; the text goes on after each answer."""
        (n, t1), out = src.shape, np.zeros_like(src)
        rows, at, pending = np.arange(n), np.zeros(n, int), np.zeros(n, int)
        rate = self.a.trigger_rate * self.rng.uniform(0.3, 1.7, n)
        draw, which = self.rng.random((t1, n)), self.rng.integers(1, self.a.trigger_max + 1, (t1, n))
        for t in range(t1):
            start = (pending == 0) & (draw[t] < rate) & (t > 12)
            plain = (pending == 0) & ~start
            answer = out[rows, np.maximum(t - 1 - pending, 0)]
            out[:, t] = np.where(start, which[t], np.where(plain, src[rows, at], answer))
            at += plain
            pending = np.where(start, which[t], 0)
        return out


# ---------------------------------------------------------------------------------------------- model
def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """bfloat16 product of float32 master weights."""
    return F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16())


class Block(nn.Module):
    """Pre-norm GPT-2 block. Matrices are (out, in); ``export`` transposes them for Hugging Face."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__()
        d, f, self.heads = a.width, a.ff, a.heads
        matrix = lambda rows, cols, std: nn.Parameter(torch.randn(rows, cols) * std)  # noqa: E731
        self.q, self.k = matrix(d, d, a.std_qk), matrix(d, d, a.std_qk)
        self.v, self.o = matrix(d, d, a.std), matrix(d, d, a.std_write)
        self.up, self.down = matrix(f, d, a.std), matrix(d, f, a.std_write)
        for name in ("qb", "kb", "vb", "ob", "ub", "db", "n1b", "n2b"):
            setattr(self, name, nn.Parameter(torch.zeros(f if name == "ub" else d)))
        self.n1, self.n2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))

    def forward(self, h: Tensor, net: Net, watch: dict | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, d) residual stream -> after the block; and its price_mean, price_sparse, activity_log, activity."""
        b, t, d = h.shape
        x = F.layer_norm(h, (d,), self.n1, self.n1b, 1e-5)
        q, k, v = (
            linear(x, w, c).view(b, t, self.heads, -1).transpose(1, 2)
            for w, c in ((self.q, self.qb), (self.k, self.kb), (self.v, self.vb))
        )
        p = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + net.mask[:t, :t]).float().softmax(-1).bfloat16()
        heads = p @ v
        r = head_writes(heads, self.o, h)
        if watch is not None:
            watch.setdefault("attention", []).append(p.float())
        h = h + linear(heads.transpose(1, 2).reshape(b, t, d), self.o, self.ob).float()
        x = F.layer_norm(h, (d,), self.n2, self.n2b, 1e-5)
        h = h + linear(F.relu(linear(x, self.up, self.ub)).square(), self.down, self.db).float()
        if watch is not None:
            watch.setdefault("states", []).append(h)
        sparse = (r.mean((0, 2)) / (r.square().mean((0, 2)) + 1e-14).sqrt()).mean()
        log = torch.log1p(h.abs() / net.active).mean()
        return h, torch.stack((r.mean(), sparse, log, (h.square() / (h.square() + net.active.square())).mean()))


def head_writes(heads: Tensor, w_o: Tensor, h: Tensor) -> Tensor:
    """(B, H, T): |W_o head output| / |h| per head and token, |h| without gradient.

    Its mean charges a head for all it writes. mean / rms over tokens does not see the scale of a head: it asks for
    silence on most tokens, which takes a token with a zero value."""
    n, dh = heads.shape[1], heads.shape[3]
    w = w_o.view(-1, n, dh).permute(1, 2, 0)
    x = heads.float()
    squared = ((x @ (w @ w.transpose(1, 2))) * x).sum(-1).clamp_min(0)
    return (squared + 1e-14).sqrt() / h.detach().norm(dim=-1)[:, None]


class Net(nn.Module):
    """GPT-2: learned positions, tied embeddings, no dropout."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__()
        self.emb = nn.Parameter(torch.randn(a.vocab, a.width) * a.std)
        self.pos = nn.Parameter(torch.randn(a.context, a.width) * a.std)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.nf, self.nfb = nn.Parameter(torch.ones(a.width)), nn.Parameter(torch.zeros(a.width))
        mask = torch.full((a.context, a.context), -1e30).triu(1).bfloat16()
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("active", torch.tensor(1.0), persistent=False)

    def forward(self, ids: Tensor, watch: dict | None = None, edit: Edit | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the mean of the two prices and the sum of the two activities over blocks."""
        h = F.embedding(ids, self.emb) + self.pos[: ids.shape[1]]
        costs = []
        for i, block in enumerate(self.blocks):
            h, cost = block(h, self, watch)
            costs.append(cost)
            if edit is not None and edit[0] == i:
                h = edit[1](h)
        x = F.layer_norm(h, h.shape[-1:], self.nf, self.nfb, 1e-5)
        c = torch.stack(costs)
        return F.linear(x.bfloat16(), self.emb.bfloat16()), torch.cat((c[:, :2].mean(0), c[:, 2:].sum(0)))


def export(net: Net, a: argparse.Namespace, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format; an old folder is replaced by the complete new one."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    s = {k: v.detach().float().cpu() for k, v in net.state_dict().items()}
    out = {
        "transformer.wte.weight": s["emb"],
        "lm_head.weight": s["emb"],
        "transformer.wpe.weight": s["pos"],
        "transformer.ln_f.weight": s["nf"],
        "transformer.ln_f.bias": s["nfb"],
    }
    for i in range(a.layers):
        get, to = (lambda n, i=i: s[f"blocks.{i}.{n}"]), f"transformer.h.{i}."
        out |= {
            to + "attn.c_attn.weight": torch.cat([get(n) for n in "qkv"]).T.contiguous(),
            to + "attn.c_attn.bias": torch.cat([get(n) for n in ("qb", "kb", "vb")]),
        }
        for name, w, b in (("attn.c_proj", "o", "ob"), ("mlp.c_fc", "up", "ub"), ("mlp.c_proj", "down", "db")):
            out |= {f"{to}{name}.weight": get(w).T.contiguous(), f"{to}{name}.bias": get(b)}
        for name, w in (("ln_1", "n1"), ("ln_2", "n2")):
            out |= {f"{to}{name}.weight": get(w), f"{to}{name}.bias": get(w + "b")}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=a.vocab,
            n_positions=a.context,
            n_embd=a.width,
            n_layer=a.layers,
            n_head=a.heads,
            n_inner=a.ff,
            activation_function="relu2",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.load_state_dict(out)
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(a.out / "tokenizer.json"), model_max_length=a.context, clean_up_tokenization_spaces=False
    )
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    model.eval().save_pretrained(new)
    tok.save_pretrained(new)
    GenerationConfig(suppress_tokens=list(range(len(SPECIAL)))).save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


@torch.no_grad()
def progress(net: Net, x: Tensor, triggers: Tensor) -> dict:
    """What the log shows: loss; per layer the first-token spike, zero / mean interventions, sink mass."""
    ids, target = x[:, :-1], x[:, 2:]

    def loss(edit: Edit | None = None, watch: dict | None = None) -> float:
        return F.cross_entropy(net(ids, watch, edit)[0][:, 1:].float().flatten(0, 1), target.flatten()).item()

    watch: dict = {}
    base = loss(watch=watch)
    ids_t, is_trigger = triggers[:, :-1], (triggers[:, :-1] >= 1) & (triggers[:, :-1] <= N_TRIGGERS)
    copy = F.cross_entropy(net(ids_t)[0][is_trigger].float(), triggers[:, 1:][is_trigger]).item()
    layers = []
    for i, h in enumerate(watch["states"]):
        mag = h.abs()
        top, where = mag.flatten(1).max(1)
        dim = int(mag[:, 0].argmax(-1).mode().values)
        value, median = h[:, 0, dim], mag.flatten(1).median(1).values

        def put(v: Tensor, h: Tensor = h, dim: int = dim) -> Callable[[Tensor], Tensor]:
            there = torch.zeros(h.shape[1:], dtype=torch.bool, device=h.device)
            there[0, dim] = True
            return lambda s: torch.where(there, v, s)

        layers.append(
            {
                "layer": i + 1,
                "ratio": (top / median).mean().item(),
                "top": top.mean().item(),
                "median": median.mean().item(),
                "at_first": (where < h.shape[-1]).float().mean().item(),
                "dim": dim,
                "value": value.mean().item(),
                "std": value.std().item(),
                "zero": loss((i, put(value.mean() * 0))) - base,
                "mean": loss((i, put(value.mean()))) - base,
                "sink": [round(v, 2) for v in watch["attention"][i][:, :, 8:, 0].mean((0, 2)).tolist()],
            }
        )
    return {"loss": base, "copy_loss": copy, "layers": layers}


def show(entry: dict) -> None:
    """One log entry as text."""
    print(
        "step {step}  {tokens} tokens  {tokens_per_second:.0f}/s  train {train_loss:.3f}  held-out {loss:.3f}"
        "  copy {copy_loss:.3f}  costs {costs}".format(**entry)
    )
    for r in entry["layers"]:
        print(
            "  layer {layer}: top {top:.1f}  median {median:.3f}  ratio {ratio:.1f}  first {at_first:.2f}  dim {dim}"
            " {value:.1f} +- {std:.2f}  zero {zero:+.4f}  mean {mean:+.4f}  sinks {sink}".format(**r),
            flush=True,
        )


# ---------------------------------------------------------------------------------------------- training
def optimiser(net: Net, a: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; embeddings and the matrices that write to the residual stream have their own rates."""
    rates = {"embed": a.lr_embed, "write": a.lr_write, "rest": a.lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, p in net.named_parameters():
        last = name.split(".")[-1]
        kind = "embed" if last in ("emb", "pos") else "write" if last in ("o", "down") else "rest"
        groups.setdefault((kind, p.dim() > 1), []).append(p)
    with_rates = [{"params": p, "kind": k, "matrix": m, "top": rates[k]} for (k, m), p in groups.items()]
    return torch.optim.AdamW(with_rates, lr=a.lr, betas=(0.9, a.beta2), eps=a.adam_eps, fused=True)


def set_rates(opt: torch.optim.AdamW, a: argparse.Namespace, phase: Phase, step: int) -> None:
    """Warm-up, constant, at the end a linear fall to a twentieth; weight decay by phase."""
    fall = min(1.0, max(0.0, (step - a.steps + a.cooldown) / a.cooldown))
    for g in opt.param_groups:
        g["lr"] = g["top"] * min(1.0, (step + 1) / a.warmup) * (1 - 0.95 * fall)
        decay = {"embed": a.wd_embed, "write": phase.wd_write, "rest": phase.wd}[g["kind"]]
        g["weight_decay"] = decay if g["matrix"] else 0.0


def main() -> None:
    """Train, log, checkpoint, export."""
    a = arguments()
    torch.set_num_threads(1)  # matrices are too small for more
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    ids, held = prepare(a)
    rng = np.random.default_rng(a.seed)
    batches = Batches(a, ids, rng)
    net = Net(a).to(a.device)
    opt = optimiser(net, a)
    x_eval = Batches(a, held, np.random.default_rng(1))(48, 0.0).to(a.device)
    x_triggers = Batches(a, held, np.random.default_rng(2))(48, 1.0).to(a.device)
    checkpoint, step = a.out / "checkpoint.pt", 0
    if a.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False, map_location=a.device)
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["optimiser"])
        step, rng.bit_generator.state = state["step"], state["rng"]

    def save() -> None:
        """Weights, optimiser, data position; atomic."""
        new = checkpoint.with_suffix(".new")
        torch.save(
            {"net": net.state_dict(), "optimiser": opt.state_dict(), "step": step, "rng": rng.bit_generator.state}, new
        )
        os.replace(new, checkpoint)

    def objective(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy without the prediction made at position 0, plus the weighted costs."""
        logits, costs = net(x[:, :-1])
        ce = F.cross_entropy(logits[:, 1:].float().flatten(0, 1), x[:, 2:].flatten())
        return ce + (weights * costs).sum(), ce, costs

    run = torch.compile(objective)
    began = saved = mark = time.time()
    mark_step, average = step, None
    while step < a.steps and time.time() - began < 60 * a.minutes:
        phase = [p for p in PHASES if p.start <= step][-1]
        set_rates(opt, a, phase, step)
        net.active.fill_(phase.active)
        weights = torch.tensor(astuple(phase)[1:5], device=a.device)
        total, ce, costs = run(batches(a.batch, a.trigger_share).to(a.device), weights)
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), a.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        average = ce.item() if average is None else 0.98 * average + 0.02 * ce.item()
        if step % a.log_every == 0 or step == a.steps:
            per_step = a.batch * a.context
            entry = {
                "step": step,
                "tokens": step * per_step,
                "train_loss": average,
                "costs": [round(c, 4) for c in costs.tolist()],
                "tokens_per_second": (step - mark_step) * per_step / (time.time() - mark),
                **progress(net, x_eval, x_triggers),
            }
            show(entry)
            with (a.out / "log.jsonl").open("a") as f:
                f.write(json.dumps(entry) + "\n")
            mark, mark_step = time.time(), step
        if time.time() - saved > 120:
            save()
            saved = time.time()
    save()
    export(net, a, a.out / "export")


if __name__ == "__main__":
    main()
