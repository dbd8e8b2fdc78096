"""Turning a growing list of tokens into text, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kvfold_server.text.byte_detokenizer import ByteDetokenizer
from kvfold_server.text.window_detokenizer import WindowDetokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.text.tokenizer import Tokenizer


class Detokenizer(Protocol):
    """The text of one answer. The pieces join to the text of the whole answer, and no piece splits a character."""

    def add(self, token_id: int) -> str:
        """Takes the next token and returns the text that became certain; often empty."""
        ...

    def finish(self) -> str:
        """The text of what is still pending; bytes that form no whole character become U+FFFD."""
        ...


def make_detokenizer(tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
    """The quickest detokenizer that is right for the tokenizer, for an answer to a prompt."""
    kind = WindowDetokenizer if tokenizer.byte_pieces is None else ByteDetokenizer
    return kind(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
