"""Attention between groups of tokens: what class token and patches attend to.

Shapes: T queries, C keys that are looked at, G groups of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from massact.stats.attention_call import Attended
from massact.stats.protocol import Where

Pair = tuple[str, str]  # group of queries, group of keys


class AttentionShares:
    """Probability that each group of queries gives to each group of keys, mean over heads and queries, then images.

    The keys of the patches that are not massive are not looked at: they have what the others leave. A slot that is no
    key (a learned sink) is a group of its own. Queries whose mask hides a whole group of keys do not count for it.

    Args:
        groups: name -> positions, the same in every image; empty ones are missing.
        patches: positions of the patches.
        massive: image -> positions of its massive patches.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[int]], patches: Sequence[int], massive: Mapping[int, Sequence[int]]
    ) -> None:
        self.groups, self.patches, self.massive = groups, patches, massive
        self._sums: dict[Pair, list[Tensor | int]] = {}  # mass, images, keys

    def groups_of(self, image: int) -> dict[str, list[int]]:
        """The tokens of one image by what they are. Empty groups are missing."""
        chosen = set(self.massive.get(image, ()))
        groups = {name: list(positions) for name, positions in self.groups.items()}
        groups["massive"] = [p for p in self.patches if p in chosen]
        groups["patches"] = [p for p in self.patches if p not in chosen]
        return {name: positions for name, positions in groups.items() if positions}

    @torch.no_grad()
    def update(self, a: Attended, where: Where) -> None:
        """Take one attention call of one image."""
        groups = self.groups_of(where.sequence)
        looked = [name for name in groups if name != "patches"]
        keys_C = torch.tensor([p for name in looked for p in groups[name]], device=a.device, dtype=torch.long)
        mass_TC = a.probs(keys_C).mean(0).double()
        parts = mass_TC.split([len(groups[name]) for name in looked], dim=1)
        mass = {name: part_TC.sum(1) for name, part_TC in zip(looked, parts, strict=True)}
        if a.slot_HT is not None:
            mass["slot"] = a.slot_HT.mean(0).double()
        if "patches" in groups:
            mass["patches"] = torch.stack([torch.ones_like(mass_TC[:, :0].sum(1)), *(-m for m in mass.values())]).sum(0)
        seen = self._seen(a, groups)
        for query, rows in groups.items():
            for key, mass_T in mass.items():
                if key not in seen:
                    self._add((query, key), [mass_T[rows].mean(), 1, len(groups.get(key, "1"))])
                    continue
                seen_R = seen[key][rows]
                total, n = (mass_T[rows] * seen_R).sum(), seen_R.sum()
                self._add((query, key), [total / n.clamp(min=1), (n > 0).long(), (n > 0) * len(groups[key])])

    def _seen(self, a: Attended, groups: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Which queries can see a key of each group (T,); {} where every query sees every key."""
        if a.mask_HTS is None and a.scores_HTS is None and not a.causal:
            return {}
        keys = {name: torch.tensor(list(at), device=a.device) for name, at in groups.items()}
        return {name: a.sees(keys_C=keys_C).any(0).any(-1) for name, keys_C in keys.items()}

    def _add(self, pair: Pair, seen: list[Tensor | int]) -> None:
        held = self._sums.get(pair)
        self._sums[pair] = seen if held is None else [a + b for a, b in zip(held, seen, strict=True)]

    def merge(self, other: AttentionShares) -> None:
        """Add what another one has seen."""
        for pair, seen in other._sums.items():
            self._add(pair, seen)

    def result(self) -> list[tuple[str, str, float, int, float]]:
        """(group of queries, group of keys, mass, images that have both, mean number of keys)."""
        return [(*pair, float(mass) / int(n), int(n), int(keys) / int(n))
                for pair, (mass, n, keys) in sorted(self._sums.items()) if int(n)]  # fmt: skip
