"""A real engine process with the fake engine in it, behind a handle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kvfold_server.channel.front_end import EngineHandle
from kvfold_server.channel.supervisor import EngineSupervisor, SupervisionPolicy
from kvfold_server.engine.options import EngineOptions
from kvfold_server.generation.request import GenerationRequest, SamplingParameters

if TYPE_CHECKING:
    from pathlib import Path

QUICK = SupervisionPolicy(heartbeat_timeout=5.0, step_timeout=5.0, first_delay=0.05, exit_timeout=1.0)


@dataclass
class RunningEngine:
    """A supervised engine process. `ready` and `lost` wait for a change of its state."""

    handle: EngineHandle
    supervisor: EngineSupervisor
    changed: asyncio.Event

    async def until(self, *, ready: bool) -> None:
        while self.handle.ready is not ready:
            self.changed.clear()
            await self.changed.wait()

    @property
    def process_id(self) -> int:
        assert self.supervisor.process_id is not None
        return self.supervisor.process_id

    def request(self, prompt: list[int], max_tokens: int = 16, **fields: object) -> GenerationRequest:
        return GenerationRequest(
            request_id=self.handle.new_request_id(),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParameters(),
            max_tokens=max_tokens,
            **fields,  # type: ignore[arg-type]
        )


StartEngine = Callable[..., contextlib.AbstractAsyncContextManager[RunningEngine]]


@pytest.fixture
def start_engine(fake_factory: str) -> StartEngine:
    @contextlib.asynccontextmanager
    async def start(
        folder: Path, policy: SupervisionPolicy = QUICK, **options: int | None
    ) -> AsyncIterator[RunningEngine]:
        changed = asyncio.Event()
        handle = EngineHandle("fake", on_ready_changed=changed.set)
        engine_options = EngineOptions(model=str(folder), **options)  # type: ignore[arg-type]
        supervisor = EngineSupervisor(handle, engine_options, fake_factory, policy)
        task = asyncio.create_task(supervisor.run())
        engine = RunningEngine(handle, supervisor, changed)
        ready = asyncio.create_task(engine.until(ready=True))
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield engine
        finally:
            ready.cancel()
            task.cancel()
            await asyncio.gather(task, ready, return_exceptions=True)

    return start
