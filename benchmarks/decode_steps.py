"""An engine in the middle of its work: so many sequences decode, each with so much context."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from kvfold_server.engine.factory import build_engine
from kvfold_server.engine.options import EngineOptions
from kvfold_server.generation.events import TokenGenerated
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

if TYPE_CHECKING:
    from pathlib import Path

    from kvfold_server.engine.core import EngineCore

FILL_TOKENS = 4096
"""Tokens of a step while prompts are computed: large, so that the first sequence is little ahead of the last."""

UNTIMED_STEPS = 3
"""Steps after the prompts, until buffers have their sizes."""


class DecodeSteps:
    """Times decode steps of one engine in bf16. One set of sequences at a time: `fill`, `time_step`..., `clear`."""

    def __init__(self, model_folder: Path, attention_backend: str, kv_memory_bytes: int) -> None:
        self.engine: EngineCore = build_engine(
            EngineOptions(
                model=str(model_folder),
                kv_memory_bytes=kv_memory_bytes,
                step_tokens=FILL_TOKENS,
                attention_backend=attention_backend,
            )
        )
        self._random = random.Random(0)
        self._running: list[RequestId] = []

    @property
    def kv_bytes(self) -> int:
        """KV bytes that a step reads at depth 0; at any other, a sharer reads its owner's, which is as much."""
        return self.engine.snapshot().kv_bytes_full

    def fill(self, batch: int, context: int, steps: int, depth: int = 0) -> None:
        """Brings `batch` sequences to about `context` tokens in the middle of the next `steps` steps.

        Raises ValueError if that exceeds the model's context or the KV memory.
        """
        ahead = batch * context // FILL_TOKENS + UNTIMED_STEPS + 2
        prompt_tokens = min(context - ahead - steps // 2, self.engine.info.context_length - 2 * ahead - steps)
        vocabulary = range(self.engine.info.vocabulary_size)
        self._running = [RequestId(index) for index in range(batch)]
        for request_id in self._running:
            request = GenerationRequest(
                request_id,
                tuple(self._random.choices(vocabulary, k=max(1, prompt_tokens))),
                SamplingParameters(temperature=0.0),
                max_tokens=2 * ahead + steps,
                shared_layers=depth,
            )
            if self.engine.submit(request):
                raise ValueError(f"the KV memory is too small for {batch} sequences of {context} tokens")
        started: set[RequestId] = set()
        while len(started) < batch:
            started.update(event.request_id for event in self.engine.step() if isinstance(event, TokenGenerated))
        for _ in range(UNTIMED_STEPS):
            self.time_step()

    def time_step(self) -> float:
        """Seconds of one step in which every sequence decodes. Raises RuntimeError if one did not."""
        start = time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - start
        if sum(isinstance(event, TokenGenerated) for event in events) != len(self._running):
            raise RuntimeError("not every sequence decoded in this step")
        return seconds

    def clear(self) -> None:
        """Ends all sequences."""
        for request_id in self._running:
            self.engine.cancel(request_id)
        self._running = []
