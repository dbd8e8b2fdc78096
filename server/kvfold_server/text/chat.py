"""The model's own chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvfold_server.text.tokenizer import TokenizerError, read_tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2.parser import Parser

    from kvfold_server.generation.draft import ChatMessage

CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind the last message to find where the template would end it.

The trailing space shows whether the template trims.
"""


class ChatTemplateError(Exception):
    """A template cannot render a conversation; the message says why."""


class ChatTemplate:
    """Renders conversations in a sandbox: a template comes with a model and is not trusted."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ChatTemplateError if the source is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is broken: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """The template of a model's folder; None if it has none. Raises ChatTemplateError or TokenizerError."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), special_tokens)
            except (OSError, ValueError) as error:
                raise TokenizerError(f"{path} cannot be read: {error}") from error
        source = read_tokenizer_config(folder).get("chat_template")
        if isinstance(source, list):  # older configurations name several templates
            source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
        return cls(source, special_tokens) if isinstance(source, str) else None

    def render(self, messages: Sequence[ChatMessage], *, continue_final_message: bool = False) -> str:
        """The text that the model is given.

        It ends where the assistant's next message begins; with `continue_final_message` where the last message ends.
        Raises ChatTemplateError if the template refuses the conversation.
        """
        mark = CONTINUE_MARK if continue_final_message else ""
        last = len(messages) - 1
        chat = [
            {"role": message.role, "content": message.content + (mark if index == last else "")}
            for index, message in enumerate(messages)
        ]
        text = self._render(chat, add_generation_prompt=not continue_final_message)
        return _cut_at_mark(text, messages[-1].content) if continue_final_message else text

    def _render(self, chat: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ChatTemplateError(f"the model's chat template refuses this conversation: {error}") from error


def _cut_at_mark(text: str, final_content: str) -> str:
    position = text.rfind(CONTINUE_MARK.strip())
    if position < 0 or final_content.strip() not in text:
        raise ChatTemplateError("the model's chat template does not keep the last message as it is")
    trimmed = not text.startswith(CONTINUE_MARK, position)
    return text[:position].rstrip() if trimmed else text[:position]


class _GenerationBlocks(jinja2.ext.Extension):
    """Lets templates mark what the assistant says with {% generation %}; for rendering, the mark means nothing."""

    tags = {"generation"}  # noqa: RUF012, the base class declares it without ClassVar

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        """Returns what stands inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,  # noqa: ANN401, whatever a template has at hand
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
