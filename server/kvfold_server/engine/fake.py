"""An engine without a model, for tests of everything around it: the real core and scheduler, hashes for tokens.

It says what it is to be in `fake_engine.json`, beside the tokenizer files of the folder that stands for a model.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.scheduler import Scheduler, SchedulerLimits
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_server.engine.core import EngineCore
from kvfold_server.engine.prompt_logprobs import PromptLogprobs
from kvfold_server.generation.events import PositionLogprobs, TokenLogprob
from kvfold_server.generation.model_info import DepthQuality, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvfold_scheduler.sequence import SequenceId
    from kvfold_scheduler.step_plan import StepPlan
    from kvfold_server.engine.options import EngineOptions
    from kvfold_server.engine.runner import Runner
    from kvfold_server.engine.runner_sequence import PositionScorer, RunnerSequence
    from kvfold_server.engine.stages import Stages
    from kvfold_server.generation.events import EngineEvent
    from kvfold_server.generation.request import GenerationRequest

SETTINGS_FILE = "fake_engine.json"


class FakeLoadError(Exception):
    """What the settings asked for: a model that cannot be loaded."""


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """What a fake engine is to be.

    A prompt that contains one of the marked tokens makes the step that reads it fail, hang, or end the process.
    Tokens are generated from `first_token` on, `generated_tokens` different ones.
    """

    vocabulary_size: int = 300
    first_token: int = 10
    generated_tokens: int = 80
    context_length: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    step_seconds: float = 0.0
    load_seconds: float = 0.0
    load_failure: str | None = None
    fail_token: int | None = None
    hang_token: int | None = None
    exit_token: int | None = None

    @classmethod
    def load(cls, folder: Path) -> FakeSettings:
        """Reads the settings of a folder; all defaults if it has none."""
        path = folder / SETTINGS_FILE
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        return cls(**values)


LAYERS = 4
PLAN = SharingPlan(LAYERS, (SharingEntry(sharer=3, owner=0), SharingEntry(sharer=2, owner=1)))
GEOMETRY = CacheGeometry((LayerKind(window=None, rope="fake", kv_heads=2, key_dim=16, value_dim=16),) * LAYERS, 2)


def fake_token(prompt: Sequence[int], position: int, settings: FakeSettings) -> int:
    """The token at `position` of the answer: a hash of the prompt and the position, equal in every process."""
    digest = zlib.crc32(array("Q", [*prompt, position]).tobytes())
    return settings.first_token + digest % settings.generated_tokens


def start_engine(options: EngineOptions, stages: Stages) -> FakeEngine:
    """Builds what the settings in the folder `options.model` describe. Raises FakeLoadError if they say so."""
    stages.begin("waiting")
    folder = Path(options.model)
    settings = FakeSettings.load(folder)
    time.sleep(settings.load_seconds)
    if settings.load_failure is not None:
        raise FakeLoadError(settings.load_failure)
    pool_bytes = options.kv_memory_bytes or 64 * 2**20
    limits = SchedulerLimits(options.max_running, options.max_waiting, options.step_tokens)
    block_count = pool_bytes // GEOMETRY.block_bytes
    scheduler = Scheduler(GEOMETRY, PLAN, block_count, settings.context_length, limits)
    info = ModelInfo(
        architecture="FakeForCausalLM",
        dtype=options.dtype,
        weights=options.weight_dtype,
        context_length=settings.context_length,
        vocabulary_size=settings.vocabulary_size,
        geometry=GEOMETRY,
        plan=PLAN,
        plan_strategy="fake",
        plan_quality=(DepthQuality(1, GEOMETRY.bytes_per_token * 3 // 4, perplexity=20.0, kl=0.1, quality_cost=0.105),),
        attention_backend="fake",
        eos_token_ids=frozenset(settings.eos_token_ids),
        tokenizer_folder=folder,
        pool_bytes=block_count * GEOMETRY.block_bytes,
    )
    return FakeEngine(info, scheduler, settings)


class FakeEngine(EngineCore):
    """The real core around a runner that computes nothing."""

    def __init__(self, info: ModelInfo, scheduler: Scheduler, settings: FakeSettings) -> None:
        super().__init__(info, scheduler, cast("Runner", FakeRunner(settings)))

    def submit(self, request: GenerationRequest, scorer: PositionScorer | None = None) -> list[EngineEvent]:
        """Takes a request; the log-probabilities of its prompt are made up as well."""
        if scorer is None and request.prompt_logprobs is not None:
            scorer = FakePromptLogprobs(request.prompt_token_ids, request.prompt_logprobs)
        return super().submit(request, scorer)


@dataclass(frozen=True, slots=True)
class FakeToken:
    """As `kvfold_server.engine.runner.ChosenToken`, which only torch can import."""

    token_id: int
    logprobs: PositionLogprobs | None


class FakeRunner:
    """Chooses tokens by hashing; waits as long as a step is to take."""

    def __init__(self, settings: FakeSettings) -> None:
        self._settings = settings

    def execute(self, plan: StepPlan, sequences: Mapping[SequenceId, RunnerSequence]) -> dict[SequenceId, FakeToken]:
        """The next token of every sampling chunk."""
        time.sleep(self._settings.step_seconds)
        chosen: dict[SequenceId, FakeToken] = {}
        for chunk in plan.chunks:
            sequence = sequences[chunk.sequence_id]
            prompt = sequence.request.prompt_token_ids
            self._obey(prompt)
            if chunk.samples:
                token_id = fake_token(prompt, len(sequence.answer), self._settings)
                alternatives = sequence.request.logprobs
                logprobs = None if alternatives is None else fake_logprobs(token_id, alternatives)
                chosen[chunk.sequence_id] = FakeToken(token_id, logprobs)
        return chosen

    def _obey(self, prompt: Sequence[int]) -> None:
        settings = self._settings
        if settings.fail_token in prompt:
            raise RuntimeError("the prompt asked for a failure")
        if settings.exit_token in prompt:
            os._exit(3)
        while settings.hang_token in prompt:
            time.sleep(1)


class FakePromptLogprobs(PromptLogprobs):
    """Made-up log-probabilities of a prompt, ready with the first token."""

    def __init__(self, prompt: tuple[int, ...], top_count: int) -> None:
        super().__init__(prompt, top_count)
        self._entries = [fake_logprobs(token_id, top_count) for token_id in prompt[1:]]


def fake_logprobs(token_id: int, alternatives: int) -> PositionLogprobs:
    """Made-up log-probabilities: the token's own follows from its id, each alternative is half as probable."""
    logprob = -(token_id % 8) / 8
    top = tuple(TokenLogprob(token_id + rank, logprob - rank) for rank in range(alternatives))
    return PositionLogprobs(TokenLogprob(token_id, logprob), top)
