"""Drives scheduler and patched model step by step, greedily, in a hostile arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold_scheduler.scheduler import Admission, Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import SequenceId, SequenceRequest
from kvfold_scheduler.step_plan import StepPlan, StepResult
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.backends.registry import BACKENDS
from kvfold_server.kv.step_batch import StepBatch, make_step_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_server.models.patched import PatchedModel


@dataclass(frozen=True)
class Job:
    """A prompt, the depth at which it runs, and how many tokens are wanted."""

    prompt: Sequence[int]
    depth: int
    count: int


class StepDriver:
    """An engine in 40 lines. Every block that nobody holds is full of NaN, at each step."""

    def __init__(
        self,
        model: PatchedModel,
        plan: SharingPlan,
        *,
        blocks: int = 400,
        step_tokens: int = 24,
        max_running: int = 8,
        backend: str = ReferenceBackend.name,
    ) -> None:
        self.model = model
        self.plan = plan
        limits = SchedulerLimits(max_running=max_running, max_waiting=256, step_tokens=step_tokens)
        self.scheduler = Scheduler(model.geometry, plan, blocks, model.context_length, limits)
        self.arena = Arena(model.geometry, blocks, model.dtype, model.device)
        self.arena.fill(float("nan"))
        tables = torch.frombuffer(self.scheduler.tables.entries, dtype=torch.int32)
        shape = (max_running, model.geometry.layer_count, self.scheduler.tables.blocks_per_layer)
        model.attach(BACKENDS[backend](self.arena, tables.view(shape)))

    def run(
        self, jobs: Sequence[Job], after_step: Callable[[StepPlan, StepBatch], None] = lambda plan, batch: None
    ) -> list[list[int]]:
        """The tokens that each job generated. Calls `after_step` before each commit."""
        known = {SequenceId(index): list(job.prompt) for index, job in enumerate(jobs)}
        for index, job in enumerate(jobs):
            request = SequenceRequest(SequenceId(index), len(job.prompt), job.count, job.depth)
            assert self.scheduler.add(request) is Admission.WAITING
        while self.scheduler.has_work:
            plan = self.scheduler.step()
            batch = make_step_batch(plan, self.plan, self.model.device)
            tokens = []
            for chunk in plan.chunks:
                tokens.extend(known[chunk.sequence_id][chunk.start : chunk.start + chunk.count])
            sampling = [chunk.sequence_id for chunk in plan.chunks if chunk.samples]
            ends = [stop - 1 for stop, chunk in zip(batch.query_starts[1:], plan.chunks, strict=True) if chunk.samples]
            logits = self.model.forward(torch.tensor(tokens), batch, torch.tensor(ends, dtype=torch.int64))
            assert logits.shape == (len(ends), self.model.vocabulary_size)
            assert logits.isfinite().all()
            for sequence_id, row in zip(sampling, logits, strict=True):
                known[sequence_id].append(int(row.argmax()))
            after_step(plan, batch)
            self.scheduler.commit(plan, StepResult(frozenset()))
            self.scheduler.check_integrity()
            self._poison_free_blocks()
        assert self.scheduler.pool.held_count == 0
        return [known[SequenceId(index)][len(job.prompt) :] for index, job in enumerate(jobs)]

    def _poison_free_blocks(self) -> None:
        size = self.model.geometry.tokens_per_block
        for block in range(1, self.scheduler.pool.block_count + 1):
            if self.scheduler.pool.readers(block) == 0:
                self.arena.rows[block * size : (block + 1) * size] = float("nan")
