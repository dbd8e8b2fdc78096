"""A workload on the engine alone: no server, no network."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvfold_server.bench.measurement import Measurement, Workload, measured
from kvfold_server.generation.events import FinishCause, RequestFinished, TokenGenerated
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.engine.core import EngineCore


def run_engine(engine: EngineCore, workload: Workload, prompts: Sequence[Sequence[int]], name: str) -> Measurement:
    """Submits all prompts at once and generates greedily to the full length."""
    times: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        request = GenerationRequest(
            request_id=RequestId(index),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParameters(temperature=0.0),
            max_tokens=workload.new_tokens,
        )
        if engine.submit(request):
            raise ValueError("the engine refused a request of the benchmark: its KV memory or its queue is too small")
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, TokenGenerated):
                times[event.request_id].append(now)
            elif isinstance(event, RequestFinished) and event.cause is not FinishCause.LENGTH:
                raise RuntimeError(f"a request of the benchmark ended with {event.cause.value}")
    return measured(name, workload, start, times)
