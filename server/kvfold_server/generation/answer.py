"""An answer as the client gets it: text and tokens, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvfold_server.generation.events import MemoryReport, PositionLogprobs


class EndReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """How an answer ended. Of `stop_string` and `stop_token_id` one is set if the reason is STOP."""

    reason: EndReason
    prompt_tokens: int
    completion_tokens: int
    memory: MemoryReport
    stop_string: str | None = None
    stop_token_id: int | None = None


class AnswerChunk(NamedTuple):
    """What came since the last chunk. `end` is set in the last one."""

    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    prompt_logprobs: tuple[PositionLogprobs, ...] | None
    end: AnswerEnd | None
