"""What one step computes, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvfold_scheduler.block_tables import Row
    from kvfold_scheduler.sequence import FinishReason, SequenceId, SequenceReport


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, to be computed in this step.

    The blocks for them are reserved in the tables of `row`. If `samples`, the chunk ends at the last known token and
    the next one is chosen from its logits.
    """

    sequence_id: SequenceId
    row: Row
    depth: int
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One batch. `chunks` are ordered by depth, ascending: at each layer the owners are a prefix of the tokens."""

    chunks: tuple[Chunk, ...]

    @property
    def token_count(self) -> int:
        """Tokens that the step computes."""
        return sum(chunk.count for chunk in self.chunks)

    def subset(self, sequence_ids: Collection[SequenceId]) -> StepPlan:
        """The same plan for some of its sequences; their blocks stay reserved."""
        return StepPlan(tuple(chunk for chunk in self.chunks if chunk.sequence_id in sequence_ids))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan: the sequences that chose a stop token. Every sampling chunk brought exactly one token."""

    stopped: frozenset[SequenceId]


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """A sequence ended; its blocks are free."""

    sequence_id: SequenceId
    reason: FinishReason
    report: SequenceReport
