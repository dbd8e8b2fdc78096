"""What the process around an engine asks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvfold_server.engine.options import EngineOptions
    from kvfold_server.engine.stages import Stages
    from kvfold_server.generation.events import EngineEvent
    from kvfold_server.generation.model_info import ModelInfo
    from kvfold_server.generation.pool_snapshot import PoolSnapshot
    from kvfold_server.generation.request import GenerationRequest, RequestId


class Engine(Protocol):
    """Serves the requests of one model, step by step. Not thread-safe."""

    @property
    def info(self) -> ModelInfo:
        """The model."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    def submit(self, request: GenerationRequest) -> list[EngineEvent]:
        """Takes a validated request. Returns its end at once if it is refused, else nothing."""
        ...

    def cancel(self, request_id: RequestId) -> list[EngineEvent]:
        """Ends a request and frees its blocks at once. Returns its end; nothing if it has ended already."""
        ...

    def step(self) -> list[EngineEvent]:
        """Computes one step and returns what it brought, in the order in which it may be sent."""
        ...

    def snapshot(self) -> PoolSnapshot:
        """The state of the pool between two steps."""
        ...


class EngineFactory(Protocol):
    """Builds the engine of a process that has been started for it."""

    def __call__(self, options: EngineOptions, stages: Stages) -> Engine:
        """Tells `stages` where it is. What it raises is told to the operator; see `channel.process`."""
        ...
