"""A sequence: the scheduler's view of one request, and its lifecycle."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from kvfold_scheduler.sequence_cache import SequenceCache

SequenceId = NewType("SequenceId", int)
"""Given by the caller, unique among the sequences that have not finished."""


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILL, SequenceState.FINISHED}),
    SequenceState.PREFILL: frozenset({SequenceState.DECODE, SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.DECODE: frozenset({SequenceState.WAITING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


class FinishReason(Enum):
    """Why a sequence finished."""

    STOPPED = "stopped"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """What the scheduler needs to know of a request. `prompt_tokens` and `max_new_tokens` are at least 1."""

    sequence_id: SequenceId
    prompt_tokens: int
    max_new_tokens: int
    shared_layers: int


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """The KV bytes of a sequence: held now (or at its end), the same tokens at depth 0, and the most held at any time."""

    shared_layers: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_held_peak: int
    preemptions: int


class Sequence:
    """The mutable state of one sequence.

    `known_tokens` counts prompt and generated tokens; `computed_tokens` those whose KV is in the pool. Owned by the scheduler.
    """

    __slots__ = ("_state", "cache", "computed_tokens", "generated_tokens", "peak_bytes", "preemptions", "request")

    def __init__(self, request: SequenceRequest) -> None:
        self.request = request
        self._state = SequenceState.WAITING
        self.cache: SequenceCache | None = None
        self.generated_tokens = 0
        self.computed_tokens = 0
        self.preemptions = 0
        self.peak_bytes = 0

    @property
    def state(self) -> SequenceState:
        """Where the sequence is in its life."""
        return self._state

    def move_to(self, state: SequenceState) -> None:
        """Changes the state. Raises ValueError for a transition that the table does not allow."""
        if state not in TRANSITIONS[self._state]:
            raise ValueError(f"a sequence cannot go from {self._state.value} to {state.value}")
        self._state = state

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.request.prompt_tokens + self.generated_tokens
