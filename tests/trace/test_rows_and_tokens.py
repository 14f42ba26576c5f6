"""Rows that are no sequences and tokens that come and go are refused in the pass where they are seen."""

import pytest
import torch
from torch import nn

import massact as ma
from massact.records.errors import WorkError


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.map(self.norm(x))


class _Net(nn.Module):
    """Four blocks; `way` says what happens to a sequence of more than 16 tokens."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.embed, self.blocks = way, nn.Linear(5, 24), nn.ModuleList(_Block() for _ in range(4))

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        x = self.embed(signal)
        if x.shape[1] > 16 and self.way == "streams":
            x = torch.cat([x, x])
        if x.shape[1] > 16 and self.way == "windows":  # the first axis is now that of windows
            x = x.reshape(-1, x.shape[1] // 2, 24)
        for i, block in enumerate(self.blocks):
            if i == 2 and x.shape[1] > 16 and self.way == "pools":
                x = x[:, ::2]
            x = block(x)
        return x


@pytest.mark.parametrize(("way", "said"), [("windows", "rows"), ("pools", "tokens"), ("streams", "rows")])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_path_above_some_length_is_refused(way: str, said: str, batch_size: int) -> None:
    model = ma.load(_Net(way), inputs={"signal": torch.randn(2, 13, 5)})
    ma.scan(model, ma.corpus({"signal": torch.randn(3, 16, 5)}), null=False)
    with pytest.raises(WorkError, match=said) as refusal:
        ma.scan(model, ma.corpus({"signal": torch.randn(3, 20, 5)}), null=False, batch_size=batch_size)
    assert "blocks." in refusal.value.what  # which module
