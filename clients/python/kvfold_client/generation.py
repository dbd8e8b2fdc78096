"""What generation returns; mirrors kvfold/v1/generation.proto."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold_client.memory import MemoryReport


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at one position, and the most probable alternatives there, best first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Facts about the prompt; `logprobs` has an entry for each token but the first, if they were asked for."""

    token_count: int
    logprobs: tuple[PositionLogprobs, ...]


class FinishReason(Enum):
    """Why generation ended: at a stop token or stop string, or because no more tokens were allowed."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of the answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class FinishInfo:
    """How a request ended; one of `stop_string` and `stop_token_id` is set if the reason is STOP."""

    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage
    memory: MemoryReport


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; `logprobs` has one entry a token, if they were asked for."""

    model: str
    prompt: PromptInfo
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish: FinishInfo


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of a streamed answer: the text that became certain since the last chunk, and the tokens since then.

    The first chunk alone has `prompt`, the last one alone has `finish`. A token's text may come with a later chunk.
    """

    prompt: PromptInfo | None
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish: FinishInfo | None
