"""The whole server with the fake engine, in this process; a channel to it; and what comes back when a call fails."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from kvfold.v1 import generation_pb2, generation_pb2_grpc, memory_pb2_grpc, model_pb2_grpc
from kvfold_server.application import Application
from kvfold_server.channel.supervisor import SupervisionPolicy
from kvfold_server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

QUICK = SupervisionPolicy(heartbeat_timeout=5.0, step_timeout=5.0, first_delay=0.05, exit_timeout=1.0)


@dataclass
class Served:
    """A server, a channel to it, and stubs. `address` is what clients connect to."""

    application: Application
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.memory = memory_pb2_grpc.MemoryServiceStub(self.channel)

    @property
    def address(self) -> str:
        return self.application.address

    @property
    def handle(self) -> Any:
        return self.application.models.all[0].handle

    async def stream(self, **fields: Any) -> list[generation_pb2.GenerateStreamResponse]:
        request = generation_pb2.GenerateStreamRequest(**fields)
        return [response async for response in self.generation.GenerateStream(request)]

    async def until_idle(self) -> None:
        """Until the engine holds no blocks and runs nothing, as its own report says."""
        async with asyncio.timeout(10):
            while True:
                snapshot = self.handle.snapshot
                if snapshot is not None and snapshot.free_bytes == snapshot.pool_bytes and not self.handle.open_streams:
                    return
                await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Failure:
    """A failed call: its code and its details by type."""

    code: grpc.StatusCode
    message: str
    details: Mapping[str, Any]

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)

    @property
    def field(self) -> str:
        return str(self.details["BadRequest"].field_violations[0].field)


DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
)


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status.ParseFromString(value)
            assert status.code == error.code().value[0]
            assert status.message == error.details()
    details = {}
    for packed in status.details:
        for kind in DETAILS:
            if packed.Is(kind.DESCRIPTOR):
                details[kind.__name__] = kind.FromString(packed.value)
    return Failure(error.code(), error.details() or "", details)


@pytest.fixture
def failing() -> Callable[[Awaitable[Any]], Awaitable[Failure]]:
    """Awaits a call that has to fail, and returns how."""

    async def wait(call: Awaitable[Any]) -> Failure:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return failure_of(caught.value)

    return wait


@pytest.fixture
def serve(fake_factory: str) -> Callable[..., contextlib.AbstractAsyncContextManager[Served]]:
    """Serves model folders by their names; keywords are those of ServerSettings and, for all models, ModelSettings."""

    @contextlib.asynccontextmanager
    async def start(
        *folders: Path, wait: bool = True, model: Mapping[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[Served]:
        models = [{"source": str(folder)} | dict(model or {}) for folder in folders]
        server_settings = ServerSettings(models=models, engine_factory=fake_factory, **{"port": 0} | settings)
        async with Application(server_settings, QUICK) as application:
            if wait:
                await application.until_ready()
            async with grpc.aio.insecure_channel(application.address) as channel:
                yield Served(application, channel)

    return start
