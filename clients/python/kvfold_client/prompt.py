"""What a model is asked to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat; `role` is "system", "user" or "assistant"."""

    role: Role
    content: str


Chat = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation, oldest message first. A mapping has the keys "role" and "content"."""

Prompt = str | Sequence[int] | Chat
"""Text that is tokenized as it is, token ids, or a chat that the server renders with the model's template."""
