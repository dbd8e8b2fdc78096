"""kvfold's own engine, without server and network, at depth 0."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from kvfold_server.runtime import prepare_runtime
from peers.protocol import PeerInfo, PeerOptions, PeerRequest, TokenTimes, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPE = "bfloat16"


class Kvfold:
    """An engine with the options that `kvfold serve` would give it."""

    def __init__(self, options: PeerOptions) -> None:
        prepare_runtime()
        from kvfold_server.engine.factory import build_engine  # noqa: PLC0415 - torch, after the runtime is prepared
        from kvfold_server.engine.options import EngineOptions  # noqa: PLC0415

        self.engine = build_engine(
            EngineOptions(
                model=options.model,
                dtype=DTYPE,
                kv_memory_bytes=options.kv_memory_bytes,
                attention_backend=options.attention_backend,
            )
        )
        self.info = PeerInfo(
            version("kvfold"), {"dtype": DTYPE, "attention_backend": self.engine.info.attention_backend}
        )

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """As `kvfold bench` does."""
        from kvfold_server.bench.engine_run import run_engine  # noqa: PLC0415
        from kvfold_server.bench.measurement import Workload  # noqa: PLC0415

        return run_engine(self.engine, Workload(len(prompts), len(prompts[0]), new_tokens), prompts, "kvfold").seconds

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """Submits each request when it arrives, between two steps."""
        from kvfold_server.generation.events import FinishCause, RequestFinished, TokenGenerated  # noqa: PLC0415

        first: dict[int, float] = {}
        last: dict[int, float] = {}
        following = 0
        start = time.perf_counter()
        while following < len(requests) or self.engine.has_work:
            now = time.perf_counter() - start
            while following < len(requests) and requests[following].arrival_s <= now:
                self._submit(following, requests[following])
                following += 1
            if not self.engine.has_work:
                time.sleep(requests[following].arrival_s - now)
                continue
            events = self.engine.step()
            now = time.perf_counter() - start
            for event in events:
                if isinstance(event, TokenGenerated):
                    first.setdefault(event.request_id, now)
                    last[event.request_id] = now
                elif isinstance(event, RequestFinished) and event.cause is not FinishCause.LENGTH:
                    raise RuntimeError(f"request {event.request_id} ended with {event.cause.value}")
        return [TokenTimes(first[index], last[index]) for index in range(len(requests))]

    def _submit(self, index: int, request: PeerRequest) -> None:
        from kvfold_server.generation.request import (  # noqa: PLC0415
            GenerationRequest,
            RequestId,
            SamplingParameters,
        )

        refused = self.engine.submit(
            GenerationRequest(
                RequestId(index), tuple(request.prompt), SamplingParameters(temperature=0.0), request.new_tokens
            )
        )
        if refused:
            raise RuntimeError("the engine refused a request: its KV memory or its queue is too small")


if __name__ == "__main__":
    serve(Kvfold)
