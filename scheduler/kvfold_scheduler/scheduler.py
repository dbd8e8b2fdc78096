"""The scheduler: which sequences run, how many tokens of each a step computes, and who gives way when blocks run out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvfold_scheduler.block_tables import BlockTables
from kvfold_scheduler.page_pool import PagePool, PoolCorruptionError
from kvfold_scheduler.sequence import FinishReason, Sequence, SequenceId, SequenceReport, SequenceRequest, SequenceState
from kvfold_scheduler.sequence_cache import SequenceCache, blocks_at_most
from kvfold_scheduler.step_plan import Chunk, SequenceFinished, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.sharing import SharingPlan


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a scheduler.

    `step_tokens` bounds the tokens of one step, so that a long prompt delays running streams by no more than one chunk.
    """

    max_running: int = 128
    max_waiting: int = 1024
    step_tokens: int = 512

    def __post_init__(self) -> None:
        if min(self.max_running, self.max_waiting) < 1:
            raise ValueError("at least one sequence must be allowed to run and to wait")
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens ({self.step_tokens}) must be at least max_running ({self.max_running}): "
                "every running sequence gets a token each step"
            )


class Admission(Enum):
    """What became of a new sequence."""

    WAITING = "waiting"
    QUEUE_FULL = "queue_full"
    TOO_LARGE = "too_large"


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Blocks and sequences by state, and the KV bytes of all computed tokens at depth 0."""

    free_blocks: int
    prefill_blocks: int
    decode_blocks: int
    running: int
    waiting: int
    kv_bytes_full: int


class Scheduler:
    """Owns the pool's ledger, the block tables and all sequences. Not thread-safe: the engine loop is its only caller.

    The step: `plan = step()`, the runner computes it, `events = commit(plan, result)`. Between `step` and `commit` nothing else
    may be called but `fail`. A plan that is never committed changes nothing but reserved blocks, which their sequences keep.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        plan: SharingPlan,
        block_count: int,
        context_length: int,
        limits: SchedulerLimits,
    ) -> None:
        plan.check_kinds(geometry)
        self.geometry = geometry
        self.plan = plan
        self.limits = limits
        self.context_length = context_length
        self.pool = PagePool(block_count)
        self.tables = BlockTables(limits.max_running, geometry.layer_count, geometry.blocks_for(context_length))
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._sequences)

    def blocks_needed(self, request: SequenceRequest) -> int:
        """The most blocks that a request holds at any time if it generates all its tokens."""
        tokens = request.prompt_tokens + request.max_new_tokens
        return blocks_at_most(self.geometry, self.plan, request.shared_layers, tokens, self.limits.step_tokens)

    def add(self, request: SequenceRequest) -> Admission:
        """Takes a new sequence, or says why not. Raises ValueError for an id in use or numbers out of range."""
        if request.sequence_id in self._sequences:
            raise ValueError(f"sequence {request.sequence_id} exists already")
        if min(request.prompt_tokens, request.max_new_tokens) < 1:
            raise ValueError("a sequence has at least one prompt token and generates at least one")
        if request.prompt_tokens + request.max_new_tokens > self.context_length:
            raise ValueError(f"prompt and answer do not fit in the context of {self.context_length} tokens")
        if not 0 <= request.shared_layers <= self.plan.max_depth:
            raise ValueError(f"the plan has depths 0 to {self.plan.max_depth}, not {request.shared_layers}")
        if self.blocks_needed(request) > self.pool.block_count:
            return Admission.TOO_LARGE
        if len(self._waiting) >= self.limits.max_waiting:
            return Admission.QUEUE_FULL
        sequence = Sequence(request)
        self._sequences[request.sequence_id] = sequence
        self._waiting.append(sequence)
        return Admission.WAITING

    def cancel(self, sequence_id: SequenceId) -> SequenceFinished | None:
        """Ends a sequence and frees its blocks at once; None if it is not known (it has ended already)."""
        return self._end(sequence_id, FinishReason.CANCELLED)

    def fail(self, sequence_id: SequenceId) -> SequenceFinished | None:
        """Ends a sequence that cannot be computed; None if it is not known."""
        return self._end(sequence_id, FinishReason.FAILED)

    def step(self) -> StepPlan:
        """Chooses what to compute next and reserves the blocks for it.

        Running sequences come first, one token each for those that decode; what is left of the token budget goes to prompts, in
        the order of arrival. If blocks run out, the sequence that arrived last gives way: its blocks are freed and it waits
        to be computed again.
        """
        chunks: dict[SequenceId, Chunk] = {}
        budget = self.limits.step_tokens
        decoding = [sequence for sequence in self._running if sequence.state is SequenceState.DECODE]
        for sequence in decoding:
            if sequence.state is SequenceState.DECODE and self._reserve(sequence, sequence.known_tokens, chunks):
                chunks[sequence.request.sequence_id] = self._chunk(sequence, 1)
                budget -= 1
        for sequence in [sequence for sequence in self._running if sequence.state is SequenceState.PREFILL]:
            budget -= self._plan_prefill(sequence, budget, chunks)
        while self._waiting and budget > 0 and self._has_room(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._start(sequence)
            budget -= self._plan_prefill(sequence, budget, chunks)
        return StepPlan(tuple(sorted(chunks.values(), key=lambda chunk: chunk.depth)))

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[SequenceFinished, ...]:
        """Accounts for a computed plan: lengths grow, sequences end, blocks that left a window are freed."""
        events: list[SequenceFinished] = []
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.sequence_id]
            sequence.computed_tokens = chunk.start + chunk.count
            if chunk.samples:
                sequence.generated_tokens += 1
                if sequence.state is SequenceState.PREFILL:
                    sequence.move_to(SequenceState.DECODE)
                reason = self._finish_reason(sequence, result)
                if reason is not None:
                    event = self._end(chunk.sequence_id, reason)
                    if event is not None:
                        events.append(event)
                    continue
            if sequence.cache is not None:
                sequence.cache.drop_outside_windows(sequence.computed_tokens)
        return tuple(events)

    def use(self) -> PoolUse:
        """How the pool is used now."""
        blocks = {SequenceState.PREFILL: 0, SequenceState.DECODE: 0}
        tokens = 0
        for sequence in self._running:
            if sequence.cache is not None:
                blocks[sequence.state] += sequence.cache.held_bytes // self.geometry.block_bytes
                tokens += sequence.computed_tokens
        return PoolUse(
            free_blocks=self.pool.free_count,
            prefill_blocks=blocks[SequenceState.PREFILL],
            decode_blocks=blocks[SequenceState.DECODE],
            running=len(self._running),
            waiting=len(self._waiting),
            kv_bytes_full=tokens * self.geometry.bytes_per_token,
        )

    def report(self, sequence_id: SequenceId) -> SequenceReport:
        """The KV bytes of a sequence that has not finished. Raises KeyError."""
        return self._report(self._sequences[sequence_id])

    def check_integrity(self) -> None:
        """Recomputes the ledger from the tables. Raises PoolCorruptionError if anything contradicts."""
        caches = [sequence.cache for sequence in self._running if sequence.cache is not None]
        self.pool.check_integrity([cache.blocks() for cache in caches])
        if len({cache.row for cache in caches}) != len(caches):
            raise PoolCorruptionError("two sequences occupy one row")
        if self.tables.free_row_count + len(caches) != self.tables.row_count:
            raise PoolCorruptionError("a row is neither free nor occupied")
        if set(self._sequences.values()) != {*self._running, *self._waiting}:
            raise PoolCorruptionError("a sequence is neither running nor waiting")
        for sequence in self._waiting:
            if sequence.cache is not None:
                raise PoolCorruptionError("a waiting sequence holds blocks")
        named = self.tables.row_count * self.tables.layer_count * self.tables.blocks_per_layer
        if not caches and named <= MAX_ENTRIES_TO_SCAN and any(self.tables.entries):
            raise PoolCorruptionError("a table names a block although no sequence runs")

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        cache = _cache_of(sequence)
        start = sequence.computed_tokens
        return Chunk(
            sequence_id=sequence.request.sequence_id,
            row=cache.row,
            depth=cache.depth,
            start=start,
            count=count,
            samples=start + count == sequence.known_tokens,
        )

    def _plan_prefill(self, sequence: Sequence, budget: int, chunks: dict[SequenceId, Chunk]) -> int:
        """Adds the next chunk of a prompt and returns its tokens; 0 if there is no budget or no blocks."""
        if sequence.state is not SequenceState.PREFILL:
            return 0
        count = min(budget, sequence.known_tokens - sequence.computed_tokens)
        if count <= 0 or not self._reserve(sequence, sequence.computed_tokens + count, chunks):
            return 0
        chunks[sequence.request.sequence_id] = self._chunk(sequence, count)
        return count

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can start: a row, and blocks for its known tokens beside what others need next."""
        if self.tables.free_row_count == 0:
            return False
        needed = blocks_at_most(
            self.geometry,
            self.plan,
            sequence.request.shared_layers,
            sequence.known_tokens + 1,
            self.limits.step_tokens,
        )
        promised = sum(
            _cache_of(other).blocks_to_grow(other.known_tokens + 1)
            for other in self._running
            if other.state is SequenceState.PREFILL
        )
        return needed + promised <= self.pool.free_count

    def _start(self, sequence: Sequence) -> None:
        sequence.cache = SequenceCache(
            self.geometry, self.plan, self.pool, self.tables, sequence.request.shared_layers
        )
        sequence.move_to(SequenceState.PREFILL)
        self._running.append(sequence)

    def _reserve(self, sequence: Sequence, tokens: int, chunks: dict[SequenceId, Chunk]) -> bool:
        """Reserves blocks, preempting from the last arrival down; False if the sequence itself had to give way."""
        while not _cache_of(sequence).grow(tokens):
            victim = self._running[-1]
            self._preempt(victim)
            chunks.pop(victim.request.sequence_id, None)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._running.remove(sequence)
        sequence.move_to(SequenceState.WAITING)
        sequence.computed_tokens = 0
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)

    def _finish_reason(self, sequence: Sequence, result: StepResult) -> FinishReason | None:
        if sequence.request.sequence_id in result.stopped:
            return FinishReason.STOPPED
        if sequence.generated_tokens >= sequence.request.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _end(self, sequence_id: SequenceId, reason: FinishReason) -> SequenceFinished | None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return None
        report = self._report(sequence)
        _discard(self._running if sequence.cache is not None else self._waiting, sequence)
        self._release(sequence)
        sequence.move_to(SequenceState.FINISHED)
        return SequenceFinished(sequence_id, reason, report)

    def _release(self, sequence: Sequence) -> None:
        if sequence.cache is not None:
            sequence.peak_bytes = max(sequence.peak_bytes, sequence.cache.held_peak_bytes)
            sequence.cache.release()
            sequence.cache = None

    def _report(self, sequence: Sequence) -> SequenceReport:
        cache = sequence.cache
        return SequenceReport(
            shared_layers=sequence.request.shared_layers,
            kv_bytes_held=cache.held_bytes if cache is not None else 0,
            kv_bytes_full=sequence.computed_tokens * self.geometry.bytes_per_token,
            kv_bytes_held_peak=max(sequence.peak_bytes, cache.held_peak_bytes if cache is not None else 0),
            preemptions=sequence.preemptions,
        )


MAX_ENTRIES_TO_SCAN = 1 << 20
"""Above this, an integrity check does not read every entry of the tables: it would commit their memory."""


def _cache_of(sequence: Sequence) -> SequenceCache:
    if sequence.cache is None:
        raise PoolCorruptionError(f"sequence {sequence.request.sequence_id} runs without a cache")
    return sequence.cache


def _discard(sequences: Iterable[Sequence], sequence: Sequence) -> None:
    if isinstance(sequences, list | deque):
        sequences.remove(sequence)
