"""Bigram-backcopy: the smallest task on which attention sinks and their bias grow (Guo et al. 2024).

Tokens are characters, with one more for the beginning of a sequence (BOS). After a trigger, one of the k most frequent
characters, the token before it comes again; after any other, a draw from the chain of bigrams. So a head has work on
triggers only, and on all other tokens needs somewhere to look that says nothing.

Shapes: V characters, B sequences, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from string import ascii_letters, digits

import numpy as np
import torch
from torch import Tensor

STARTS = ("mixed", "bos", "none")
CHAINS = ("random", "text")


@dataclass(frozen=True)
class Backcopy:
    """The task made of one chain of bigrams.

    Args:
        characters: the V tokens; id V is BOS.
        transition_VV: probability of the next character, rows sum to 1.
        unigram_V: of the first character; no trigger comes first.
        triggers_V: bool, which characters are triggers.
    """

    characters: str
    transition_VV: Tensor
    unigram_V: Tensor
    triggers_V: Tensor

    @property
    def bos(self) -> int:
        """Its id, the last one."""
        return len(self.characters)

    @property
    def entropy_V(self) -> Tensor:
        """Nats of uncertainty behind each character: -sum p log p."""
        return -torch.special.xlogy(self.transition_VV, self.transition_VV).sum(1)

    def draw(self, n: int, length: int, starts: str, random: torch.Generator, share: float = 0.8) -> Tensor:
        """Sequences of the task: ids (B, T).

        Args:
            n, length: B and T.
            starts: "bos" begins every sequence with BOS, "none" none, "mixed" each with probability `share`.
            random: where the draws come from.
            share: of sequences that begin with BOS, where they are mixed.
        """
        begins_B = {
            "bos": torch.ones(n, dtype=torch.bool),
            "none": torch.zeros(n, dtype=torch.bool),
            "mixed": torch.rand(n, generator=random) < share,
        }[starts]
        # Everyone starts with BOS; where none is wanted it is dropped, so all sequences are of one kind behind it.
        long_BT = torch.empty(n, length + 1, dtype=torch.long)
        long_BT[:, 0] = self.bos
        first_V = self.unigram_V * ~self.triggers_V
        long_BT[:, 1] = torch.multinomial(first_V, n, replacement=True, generator=random)
        for t in range(2, length + 1):
            last_B = long_BT[:, t - 1]
            drawn_B = torch.multinomial(self.transition_VV[last_B], 1, generator=random)[:, 0]
            # No trigger comes first, so the token before one is a character.
            long_BT[:, t] = torch.where(self.triggers_V[last_B], long_BT[:, t - 2], drawn_B)
        return torch.where(begins_B[:, None], long_BT[:, :length], long_BT[:, 1:])

    def kinds(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions t are to be predicted from t - 1, as two masks (B, T - 1): backcopy, and by bigram.

        What follows BOS is neither.
        """
        triggers_W = torch.cat([self.triggers_V, torch.zeros(1, dtype=torch.bool)])
        last_BT = ids_BT[:, :-1]
        return triggers_W[last_BT], ~triggers_W[last_BT] & (last_BT != self.bos)

    def spelled(self, ids_T: Tensor) -> str:
        """A sequence as text, without BOS."""
        return "".join(self.characters[int(i)] for i in ids_T if int(i) != self.bos)


def random_backcopy(
    n_characters: int = 64, n_triggers: int = 3, concentration: float = 0.25, seed: int = 0
) -> Backcopy:
    """The task of a random Markov chain: every row of it is drawn from a Dirichlet distribution.

    Args:
        n_characters: V.
        n_triggers: k; the most frequent characters of the chain are triggers.
        concentration: of the Dirichlet distribution: the smaller, the more certain is what follows.
        seed: of the chain.

    Raises:
        ValueError: fewer characters than triggers and one more.
    """
    _check_room(n_characters, n_triggers)
    random = np.random.default_rng(seed)
    chain_VV = torch.from_numpy(random.dirichlet(np.full(n_characters, concentration), n_characters))
    chain_VV = (chain_VV + 1e-9) / (chain_VV + 1e-9).sum(1, keepdim=True)  # so that no state is a trap
    unigram_V = torch.full((n_characters,), 1 / n_characters, dtype=torch.double)
    for _ in range(200):  # towards the distribution that the chain leaves as it is
        unigram_V = unigram_V @ chain_VV
    letters = (ascii_letters + digits + "".join(chr(0x100 + i) for i in range(n_characters)))[:n_characters]
    return Backcopy(letters, chain_VV, unigram_V, _most_frequent(unigram_V, n_triggers))


def text_backcopy(text: str | None = None, n_triggers: int = 3, n_characters: int = 64) -> Backcopy:
    """The task of a text's characters: the published form, with a text of one's own.

    Args:
        text: None: the text that comes with massact.
        n_triggers: k; the most frequent characters are triggers.
        n_characters: V at most; rarer characters are left out of the text.

    Raises:
        ValueError: the text has fewer characters than triggers and one more.
    """
    if text is None:
        text = (resources.files("massact.corpora") / "embedded.txt").read_text(encoding="utf-8")
    text = " ".join(text.split())
    counts = {c: text.count(c) for c in set(text)}
    characters = "".join(sorted(sorted(counts, key=lambda c: (-counts[c], c))[:n_characters]))
    V = len(characters)
    _check_room(V, n_triggers)
    index = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([index[c] for c in text if c in index])
    unigram_V = torch.bincount(ids, minlength=V).double()
    pairs_VV = torch.bincount(ids[:-1] * V + ids[1:], minlength=V * V).double().view(V, V)
    pairs_VV += (pairs_VV.sum(1, keepdim=True) == 0) * unigram_V  # a character that only ends the text
    return Backcopy(characters, pairs_VV / pairs_VV.sum(1, keepdim=True), unigram_V / unigram_V.sum(),
                    _most_frequent(unigram_V, n_triggers))  # fmt: skip


def _check_room(n_characters: int, n_triggers: int) -> None:
    if n_characters <= n_triggers:
        raise ValueError(f"{n_characters} characters have no room for {n_triggers} triggers and one more")


def _most_frequent(unigram_V: Tensor, n: int) -> Tensor:
    chosen_V = torch.zeros(len(unigram_V), dtype=torch.bool)
    chosen_V[unigram_V.argsort(descending=True, stable=True)[:n]] = True
    return chosen_V
