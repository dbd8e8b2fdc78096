"""The engine: the only caller of `Scheduler.step` and `Runner.execute`."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from kvfold_scheduler.scheduler import Admission
from kvfold_scheduler.sequence import FinishReason, SequenceId, SequenceReport, SequenceRequest
from kvfold_scheduler.step_plan import SequenceFinished, StepPlan, StepResult
from kvfold_server.engine.prompt_logprobs import PromptLogprobs
from kvfold_server.engine.runner_sequence import PositionScorer, RunnerSequence
from kvfold_server.generation.events import (
    EngineEvent,
    FinishCause,
    MemoryReport,
    PromptScored,
    RequestFinished,
    TokenGenerated,
)
from kvfold_server.generation.pool_snapshot import PoolSnapshot
from kvfold_server.generation.request import RequestId

if TYPE_CHECKING:
    from kvfold_scheduler.scheduler import Scheduler
    from kvfold_server.engine.runner import ChosenToken, Runner
    from kvfold_server.generation.model_info import ModelInfo
    from kvfold_server.generation.request import GenerationRequest

logger = logging.getLogger(__name__)

CAUSES = {
    FinishReason.STOPPED: FinishCause.STOP_TOKEN,
    FinishReason.LENGTH: FinishCause.LENGTH,
    FinishReason.CANCELLED: FinishCause.CANCELLED,
    FinishReason.FAILED: FinishCause.INTERNAL_ERROR,
}


class EngineCore:
    """Serves requests of one model, step by step. Not thread-safe; requests were validated by the caller.

    An error in one request never ends another: a step that raises is split until the culprit stands alone.
    """

    def __init__(self, info: ModelInfo, scheduler: Scheduler, runner: Runner) -> None:
        self.info = info
        self.scheduler = scheduler
        self._runner = runner
        self._sequences: dict[SequenceId, RunnerSequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    def submit(self, request: GenerationRequest, scorer: PositionScorer | None = None) -> list[EngineEvent]:
        """Takes a request. Returns its end at once if it is refused, else nothing.

        A `scorer` sees the logits of the request's known tokens; it replaces `request.prompt_logprobs`.
        """
        sequence_id = SequenceId(request.request_id)
        sequence_request = SequenceRequest(
            sequence_id=sequence_id,
            prompt_tokens=len(request.prompt_token_ids),
            max_new_tokens=request.max_tokens,
            shared_layers=request.shared_layers,
        )
        match self.scheduler.add(sequence_request):
            case Admission.QUEUE_FULL:
                return [_refused(request, FinishCause.QUEUE_FULL)]
            case Admission.TOO_LARGE:
                needed = self.scheduler.blocks_needed(sequence_request) * self.scheduler.geometry.block_bytes
                return [_refused(request, FinishCause.TOO_LARGE, needed)]
            case Admission.WAITING:
                if scorer is None and request.prompt_logprobs is not None:
                    scorer = PromptLogprobs(request.prompt_token_ids, request.prompt_logprobs)
                self._sequences[sequence_id] = RunnerSequence(request, scorer)
                return []

    def cancel(self, request_id: RequestId) -> list[EngineEvent]:
        """Ends a request and frees its blocks at once. Returns its end; nothing if it has ended already."""
        finished = self.scheduler.cancel(SequenceId(request_id))
        return [] if finished is None else [self._finish(finished)]

    def step(self) -> list[EngineEvent]:
        """Plans, computes and commits one step, and returns what it brought, in the order in which it may be sent."""
        plan = self.scheduler.step()
        chosen, failed = self._execute(plan)
        broken = {sequence_id for sequence_id, token in chosen.items() if token.token_id is None}
        done = plan.subset({chunk.sequence_id for chunk in plan.chunks} - failed - broken)
        events: list[EngineEvent] = []
        stopped: set[SequenceId] = set()
        for chunk in done.chunks:
            if chunk.samples:
                events.extend(self._accept(chunk.sequence_id, chosen[chunk.sequence_id], stopped))
        finished = list(self.scheduler.commit(done, StepResult(frozenset(stopped))))
        events.extend(self._finish(end) for end in finished)
        events.extend(self._fail(sequence_id) for sequence_id in sorted(failed | broken))
        return events

    def snapshot(self) -> PoolSnapshot:
        """The state of the pool between two steps."""
        use = self.scheduler.use()
        block_bytes = self.scheduler.geometry.block_bytes
        return PoolSnapshot(
            pool_bytes=self.scheduler.pool.block_count * block_bytes,
            free_bytes=use.free_blocks * block_bytes,
            prefill_bytes=use.prefill_blocks * block_bytes,
            decode_bytes=use.decode_blocks * block_bytes,
            running_requests=use.running,
            waiting_requests=use.waiting,
            kv_bytes_full=use.kv_bytes_full,
        )

    def _execute(self, plan: StepPlan) -> tuple[dict[SequenceId, ChosenToken], set[SequenceId]]:
        """Computes a plan; one that raises is computed in halves. Returns the tokens, and the sequences that cannot be
        computed."""
        if not plan.chunks:
            return {}, set()
        try:
            return self._runner.execute(plan, self._sequences), set()
        except Exception:
            ids = [chunk.sequence_id for chunk in plan.chunks]
            if len(ids) == 1:
                logger.exception("request %d cannot be computed", ids[0])
                return {}, set(ids)
            half = len(ids) // 2
            tokens, failed = self._execute(plan.subset(ids[:half]))
            more_tokens, more_failed = self._execute(plan.subset(ids[half:]))
            return tokens | more_tokens, failed | more_failed

    def _accept(self, sequence_id: SequenceId, chosen: ChosenToken, stopped: set[SequenceId]) -> list[EngineEvent]:
        sequence = self._sequences[sequence_id]
        token_id = chosen.token_id
        if token_id is None:
            raise ValueError("a broken token is not accepted")
        sequence.answer.append(token_id)
        if token_id in sequence.request.stop_token_ids:
            stopped.add(sequence_id)
        events: list[EngineEvent] = []
        if isinstance(sequence.scorer, PromptLogprobs):
            entries = sequence.scorer.take()
            if entries is not None:
                events.append(PromptScored(sequence.request.request_id, entries))
        events.append(TokenGenerated(sequence.request.request_id, token_id, chosen.logprobs))
        return events

    def _finish(self, finished: SequenceFinished) -> RequestFinished:
        del self._sequences[finished.sequence_id]
        return RequestFinished(
            RequestId(finished.sequence_id), CAUSES[finished.reason], _memory_report(finished.report)
        )

    def _fail(self, sequence_id: SequenceId) -> RequestFinished:
        finished = self.scheduler.fail(sequence_id)
        if finished is None:
            raise KeyError(sequence_id)
        del self._sequences[sequence_id]
        error_id = secrets.token_hex(8)
        logger.error("request %d failed; error id %s", sequence_id, error_id)
        return RequestFinished(
            RequestId(sequence_id), FinishCause.INTERNAL_ERROR, _memory_report(finished.report), error_id=error_id
        )


def _refused(request: GenerationRequest, cause: FinishCause, bytes_needed: int = 0) -> RequestFinished:
    report = MemoryReport(request.shared_layers, kv_bytes_held=0, kv_bytes_full=0, kv_bytes_held_peak=0)
    return RequestFinished(request.request_id, cause, report, bytes_needed=bytes_needed)


def _memory_report(report: SequenceReport) -> MemoryReport:
    return MemoryReport(
        shared_layers=report.shared_layers,
        kv_bytes_held=report.kv_bytes_held,
        kv_bytes_full=report.kv_bytes_full,
        kv_bytes_held_peak=report.kv_bytes_held_peak,
        preemptions=report.preemptions,
    )
