"""The runner: computes a step plan with the model, and chooses tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold_server.engine.logprobs import position_logprobs
from kvfold_server.engine.sampling import SamplingRow, choose_tokens
from kvfold_server.kv.step_batch import make_step_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvfold_scheduler.sequence import SequenceId
    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_scheduler.step_plan import Chunk, StepPlan
    from kvfold_server.engine.runner_sequence import RunnerSequence
    from kvfold_server.generation.events import PositionLogprobs
    from kvfold_server.models.patched import PatchedModel


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """The next token of a sequence; `token_id` is None where the logits were not numbers."""

    token_id: int | None
    logprobs: PositionLogprobs | None = None


@dataclass(frozen=True, slots=True)
class _LogitRows:
    """Which logits of a chunk are wanted: `count` of them, from position `start`; and where they lie among all wanted
    ones."""

    chunk: Chunk
    start: int
    offset: int
    count: int


class Runner:
    """Computes plans. It keeps nothing between steps: sequences and pool belong to its caller."""

    def __init__(self, model: PatchedModel, sharing: SharingPlan, device: torch.device) -> None:
        self._model = model
        self._sharing = sharing
        self._device = device

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sequences: Mapping[SequenceId, RunnerSequence]) -> dict[SequenceId, ChosenToken]:
        """Writes the KV of the plan's tokens into the arena and returns the next token of every sampling chunk.

        Raises whatever the model raises; then no sequence has changed, and the plan, or a part of it, can be computed
        again.
        """
        batch = make_step_batch(plan, self._sharing, self._device)
        tokens: list[int] = []
        wanted: list[_LogitRows] = []
        packed_rows: list[int] = []
        for chunk, packed_start in zip(plan.chunks, batch.query_starts, strict=False):
            sequence = sequences[chunk.sequence_id]
            tokens.extend(sequence.tokens(chunk.start, chunk.count))
            stop = chunk.start + chunk.count
            first = stop - 1 if chunk.samples else stop
            if sequence.scorer is not None:
                first = min(first, max(chunk.start, sequence.scorer.first_position))
            if first < stop:
                wanted.append(_LogitRows(chunk, first, len(packed_rows), stop - first))
                packed_rows.extend(range(packed_start + first - chunk.start, packed_start + chunk.count))
        logits = self._model.forward(self._indices(tokens), batch, self._indices(packed_rows))
        for rows in wanted:
            scorer = sequences[rows.chunk.sequence_id].scorer
            if scorer is not None:
                scorer.score(rows.start, logits[rows.offset : rows.offset + rows.count])
        return self._choose(logits, [rows for rows in wanted if rows.chunk.samples], sequences)

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _choose(
        self, logits: torch.Tensor, sampling: list[_LogitRows], sequences: Mapping[SequenceId, RunnerSequence]
    ) -> dict[SequenceId, ChosenToken]:
        if not sampling:
            return {}
        last = [rows.offset + rows.count - 1 for rows in sampling]
        if last != list(range(logits.shape[0])):
            logits = logits[self._indices(last)]
        members = [sequences[rows.chunk.sequence_id] for rows in sampling]
        tokens = choose_tokens(
            logits, [SamplingRow(member.request.sampling, member.prompt, member.answer) for member in members]
        )
        chosen: dict[SequenceId, ChosenToken] = {}
        for index, (rows, member, token) in enumerate(zip(sampling, members, tokens, strict=True)):
            logprobs = None
            if token is not None and member.request.logprobs is not None:
                logprobs = position_logprobs(logits[index : index + 1], [token], member.request.logprobs)[0]
            chosen[rows.chunk.sequence_id] = ChosenToken(token, logprobs)
        return chosen
