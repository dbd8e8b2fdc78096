"""Whole engines for tests, and their oracle."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from support.tiny_models import ARCHITECTURES, tiny_model, tiny_plan

from kvfold_server.engine.factory import assemble_engine
from kvfold_server.engine.options import EngineOptions
from kvfold_server.generation.events import EngineEvent, PromptScored, RequestFinished, TokenGenerated
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters
from kvfold_server.models.patching import patch_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedModel

    from kvfold_server.engine.core import EngineCore

GREEDY = SamplingParameters(temperature=0.0)


@dataclass(frozen=True)
class EnginePair:
    """An engine, and the untouched model with the same weights."""

    engine: EngineCore
    original: PreTrainedModel


def tiny_engine(architecture: str = "llama", *, kv_memory_bytes: int = 4 << 20, **options: int) -> EnginePair:
    """An engine of a tiny random fp32 model with a sharing plan."""
    original = tiny_model(ARCHITECTURES[architecture]())
    model = patch_model(copy.deepcopy(original))
    bounds = {"max_running": 8, "max_waiting": 64, "step_tokens": 24, **options}
    engine_options = EngineOptions("tiny", dtype="float32", kv_memory_bytes=kv_memory_bytes, **bounds)
    return EnginePair(assemble_engine(model, Path(), tiny_plan(model.geometry), engine_options), original)


def make_request(request_id: int, prompt: Sequence[int], max_tokens: int = 8, **options: object) -> GenerationRequest:
    """A greedy request unless `options` say otherwise."""
    fields = {"sampling": GREEDY, **options}
    return GenerationRequest(RequestId(request_id), tuple(prompt), max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


@dataclass
class Outcome:
    """What an engine said about one request."""

    tokens: list[int]
    generated: list[TokenGenerated]
    prompt: PromptScored | None = None
    finished: RequestFinished | None = None


def collect(events: Iterable[EngineEvent], outcomes: defaultdict[int, Outcome]) -> None:
    """Sorts events by request, and checks that nothing follows the end of one."""
    for event in events:
        outcome = outcomes[event.request_id]
        assert outcome.finished is None, "an event follows the end of its request"
        match event:
            case TokenGenerated():
                outcome.tokens.append(event.token_id)
                outcome.generated.append(event)
            case PromptScored():
                assert not outcome.tokens
                outcome.prompt = event
            case RequestFinished():
                outcome.finished = event


def new_outcomes() -> defaultdict[int, Outcome]:
    """An empty collection of outcomes."""
    return defaultdict(lambda: Outcome([], []))


def run_to_end(engine: EngineCore, requests: Iterable[GenerationRequest]) -> defaultdict[int, Outcome]:
    """Submits all requests and steps until nothing is left; checks the ledger after each step."""
    outcomes = new_outcomes()
    for request in requests:
        collect(engine.submit(request), outcomes)
    while engine.has_work:
        collect(engine.step(), outcomes)
        engine.scheduler.check_integrity()
    assert engine.scheduler.pool.held_count == 0
    return outcomes


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers generates greedily, alone."""
    tokens = torch.tensor([list(prompt)])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()
