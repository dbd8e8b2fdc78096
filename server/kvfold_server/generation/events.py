"""What an engine says about its requests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvfold_server.generation.request import RequestId


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural log-probability under the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at a position, and the most probable alternatives there, best first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What was done with the KV cache of one request, in bytes; the fields are those of `kvfold.v1.MemoryReport`."""

    shared_layers: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_held_peak: int
    preemptions: int = 0

    @property
    def kv_bytes_saved(self) -> int:
        """`kv_bytes_full - kv_bytes_held`; may be a little below zero at depth 0 (partial pages)."""
        return self.kv_bytes_full - self.kv_bytes_held


class FinishCause(Enum):
    """Why a request ended in the engine. Every request ends with exactly one of these."""

    STOP_TOKEN = "stop_token"  # noqa: S105 - not a secret
    LENGTH = "length"
    CANCELLED = "cancelled"
    QUEUE_FULL = "queue_full"
    TOO_LARGE = "too_large"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of each prompt token but the first; sent before the first token of a request that asked for
    them."""

    request_id: RequestId
    logprobs: tuple[PositionLogprobs, ...]


class TokenGenerated(NamedTuple):
    """One new token. A stop token is reported like any other; the finish event follows in the same step.

    Both sides of the channel make one for each token; a frozen dataclass takes three times as long to make.
    """

    request_id: RequestId
    token_id: int
    logprobs: PositionLogprobs | None = None


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The end of a request; nothing follows. `bytes_needed` is set for TOO_LARGE, `error_id` for INTERNAL_ERROR."""

    request_id: RequestId
    cause: FinishCause
    memory: MemoryReport
    bytes_needed: int = 0
    error_id: str = ""


EngineEvent = PromptScored | TokenGenerated | RequestFinished
