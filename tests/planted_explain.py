"""A transformer whose explanation is known in closed form. Hand-built: not evidence about real models.

Three blocks without norms over ids. Id 0 and id 1 each set a marker dim, all others are noise in the content dims.

* The first MLP writes START at dim 7 and FAN at dim 9 of id 0, by one neuron (and a little by a second one), and in
  the same way SECOND at dim 11 of id 1.
* The heads of block 2 have logit C_h on id 0, E_h on id 1 and 0 on all others, for every query; these two have known
  values. The heads of blocks 1 and 3 attend evenly.
* The last MLP takes all of it away. The unembedding does not read dims 7 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, H, WIDTH, NEURONS, IDS = 32, 4, 8, 24, 60
CONTENT = slice(12, D)
START_DIM, FAN_DIM, SECOND_DIM = 7, 9, 11
EMBEDDED, START, FAN, SECOND = 8.0, 3000.0, -1500.0, -2000.0  # START includes what the embedding has there
MAIN, MINOR, OTHER = 5, 6, 8  # neurons of the first MLP
C = torch.tensor([2.0, 3.0, 4.0, 6.0])  # logits on the first token, per head
E = torch.tensor([1.0, 2.5, 4.5, 5.0])  # logits on the second marked token
VALUE = torch.linspace(-0.2, 0.3, H * WIDTH)  # of the first token, heads side by side
VALUE_2 = torch.linspace(0.4, -0.1, H * WIDTH)
GATE = 8.0  # what the gate of the gated MLP gives before its activation function
MAIN_ACT, MINOR_ACT, OTHER_ACT = 6.0, 2.0, 5.0


class _Attention(nn.Module):
    """Queries are a constant; keys and values are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=name == "q") for name in "qkvo")
        with torch.no_grad():
            for linear in (self.q, self.k):
                linear.weight.zero_()
            self.q.bias.zero_()
            self.q.bias.view(H, WIDTH)[:, 0] = WIDTH**0.5  # against the scale of the kernel
            for linear in (self.v, self.o):
                small = 0.3 * torch.randn(D, D)
                linear.weight.zero_()
                linear.weight[:, CONTENT] = small[:, CONTENT]
            self.o.weight.copy_(0.3 * torch.randn(D, D))
            self.o.weight[: CONTENT.start] = 0  # what attention writes leaves markers and spikes alone

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (H, WIDTH)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    """`gate` is "" (none), "apart" (a projection of its own) or "fused" (the first half of one with two rows each)."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate
        if gate == "fused":
            self.gate_up_proj = nn.Linear(D, 2 * NEURONS, bias=False)
        else:
            self.up_proj = nn.Linear(D, NEURONS, bias=False)
        if gate == "apart":
            self.gate_proj = nn.Linear(D, NEURONS, bias=False)
        self.down_proj = nn.Linear(NEURONS, D, bias=False)
        with torch.no_grad():
            for rows in self.feeding().values():
                rows[:, : CONTENT.start] = 0
            self.down_proj.weight *= 0.1
            self.down_proj.weight[: CONTENT.start] = 0

    def feeding(self) -> dict[str, Tensor]:
        """The rows (neuron, D) that feed the neurons: "up", and "gate" where there is one."""
        if self.gate == "fused":
            gate, up = self.gate_up_proj.weight.detach().chunk(2)
            return {"gate": gate, "up": up}
        gates = {"gate": self.gate_proj.weight.detach()} if self.gate else {}
        return gates | {"up": self.up_proj.weight.detach()}

    def forward(self, x: Tensor) -> Tensor:
        if not self.gate:
            return self.down_proj(F.relu(self.up_proj(x)))
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.gate == "fused" else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)

    @torch.no_grad()
    def plant(self, neuron: int, read: int, scale: float, act: float, writes: dict[int, float]) -> None:
        """Neuron `neuron` gives `act` where dim `read` holds 1 / scale, else 0, and writes weights x act."""
        gain = float(F.silu(torch.tensor(GATE))) if self.gate else 1.0
        for name, rows in self.feeding().items():
            rows[neuron] = 0
            rows[neuron, read] = (GATE if name == "gate" else act / gain) * scale
        self.down_proj.weight[:, neuron] = 0
        for dim, weight in writes.items():
            self.down_proj.weight[dim, neuron] = weight


class _Block(nn.Module):
    def __init__(self, gate: str) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(), _MLP(gate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Explained(nn.Module):
    """The model; see the docstring of this file.

    Args:
        gate: of the MLPs: none, "apart" or "fused".
    """

    def __init__(self, gate: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([_Block(gate) for _ in range(3)])
        first, last = self.layers[0].mlp, self.layers[2].mlp
        first.plant(MAIN, 0, 1.0, MAIN_ACT, {START_DIM: 495.0, FAN_DIM: FAN / MAIN_ACT})
        first.plant(MINOR, 0, 1.0, MINOR_ACT, {START_DIM: (START - EMBEDDED - 495 * MAIN_ACT) / MINOR_ACT})
        first.plant(OTHER, 1, 1.0, OTHER_ACT, {SECOND_DIM: SECOND / OTHER_ACT})
        last.plant(2, START_DIM, 1 / START, 6.0, {START_DIM: -START / 6.0, FAN_DIM: -FAN / 6.0})
        last.plant(3, SECOND_DIM, 1 / SECOND, 5.0, {SECOND_DIM: -SECOND / 5.0})
        with torch.no_grad():
            reads = self.layers[1].attn
            reads.k.weight.view(H, WIDTH, D)[:, 0, START_DIM] = C / START
            reads.k.weight.view(H, WIDTH, D)[:, 0, SECOND_DIM] = E / SECOND
            reads.v.weight[:, START_DIM] = VALUE / START
            reads.v.weight[:, SECOND_DIM] = VALUE_2 / SECOND

        self.embed, self.head = nn.Embedding(IDS, D), nn.Linear(D, IDS, bias=False)
        with torch.no_grad():
            self.embed.weight[:, : CONTENT.start] = 0
            self.embed.weight.copy_(F.normalize(self.embed.weight, dim=1))
            self.embed.weight[:2] = 0
            self.embed.weight[0, 0], self.embed.weight[0, START_DIM], self.embed.weight[1, 1] = 1.0, EMBEDDED, 1.0
            self.head.weight[:, [START_DIM, FAN_DIM]] = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Tokenizer:
    """Just enough of one: id 0 is a word, id 1 a full stop, the others are words."""

    def __len__(self) -> int:
        return IDS

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(i): i for i in range(IDS)}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return "." if token_id == 1 else f"w{token_id}"

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(self.convert_ids_to_tokens, ids))


def tokens(n: int, T: int, second: int | None = None) -> Tensor:
    """(n, T): id 0 first, id 1 at position `second` + sequence, other ids at random."""
    ids = torch.randint(2, IDS, (n, T), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    for i in range(n if second is not None else 0):
        ids[i, second + i] = 1  # type: ignore[operator]
    return ids


def attention(T: int, second: int | None = None) -> Tensor:
    """The probabilities of block 2 in closed form, (H, T, T) float64: exp(C_h) and exp(E_h) among ones."""
    weight_HS = torch.ones(H, T, dtype=torch.float64)
    weight_HS[:, 0] = C.double().exp()
    if second is not None:
        weight_HS[:, second] = E.double().exp()
    p_HTS = weight_HS[:, None].expand(H, T, T).tril()
    return p_HTS / p_HTS.sum(-1, keepdim=True)
