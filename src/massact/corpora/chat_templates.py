"""Text as a user's message in the chat template of a tokenizer, up to where the model is to answer."""

from __future__ import annotations

from typing import Any

from massact.records.errors import UserError, first_line

CHAT = "chat"  # the policy of special tokens that a corpus records: what the template puts around each text
_MARK = "MESSAGEMARK"  # letters alone: no template changes them


def in_template(tokenizer: Any, text: str) -> str:
    """A text as the template writes it: the message of a user, then what begins the answer.

    Raises:
        UserError: the tokenizer has no template, or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The tokenizer has no chat template.",
            f"{type(tokenizer).__name__} of this model has none: it is no chat model, or its template lies elsewhere.",
            "Leave --chat-template out, or set tokenizer.chat_template in Python.",
        )
    message = [{"role": "user", "content": text}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs, and raise what they like
        raise UserError(
            "The chat template of the tokenizer cannot be used.",
            f"{type(error).__name__}: {first_line(error)}",
            "Leave --chat-template out.",
        ) from error


def around_message(tokenizer: Any) -> tuple[str, str]:
    """What the template puts in front of a message and behind it.

    Raises:
        UserError: as `in_template`; or the template does not tell the message once.
    """
    before, *after = in_template(tokenizer, _MARK).split(_MARK)
    if len(after) != 1:
        raise UserError(
            "The chat template of the tokenizer cannot be put around windows of text.",
            f"It writes a message {len(after)} times.",
            "Give prompts (a list, or rows of JSONL, CSV or parquet), or leave --chat-template out.",
        )
    return before, after[0]
