"""Turning a growing list of tokens of a byte-level vocabulary into text: by joining their bytes."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.text.tokenizer import Tokenizer

PROMPT_TOKENS = 6
"""An unfinished UTF-8 character began at most three tokens ago; special tokens may stand between."""


class ByteDetokenizer:
    """The text of one answer.

    A token's bytes do not depend on its neighbours, and most tokens are whole characters: their text is looked up. Only
    bytes of a character that is not complete are kept. Next to an engine that keeps the caches full, decoding again and
    again took a quarter of the front end's time.
    """

    __slots__ = ("_added", "_pieces", "_skip", "_unfinished")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        """Raises ValueError if the tokenizer's vocabulary is of another kind."""
        if tokenizer.byte_pieces is None:
            raise ValueError("not a byte-level vocabulary")
        self._pieces = tokenizer.byte_pieces
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._unfinished = b""
        for token_id in prompt[-PROMPT_TOKENS:]:
            self.add(token_id)  # a character that the prompt began and the answer completes belongs to the answer
        self._added = False

    def add(self, token_id: int) -> str:
        """Takes the next token and returns the text that became certain; often empty."""
        if token_id in self._skip:
            return ""
        self._added = True
        piece = self._pieces[token_id]
        if not self._unfinished and isinstance(piece, str):
            return piece
        data = self._unfinished + (piece.encode() if isinstance(piece, str) else piece)
        text, certain = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[certain:]
        return text

    def finish(self) -> str:
        """The text of what is still pending; bytes that form no whole character become U+FFFD."""
        unfinished, self._unfinished = self._unfinished, b""
        return unfinished.decode(errors="replace") if self._added else ""
