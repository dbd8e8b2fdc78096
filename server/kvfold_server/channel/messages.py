"""What the two sides of the channel say to each other, in domain types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold_server.generation.request import GenerationRequest

if TYPE_CHECKING:
    from kvfold_server.generation.events import EngineEvent
    from kvfold_server.generation.model_info import ModelInfo
    from kvfold_server.generation.pool_snapshot import PoolSnapshot
    from kvfold_server.generation.request import RequestId


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The front end wants a request to end."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine has loaded its model and takes requests."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The engine cannot serve its model; `reason` is for an operator."""

    reason: str


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought, in order; `snapshot` is the pool after it, if it is worth telling."""

    events: tuple[EngineEvent, ...]
    snapshot: PoolSnapshot | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life. `busy_seconds` is how long the step that is being computed has taken so far."""

    snapshot: PoolSnapshot | None
    busy_seconds: float


FrontEndMessage = GenerationRequest | CancelRequest
EngineMessage = EngineReady | LoadFailed | StepOutput | Heartbeat
