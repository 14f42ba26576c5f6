"""Token ids as readable strings, and which of them are delimiters."""

from __future__ import annotations

from functools import cache
from typing import Any

# The marks that the paper's census calls delimiters (section 2.2: '.', '\n' and their like), as one table.
DELIMITERS = frozenset(".,;:!?'\"-()")


class Spelling:
    """Turn single token ids into readable strings, each id once.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._strings: dict[int, str] = {}

    def string(self, token_id: int) -> str:
        """Return the token as text: a leading space is kept, a newline is '\\n', an unknown id '<id 17>'."""
        if token_id not in self._strings:
            self._strings[token_id] = self._spell(token_id)
        return self._strings[token_id]

    def is_delimiter(self, token_id: int) -> bool:
        """Say whether the token is one punctuation mark, newlines only, or the separator token."""
        if token_id == getattr(self.tokenizer, "sep_token_id", None):
            return True
        text = self.string(token_id).strip(" ")
        return text in DELIMITERS or (text != "" and set(text) <= {"\n", "\r"})

    def info(self) -> dict[str, Any]:
        """Return the class and the size of the vocabulary, for run.json."""
        return {"class": type(self.tokenizer).__name__, "vocab_size": len(self.tokenizer)}

    def _spell(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return f"<id {token_id}>"
        if isinstance(piece, bytes):  # tokenizers written around tiktoken keep bytes
            return piece.decode("utf-8", errors="backslashreplace")
        if "\u2581" in piece:
            # SentencePiece decoders drop the space in front of a lone token, so read the piece instead.
            return piece.replace("\u2581", " ")
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if "\ufffd" in text and "\ufffd" not in piece:
            return _bytes_of(piece)
        return text or piece

    def _piece(self, token_id: int) -> str | bytes | None:
        try:
            return self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):  # slow tokenizers, for ids that they do not have
            return None


def _bytes_of(piece: str) -> str:
    """Spell part of a character: a byte-level one as '\\xe2\\x80', a SentencePiece byte '<0xE2>' as it is."""
    table = _byte_of_char()
    if any(char not in table for char in piece) or piece.startswith("<0x"):
        return piece
    return bytes(table[char] for char in piece).decode("utf-8", errors="backslashreplace")


@cache
def _byte_of_char() -> dict[str, int]:
    """Return the character that stands for each byte in byte-level BPE (GPT-2), inverted.

    Printable bytes stand for themselves, the other 68 are numbered from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
