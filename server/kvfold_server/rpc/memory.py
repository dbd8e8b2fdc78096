"""MemoryService."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from kvfold.v1 import memory_pb2, memory_pb2_grpc
from kvfold_server.generation.errors import DrainingError, InvalidRequestError
from kvfold_server.rpc import conversion

if TYPE_CHECKING:
    import grpc

    from kvfold_server.rpc.gate import Gate
    from kvfold_server.rpc.hosted_model import HostedModels

    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_INTERVAL = 1.0
MIN_INTERVAL = 0.1
MAX_INTERVAL = 86_400.0
"""A day.

Longer ones are asked for by mistake, and the largest that a message can hold is no time that a clock can wait.
"""


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Shows the pools. Answers from the latest report of each engine, so it never waits for a step."""

    def __init__(self, models: HostedModels, gate: Gate) -> None:
        self._models = models
        self._gate = gate

    async def GetMemory(  # noqa: N802, gRPC's names
        self, request: memory_pb2.GetMemoryRequest, _context: Context
    ) -> memory_pb2.GetMemoryResponse:
        """The pools now."""
        models = self._models.select(request.model)
        return memory_pb2.GetMemoryResponse(models=map(conversion.model_memory, models))

    async def WatchMemory(  # type: ignore[override]  # noqa: N802
        self, request: memory_pb2.WatchMemoryRequest, context: Context
    ) -> None:
        """The pools at once and after each interval, until the client cancels or the server drains."""
        models = self._models.select(request.model)
        interval = _interval(request)
        while not self._gate.closed.is_set():
            await context.write(memory_pb2.WatchMemoryResponse(models=map(conversion.model_memory, models)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gate.closed.wait(), interval)
        raise DrainingError


def _interval(request: memory_pb2.WatchMemoryRequest) -> float:
    if not request.HasField("interval"):
        return DEFAULT_INTERVAL
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if not MIN_INTERVAL <= seconds <= MAX_INTERVAL:
        raise InvalidRequestError("interval", f"must be {MIN_INTERVAL} s to {MAX_INTERVAL:.0f} s")
    return seconds
