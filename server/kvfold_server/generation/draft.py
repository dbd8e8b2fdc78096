"""A request for generation as it was asked for: what was not set is None, and nothing has been checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class SamplingDraft:
    """How the next token is to be chosen; see `kvfold.v1.SamplingParameters`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoppingDraft:
    """When generation is to end; see `kvfold.v1.StoppingParameters`."""

    max_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationDraft:
    """A request without its prompt."""

    sampling: SamplingDraft = field(default_factory=SamplingDraft)
    stopping: StoppingDraft = field(default_factory=StoppingDraft)
    shared_layers: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, tokenized as it is. `field` is where it stands in the request."""

    text: str
    field: str = "prompt"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    token_ids: tuple[int, ...]
    field: str = "token_ids.ids"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, for the model's chat template."""

    messages: tuple[ChatMessage, ...]
    continue_final_message: bool = False
    field: str = "chat"


Prompt = TextPrompt | TokenPrompt | ChatPrompt
