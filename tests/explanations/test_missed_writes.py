"""An account of writes that misses the measured value on long sequences is refused, not printed."""

import pytest
import torch
from torch import nn

import massact as ma
from massact.records.errors import ProofError
from tests.facts import tells


class _Block(nn.Module):
    """Adds its MLP; above 16 tokens also something that is the output of no module, where it is told to."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.map, self.norm, self.more = nn.Linear(24, 24), nn.LayerNorm(24), more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.map(self.norm(x))
        if self.more and x.shape[1] > 16:
            extra = torch.zeros_like(x)
            extra[:, 3, 7] = self.more
            x = x + extra
        return x


class _Net(nn.Module):
    def __init__(self, more: float) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 24)
        self.blocks = nn.ModuleList(_Block(more if i == 1 else 0.0) for i in range(4))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        x[:, 3, 7] += 7000.0
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("more", [0.0, 70.0])
def test_writes_that_miss_the_value_are_refused(more: float) -> None:
    torch.manual_seed(0)
    model = ma.load(_Net(more), inputs={"signal": torch.randn(2, 13, 5)})
    corpus = ma.corpus({"signal": torch.randn(3, 20, 5)})
    if more:  # a scan refuses the model at this length; one of its twin that adds up says where to look
        with pytest.raises(ProofError, match=r"blocks\.1.*at 20 tokens"):
            ma.scan(model, corpus, null=False)
    for block in model.module.blocks:
        block.more = 0.0
    scan = ma.scan(model, corpus, null=False)
    model.module.blocks[1].more = more
    assert set(scan.findings.pos) == {3} and set(scan.findings.dim) == {7}
    why = ma.explain(model, corpus, scan)
    refused = [note for note in why.info.notes if "dim 7" in note and "blocks.1" in note]
    if more:
        assert len(why.writers) == 0 and len(refused) == 1 and " 70" in refused[0] and "1.0%" in refused[0]
        assert why.info.closure == {}
    else:
        assert len(why.writers) and not refused and why.info.closure[""] < 1e-6
        assert tells(why.info.notes, "add up", "within")
