"""A sequence: the scheduler's view of one request, and its lifecycle."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NewType

from kvfold_scheduler.page_pool import PoolCorruptionError

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import CacheGeometry
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

    @property
    def final_tokens(self) -> int:
        """Tokens in the cache at the end of the longest answer, whose last token is chosen and never computed."""
        return self.prompt_tokens + self.max_new_tokens - 1


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """The KV bytes of a sequence: held now or at its end, the same tokens at depth 0, the most held at any time."""

    shared_layers: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_held_peak: int
    preemptions: int


class Sequence:
    """The mutable state of one sequence.

    `known_tokens` counts prompt and generated tokens; `computed_tokens` those whose KV is in the pool. While it runs
    it owns a cache. Owned by the scheduler.
    """

    __slots__ = ("_peak_bytes", "_state", "cache", "computed_tokens", "generated_tokens", "preemptions", "request")

    def __init__(self, request: SequenceRequest) -> None:
        self.request = request
        self._state = SequenceState.WAITING
        self.cache: SequenceCache | None = None
        self.generated_tokens = 0
        self.computed_tokens = 0
        self.preemptions = 0
        self._peak_bytes = 0

    @property
    def state(self) -> SequenceState:
        """Where the sequence is in its life."""
        return self._state

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.request.prompt_tokens + self.generated_tokens

    @property
    def running_cache(self) -> SequenceCache:
        """The cache of a sequence that runs. Raises PoolCorruptionError if it has none."""
        if self.cache is None:
            raise PoolCorruptionError(f"sequence {self.request.sequence_id} has no cache")
        return self.cache

    def start(self, cache: SequenceCache) -> None:
        """Runs, with an empty cache."""
        self._move_to(SequenceState.PREFILL)
        self.cache = cache

    def advance(self, count: int) -> None:
        """Counts `count` more tokens as computed."""
        self.computed_tokens += count

    def accept_token(self) -> None:
        """Counts one more generated token; the sequence decodes from now on."""
        self.generated_tokens += 1
        if self._state is SequenceState.PREFILL:
            self._move_to(SequenceState.DECODE)

    def finish_reason(self, stopped: bool) -> FinishReason | None:
        """Why the answer is complete, None if it is not. `stopped`: its newest token is a stop token."""
        if stopped:
            return FinishReason.STOPPED
        if self.generated_tokens >= self.request.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def give_way(self) -> None:
        """Frees all blocks and waits; all known tokens will be computed again."""
        self._move_to(SequenceState.WAITING)
        self._release_cache()
        self.computed_tokens = 0
        self.preemptions += 1

    def finish(self) -> None:
        """Frees all blocks for good."""
        self._move_to(SequenceState.FINISHED)
        self._release_cache()

    def report(self, geometry: CacheGeometry) -> SequenceReport:
        """The KV bytes of the sequence now."""
        cache = self.cache
        return SequenceReport(
            shared_layers=self.request.shared_layers,
            kv_bytes_held=0 if cache is None else cache.held_bytes,
            kv_bytes_full=self.computed_tokens * geometry.bytes_per_token,
            kv_bytes_held_peak=self._peak_bytes if cache is None else max(self._peak_bytes, cache.held_peak_bytes),
            preemptions=self.preemptions,
        )

    def check_integrity(self) -> None:
        """Raises PoolCorruptionError if the counts of tokens, the state and the cache contradict each other."""
        fits = {
            SequenceState.WAITING: self.computed_tokens == 0 and self.cache is None,
            SequenceState.PREFILL: self.computed_tokens < self.known_tokens and self.cache is not None,
            SequenceState.DECODE: self.computed_tokens == self.known_tokens - 1 and self.cache is not None,
            SequenceState.FINISHED: self.cache is None,
        }
        if not fits[self._state]:
            raise PoolCorruptionError(
                f"sequence {self.request.sequence_id} is in {self._state.value} with {self.computed_tokens} of "
                f"{self.known_tokens} tokens computed"
            )
        if self.cache is not None:
            self.cache.check_integrity()
            if self.cache.token_capacity < self.computed_tokens:
                raise PoolCorruptionError(f"sequence {self.request.sequence_id} has computed tokens without blocks")

    def _move_to(self, state: SequenceState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise ValueError(f"a sequence cannot go from {self._state.value} to {state.value}")
        self._state = state

    def _release_cache(self) -> None:
        if self.cache is not None:
            self._peak_bytes = max(self._peak_bytes, self.cache.held_peak_bytes)
            self.cache.release()
            self.cache = None
