"""Text -> token ids: which special tokens, and where the text is cut.

Windows: the documents are joined, tokenised once and cut into consecutive windows; the incomplete tail is
dropped (the protocol of the paper, official code lib/load_data.py). Prompts: each text is one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from massact.corpora.batch import Corpus, Origin
from massact.corpora.chat_templates import CHAT, around_message, in_template
from massact.corpora.token_strings import Spelling
from massact.records.errors import UserError, near

DEFAULT_SEQ_LEN = 1024
DEFAULT_SEQUENCES = 32
POLICIES = ("auto", "always", "never")
# Text beyond this is tokenised only as far as the windows reach, plus a margin. A token depends on the text
# after it over a few dozen characters; the margin is thousands of tokens.
WHOLE_TEXT_CHARACTERS = 2_000_000
MARGIN_TOKENS = 4096
# `model_max_length` is 1e30 where a tokenizer does not know it.
KNOWN_LENGTH = 10_000_000


@dataclass(frozen=True)
class Request:
    """What the user asked for; None stands for the default.

    Args:
        seq_len: tokens per sequence, special tokens included.
        n_sequences: how many sequences; 'all' for all there are.
        bos: 'auto', 'always' or 'never'.
        seed: for sources that draw documents at random.
        context: most positions that the model takes.
        chat_template: each text is the message of a user, in the chat template of the tokenizer.
    """

    seq_len: int | None = None
    n_sequences: int | Literal["all"] | None = None
    bos: str = "auto"
    seed: int = 0
    context: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.bos not in POLICIES:
            raise UserError(f"The BOS policy is {self.bos!r}.", "It is none of the policies.", near(self.bos, POLICIES))
        if self.chat_template and self.bos != "auto":
            what = f"--chat-template and --bos {self.bos} were given."
            raise UserError(what, "The template says what stands in front.", "Leave --bos out.")
        for option, value in (("--seq-len", self.seq_len), ("--n-sequences", self.n_sequences)):
            if value is None or (value == "all" and option == "--n-sequences"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise UserError(f"{option} is {value!r}.", "It is a count.", "Use a whole number from 1 on.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer) or self.seed < 0:
            raise UserError(f"The seed is {self.seed!r}.", "NumPy takes no such seed.", "Use 0, 1, 2, ...")


@dataclass(frozen=True)
class Specials:
    """The special tokens around every sequence.

    Args:
        policy: the resolved policy, as in `Origin.bos`.
        prefix: ids in front.
        suffix: ids behind.
    """

    policy: str
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of positions that they take of every sequence."""
        return 0 if self.policy == "stream" else len(self.prefix) + len(self.suffix)

    def around(self, ids: Sequence[int]) -> list[int]:
        """Return one sequence with its special tokens."""
        return [*self.prefix, *ids, *self.suffix]


def resolve_specials(tokenizer: Any, bos: str, protocol: str | None = None) -> Specials:
    """Say which special tokens a policy means for a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        bos: 'never': none. 'always': BOS (or CLS) in front of every sequence. 'auto': the protocol of the
            data set where it has one; else what the tokenizer itself adds, if it puts anything in front.
        protocol: 'never' or 'stream' (special tokens once, around the whole text), for the paper's data sets.

    Raises:
        UserError: 'always' with a tokenizer that has neither BOS nor CLS.
    """
    if bos == "always":
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if first is None:
            raise UserError(
                "bos='always' cannot be done with this tokenizer.",
                f"{type(tokenizer).__name__} has no BOS and no CLS token.",
                "Use --bos auto or --bos never.",
            )
        return Specials("always", (first,))
    if bos == "never" or protocol == "never":
        return Specials("never")
    prefix, suffix = _added(tokenizer)
    if not prefix:
        return Specials("never")
    return Specials("stream" if protocol == "stream" else "tokenizer", prefix, suffix)


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Tokenise a text of any length, without the warning about long sequences.

    Raises:
        UserError: the text holds half of a character (a lone surrogate), which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "The text is not Unicode.",
            f"Character {error.start} is {ascii(text[error.start])}: {error.reason}.",
            "Mend the text.",
        ) from None
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def pack_windows(
    name: str,
    documents: Sequence[str],
    tokenizer: Any,
    request: Request,
    join: str = "\n\n",
    protocol: str | None = None,
    source: dict[str, Any] | None = None,
) -> Corpus:
    """Join, tokenise once, cut into consecutive windows, keep the first ones (paper.md 2.1, 'Data loading').

    Args:
        name: name of the corpus.
        documents: the texts, in order.
        tokenizer: a transformers tokenizer.
        request: window length, number of windows, BOS policy.
        join: what stands between two documents.
        protocol: what bos='auto' means for this source; see `resolve_specials`.
        source: where the documents came from, for run.json.

    Raises:
        UserError: no text, less text than asked for, or windows longer than the context.
    """
    specials = _chat(tokenizer) if request.chat_template else resolve_specials(tokenizer, request.bos, protocol)
    text = join.join(documents)
    if not text.strip():
        raise UserError(f"The corpus {name!r} is empty.", "It holds no text.", "Give a text with some words in it.")
    cap = _longest(tokenizer, request)
    reach = None if request.n_sequences == "all" else (request.n_sequences or DEFAULT_SEQUENCES) * cap
    ids, complete = _stream(tokenizer, text, reach, special=specials.policy == "stream")
    if not ids:
        raise UserError(f"The corpus {name!r} is empty.", "The tokenizer makes no token of it.", "Give another text.")
    seq_len = request.seq_len or min(cap, len(ids) + specials.size)
    room = seq_len - specials.size
    if room < 1:
        raise UserError(
            f"--seq-len {seq_len} leaves no room for text.",
            f"The special tokens alone take {specials.size} positions.",
            f"Use --seq-len {specials.size + 1} or more, or --bos never.",
        )
    available = len(ids) // room
    n = _how_many(request, available, len(ids), seq_len, specials)
    windows = (ids[i * room : (i + 1) * room] for i in range(n))
    rows = [specials.around(window) if specials.size else window for window in windows]
    packing = {
        "method": "windows",
        "join": join,
        "n_documents": len(documents),
        "text_tokens": len(ids),
        "text_complete": complete,
        "text_tokens_per_window": room,
    }
    origin = _origin(tokenizer, request, specials, packing, source)
    inputs = {"input_ids": torch.tensor(rows, dtype=torch.long)}
    return Corpus(name, "tokens", inputs, None, origin, Spelling(tokenizer))


def pack_prompts(
    name: str, prompts: Sequence[str], tokenizer: Any, request: Request, source: dict[str, Any] | None = None
) -> Corpus:
    """Make each text one sequence; where lengths differ, pad on the right.

    Args:
        name: name of the corpus.
        prompts: the texts.
        tokenizer: a transformers tokenizer.
        request: number of prompts (the first ones; default all), BOS policy, context.
        source: where the prompts came from, for run.json.

    Raises:
        UserError: a prompt without tokens or longer than the context, or fewer prompts than asked for.
    """
    n = len(prompts) if request.n_sequences is None or request.n_sequences == "all" else request.n_sequences
    if n > len(prompts):
        raise UserError(f"{n} prompts were asked for.", f"There are {len(prompts)}.", "Leave --n-sequences out.")
    chat = request.chat_template
    specials = _chat(tokenizer) if chat else resolve_specials(tokenizer, request.bos)
    rows = []
    for number, prompt in enumerate(prompts[:n]):
        ids = token_ids(tokenizer, prompt)
        if not ids:
            raise UserError(f"Prompt {number} is empty.", f"{prompt!r} has no token.", "Leave it out.")
        rows.append(token_ids(tokenizer, in_template(tokenizer, prompt)) if chat else specials.around(ids))
        if request.context is not None and len(rows[-1]) > request.context:
            raise UserError(
                f"Prompt {number} is {len(rows[-1])} tokens long.",
                f"The model takes at most {request.context}.",
                f"Shorten it, or pack the text into windows with --seq-len {request.context}.",
            )
    width = max(map(len, rows))
    # Any id of the vocabulary will do: these positions are masked and never counted.
    fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    padded = torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)
    mask = torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    packing = {"method": "prompts", "n_documents": len(prompts)}
    origin = _origin(tokenizer, request, specials, packing, source)
    spelling = Spelling(tokenizer)
    return Corpus(name, "tokens", {"input_ids": padded}, None if mask.all() else mask, origin, spelling)


def _chat(tokenizer: Any) -> Specials:
    """What the chat template puts around a message."""
    before, after = around_message(tokenizer)
    return Specials(CHAT, tuple(token_ids(tokenizer, before)), tuple(token_ids(tokenizer, after)))


def _added(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the tokenizer puts in front of and behind a sequence, read off from one letter."""
    plain, full = token_ids(tokenizer, "a"), token_ids(tokenizer, "a", special=True)
    for at in range(len(full) - len(plain) + 1):
        if plain and full[at : at + len(plain)] == plain:
            return tuple(full[:at]), tuple(full[at + len(plain) :])
    # No token for "a" at all: whatever stands up to the BOS or CLS is in front.
    heads = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    at = max((i + 1 for i, token_id in enumerate(full) if token_id in heads), default=0)
    return tuple(full[:at]), tuple(full[at:])


def _longest(tokenizer: Any, request: Request) -> int:
    """Return the window length: the one asked for, else the default within the context."""
    context = request.context
    if request.seq_len is not None:
        if context is not None and request.seq_len > context:
            raise UserError(
                f"--seq-len {request.seq_len} is too long.",
                f"The model takes at most {context} positions.",
                f"Use --seq-len {context} or less.",
            )
        return request.seq_len
    if context is None:  # a tokenizer often knows it, but not reliably enough to refuse what the user asks for
        length = getattr(tokenizer, "model_max_length", None)
        context = length if isinstance(length, int) and 0 < length < KNOWN_LENGTH else DEFAULT_SEQ_LEN
    return min(DEFAULT_SEQ_LEN, context)


def _stream(tokenizer: Any, text: str, reach: int | None, special: bool) -> tuple[list[int], bool]:
    """Tokenise the text, or as much of a very long one as its first `reach` tokens need; say if it was all.

    A prefix is tokenised and its last tokens dropped, so that what is kept is what the whole text would give.
    """
    size = len(text) if reach is None else max(WHOLE_TEXT_CHARACTERS, 8 * reach)
    while reach is not None and size < len(text):
        ids = token_ids(tokenizer, text[:size], special)
        if len(ids) >= reach + MARGIN_TOKENS:
            return ids[: len(ids) - MARGIN_TOKENS], False
        size *= 2
    return token_ids(tokenizer, text, special), True


def _how_many(request: Request, available: int, n_text: int, seq_len: int, specials: Specials) -> int:
    asked = request.n_sequences
    if available == 0:
        raise UserError(
            f"The text is too short for one sequence of {seq_len} tokens.",
            f"It has {n_text} tokens" + (f", and special tokens take {specials.size} more." if specials.size else "."),
            f"Use --seq-len {n_text + specials.size} or less, or a longer text.",
        )
    if asked is not None and asked != "all" and asked > available:
        fits = n_text // asked
        shorter = f" or --seq-len {fits + specials.size}" if fits else ""
        raise UserError(
            f"{asked} sequences of {seq_len} tokens were asked for.",
            f"The text has {n_text} tokens: enough for {available}.",
            f"Use --n-sequences {available}{shorter}, or a longer text.",
        )
    if asked is None:
        return min(DEFAULT_SEQUENCES, available)
    return available if asked == "all" else asked


def _origin(
    tokenizer: Any,
    request: Request,
    specials: Specials,
    packing: dict[str, Any],
    source: dict[str, Any] | None,
) -> Origin:
    names = {
        side: [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
        for side, ids in (("prefix", specials.prefix), ("suffix", specials.suffix))
    }
    return Origin(specials.policy, request.bos, names, int(request.seed), packing, source or {})
