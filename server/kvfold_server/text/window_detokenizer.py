"""Turning a growing list of tokens of any tokenizer into text: by decoding its end again with each token."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CONTEXT_TOKENS = 6
"""Tokens of the prompt that are decoded with the first token: they decide whether it begins with a space."""

PENDING_TOKENS = 3
"""An unfinished UTF-8 character has at most three bytes, so it began at most three tokens ago."""

MAX_PENDING_TOKENS = 8
"""Above this, the oldest pending tokens are given out: they are bytes that form no character, or have no text."""


class WindowDetokenizer:
    """The text of one answer.

    A token's text depends on its neighbours: bytes of a character may be spread over several tokens, and many
    tokenizers drop the space of a first word. So a window of tokens is decoded: the last ones whose text is out,
    and those that are pending. The window is short, so the work a token does not grow with the answer.
    """

    __slots__ = (
        "_context",
        "_context_text",
        "_pending",
        "_prompt_pending",
        "_skip",
        "_skip_special_tokens",
        "_tokenizer",
    )

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._pending: list[int] = []
        self._context: list[int] = []
        self._context_text = ""
        self._prompt_pending = 0
        self._start_after([token for token in prompt[-CONTEXT_TOKENS:] if token not in self._skip])

    def add(self, token_id: int) -> str:
        """Takes the next token and returns the text that became certain; often empty."""
        if token_id in self._skip:
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        if text and not text.endswith(REPLACEMENT):
            self._set_context(self._pending)
            self._pending = []
            self._prompt_pending = 0
            return text
        if len(self._pending) > MAX_PENDING_TOKENS:
            return self._give_up_oldest()
        return ""

    def finish(self) -> str:
        """The text of what is still pending; bytes that form no whole character become U+FFFD."""
        text = self._pending_text() if len(self._pending) > self._prompt_pending else ""
        self._pending = []
        return text

    def _start_after(self, prompt: list[int]) -> None:
        """Takes the prompt's end as context, from the border of a character to the border of a character.

        A character that the prompt leaves unfinished may be completed by the answer, which then brings it whole.
        """
        begun_at_most = PENDING_TOKENS if len(prompt) == CONTEXT_TOKENS else 0
        for unfinished, begun in itertools.product(range(PENDING_TOKENS + 1), range(begun_at_most + 1)):
            end = max(len(prompt) - unfinished, 0)
            self._set_context(prompt[begun:end])
            if REPLACEMENT not in self._context_text:
                self._pending = prompt[end:]
                self._prompt_pending = len(self._pending)
                return
        self._set_context(prompt)

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Invalid bytes behind valid ones can change how a tokenizer shows the valid ones, which are out already.
        return self._decode(self._pending)

    def _give_up_oldest(self) -> str:
        kept = self._pending[-PENDING_TOKENS:]
        self._pending = self._pending[:-PENDING_TOKENS]
        text = self._pending_text()
        if text:
            self._set_context(self._pending)
        self._pending = kept
        self._prompt_pending = 0
        return text

    def _set_context(self, token_ids: list[int]) -> None:
        self._context = token_ids
        self._context_text = self._decode(token_ids) if token_ids else ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
