"""The scheduler: who runs, how many tokens of each a step computes, and who gives way when blocks run out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvfold_scheduler.block_tables import BlockTables
from kvfold_scheduler.layer_groups import blocks_at_most, layer_groups
from kvfold_scheduler.page_pool import PagePool, PoolCorruptionError
from kvfold_scheduler.sequence import FinishReason, Sequence, SequenceId, SequenceReport, SequenceRequest, SequenceState
from kvfold_scheduler.sequence_cache import SequenceCache
from kvfold_scheduler.step_plan import Chunk, SequenceFinished, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    The step: `plan = step()`, the runner computes it, `events = commit(plan, result)`. Between `step` and `commit`
    sequences may end (`cancel`, `fail`), and a plan may be committed in parts (`StepPlan.subset`). What is not
    committed is planned again by the next `step`, on the blocks that it already has.

    Sequences run and wait in the order of arrival: all that run arrived before all that wait. The first one advances
    in every step, whatever the others do, so each sequence ends within as many steps as it and those before it have
    tokens.
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
        self._groups = tuple(layer_groups(geometry, plan, depth) for depth in range(plan.max_depth + 1))
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting: OrderedDict[SequenceId, Sequence] = OrderedDict()
        self._running: dict[SequenceId, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._sequences)

    def blocks_needed(self, request: SequenceRequest) -> int:
        """The most blocks that a request holds at any time if it generates all its tokens."""
        return self._blocks_at_most(request, request.final_tokens, self.limits.step_tokens)

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
        self._waiting[request.sequence_id] = sequence
        return Admission.WAITING

    def cancel(self, sequence_id: SequenceId) -> SequenceFinished | None:
        """Ends a sequence and frees its blocks at once; None if it is not known (it has ended already)."""
        return self._end(sequence_id, FinishReason.CANCELLED)

    def fail(self, sequence_id: SequenceId) -> SequenceFinished | None:
        """Ends a sequence that cannot be computed; None if it is not known."""
        return self._end(sequence_id, FinishReason.FAILED)

    def step(self) -> StepPlan:
        """Chooses what to compute next and reserves the blocks for it.

        Each sequence that decodes gets one token. What is left of the token budget goes to prompts, in the order of
        arrival. If blocks run out, the sequence that arrived last gives way: its blocks are freed and it waits to be
        computed again.
        """
        chunks: list[Chunk] = []
        running = list(self._running.values())
        budget = self.limits.step_tokens - sum(sequence.state is SequenceState.DECODE for sequence in running)
        for sequence in running:
            if sequence.state is SequenceState.WAITING:
                break  # it had to give way to one before it, and so had all that follow
            prefill = sequence.state is SequenceState.PREFILL
            chunk = self._plan_chunk(sequence, budget if prefill else 1)
            if chunk is not None:
                chunks.append(chunk)
                budget -= chunk.count if prefill else 0
        chunks.extend(self._admit(budget))
        return StepPlan(tuple(sorted(chunks, key=lambda chunk: chunk.depth)))

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[SequenceFinished, ...]:
        """Accounts for a computed plan: lengths grow, sequences end, blocks that left a window are freed.

        Chunks of sequences that have ended since the plan was made are passed over. Raises ValueError, and changes
        nothing, if a chunk was committed before or its sequence has been preempted since.
        """
        chunks = [
            (chunk, self._sequences[chunk.sequence_id]) for chunk in plan.chunks if chunk.sequence_id in self._sequences
        ]
        for chunk, sequence in chunks:
            cache = sequence.cache
            if cache is None or cache.row != chunk.row or sequence.computed_tokens != chunk.start:
                raise ValueError(f"the plan for sequence {chunk.sequence_id} is out of date")
        events: list[SequenceFinished] = []
        for chunk, sequence in chunks:
            sequence.advance(chunk.count)
            if chunk.samples:
                sequence.accept_token()
                reason = sequence.finish_reason(stopped=chunk.sequence_id in result.stopped)
                if reason is not None:
                    event = self._end(chunk.sequence_id, reason)
                    if event is not None:
                        events.append(event)
                    continue
            sequence.running_cache.drop_outside_windows(sequence.computed_tokens)
        return tuple(events)

    def use(self) -> PoolUse:
        """How the pool is used now."""
        tokens = prefill_blocks = 0
        for sequence in self._running.values():
            tokens += sequence.computed_tokens
            if sequence.state is SequenceState.PREFILL:
                prefill_blocks += sequence.running_cache.held_blocks
        return PoolUse(
            free_blocks=self.pool.free_count,
            prefill_blocks=prefill_blocks,
            decode_blocks=self.pool.held_count - prefill_blocks,
            running=len(self._running),
            waiting=len(self._waiting),
            kv_bytes_full=tokens * self.geometry.bytes_per_token,
        )

    def report(self, sequence_id: SequenceId) -> SequenceReport:
        """The KV bytes of a sequence that has not finished. Raises KeyError."""
        return self._sequences[sequence_id].report(self.geometry)

    def check_integrity(self) -> None:
        """Recomputes the ledger from the tables. Raises PoolCorruptionError if anything contradicts."""
        for sequence in self._sequences.values():
            sequence.check_integrity()
        caches = [sequence.running_cache for sequence in self._running.values()]
        self.pool.check_integrity([cache.blocks() for cache in caches])
        self.tables.check_integrity(sum(cache.held_blocks for cache in caches))
        if len({cache.row for cache in caches}) != len(caches):
            raise PoolCorruptionError("two sequences occupy one row")
        if self.tables.free_row_count + len(caches) != self.tables.row_count:
            raise PoolCorruptionError("a row is neither free nor occupied")
        if list(self._sequences) != [*self._running, *self._waiting]:
            raise PoolCorruptionError("the sequences do not run and wait in the order of their arrival")

    def _plan_chunk(self, sequence: Sequence, most: int) -> Chunk | None:
        """The next tokens of a running sequence, at most `most`, with blocks reserved; None if there are none."""
        start = sequence.computed_tokens
        count = min(most, sequence.known_tokens - start)
        if count <= 0 or not self._reserve(sequence, start + count):
            return None
        cache = sequence.running_cache
        samples = start + count == sequence.known_tokens
        return Chunk(sequence.request.sequence_id, cache.row, cache.depth, start, count, samples)

    def _admit(self, budget: int) -> Iterator[Chunk]:
        """Starts waiting sequences, first come first served, while rows, tokens and blocks last.

        One starts only if all that run, and it itself, can then go on for a block of tokens without anybody giving
        way: a prompt is not computed just to be dropped in the next steps.
        """
        spare: int | None = None
        while self._waiting and self.tables.free_row_count > 0 and budget > 0:
            sequence = next(iter(self._waiting.values()))
            needed = self._blocks_soon(sequence)
            if needed > self.pool.free_count:
                return
            if spare is None:
                spare = self.pool.free_count - sum(self._blocks_promised(other) for other in self._running.values())
            if needed > spare:
                return
            spare -= needed
            self._start(sequence)
            chunk = self._plan_chunk(sequence, budget)
            if chunk is not None:
                budget -= chunk.count
                yield chunk

    def _blocks_soon(self, sequence: Sequence) -> int:
        """The most blocks that a sequence holds at any time until it is a block of tokens longer than now."""
        tokens = min(sequence.known_tokens + self.geometry.tokens_per_block, sequence.request.final_tokens)
        chunk_tokens = 1 if sequence.state is SequenceState.DECODE else self.limits.step_tokens
        return self._blocks_at_most(sequence.request, tokens, chunk_tokens)

    def _blocks_promised(self, sequence: Sequence) -> int:
        """Free blocks that a running sequence may soon take."""
        return max(0, self._blocks_soon(sequence) - sequence.running_cache.held_blocks)

    def _blocks_at_most(self, request: SequenceRequest, tokens: int, chunk_tokens: int) -> int:
        return blocks_at_most(self.geometry, self._groups[request.shared_layers], tokens, chunk_tokens)

    def _start(self, sequence: Sequence) -> None:
        del self._waiting[sequence.request.sequence_id]
        depth = sequence.request.shared_layers
        sequence.start(SequenceCache(self.geometry, self.plan, self.pool, self.tables, depth))
        self._running[sequence.request.sequence_id] = sequence

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Reserves blocks, preempting from the last arrival down; False if the sequence itself had to give way.

        Those that give way come after the sequence, so none of them has a chunk in this step yet.
        """
        while not sequence.running_cache.grow(tokens):
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence_id = sequence.request.sequence_id
        sequence.give_way()
        del self._running[sequence_id]
        self._waiting[sequence_id] = sequence
        self._waiting.move_to_end(sequence_id, last=False)

    def _end(self, sequence_id: SequenceId, reason: FinishReason) -> SequenceFinished | None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return None
        report = sequence.report(self.geometry)
        del (self._waiting if sequence.state is SequenceState.WAITING else self._running)[sequence_id]
        sequence.finish()
        return SequenceFinished(sequence_id, reason, report)
