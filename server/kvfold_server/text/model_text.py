"""Everything about text that a model brings with it: its tokenizer and its chat template."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvfold_server.generation.draft import TextPrompt, TokenPrompt
from kvfold_server.generation.errors import InvalidRequestError, UnmetPreconditionError
from kvfold_server.text.chat import ChatTemplate, ChatTemplateError
from kvfold_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvfold_server.generation.draft import ChatPrompt, Prompt

LONG_TEXT = 4096
"""Characters above which text is tokenized in another thread; this many take about 4 ms: so long no stream moves."""

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
"""Two, so that one long text does not delay all others, and many do not take the engine's cores."""


class ModelText:
    """Turns prompts into the tokens that the model is given."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self._template = template

    @classmethod
    def load(cls, folder: Path) -> ModelText:
        """Reads a model's folder. Takes up to a second. Raises TokenizerError or ChatTemplateError."""
        tokenizer = Tokenizer.load(folder)
        return cls(tokenizer, ChatTemplate.load(folder, tokenizer.special_tokens))

    async def tokens(self, prompt: Prompt) -> Sequence[int]:
        """The token ids of a prompt.

        Raises InvalidRequestError if the template refuses a conversation, UnmetPreconditionError if there is none.
        """
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        if isinstance(prompt, TextPrompt):
            text, add_special_tokens = prompt.text, True
        else:
            text, add_special_tokens = self._render(prompt), False  # the template writes special tokens itself
        if len(text) <= LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            _threads, lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    def _render(self, prompt: ChatPrompt) -> str:
        if not prompt.messages:
            raise InvalidRequestError(f"{prompt.field}.messages", "a conversation has at least one message")
        if prompt.continue_final_message and prompt.messages[-1].role != "assistant":
            raise InvalidRequestError(
                f"{prompt.field}.continue_final_message", "the last message is not the assistant's"
            )
        if self._template is None:
            raise UnmetPreconditionError("CHAT_TEMPLATE", prompt.field, "the model has no chat template")
        try:
            return self._template.render(prompt.messages, continue_final_message=prompt.continue_final_message)
        except ChatTemplateError as error:
            raise InvalidRequestError(f"{prompt.field}.messages", str(error)) from error
