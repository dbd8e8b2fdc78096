"""All that a user imports from `kvfold_client`."""

from __future__ import annotations

from kvfold_client.async_client import AsyncClient
from kvfold_client.channel import Tls
from kvfold_client.errors import (
    AuthenticationError,
    ConflictError,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    KvfoldError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    RequestCancelledError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
    UnimplementedError,
)
from kvfold_client.generation import (
    FinishInfo,
    FinishReason,
    Generation,
    GenerationChunk,
    PositionLogprobs,
    PromptInfo,
    TokenLogprob,
    Usage,
)
from kvfold_client.memory import BlockState, MemoryReport, ModelMemory
from kvfold_client.model import (
    AttentionType,
    DepthQuality,
    Layer,
    ModelDescription,
    ModelSummary,
    SharingEntry,
    SharingPlan,
)
from kvfold_client.options import CallOptions, GenerationOptions
from kvfold_client.prompt import ChatMessage, Prompt
from kvfold_client.stream import AsyncStream, Stream
from kvfold_client.sync_client import Client

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AttentionType",
    "AuthenticationError",
    "BlockState",
    "CallOptions",
    "ChatMessage",
    "Client",
    "ConflictError",
    "DeadlineExceededError",
    "DepthQuality",
    "FieldViolation",
    "FinishInfo",
    "FinishReason",
    "Generation",
    "GenerationChunk",
    "GenerationOptions",
    "InvalidRequestError",
    "KvfoldError",
    "Layer",
    "MemoryReport",
    "ModelDescription",
    "ModelMemory",
    "ModelSummary",
    "NotFoundError",
    "PermissionDeniedError",
    "PositionLogprobs",
    "PreconditionError",
    "Prompt",
    "PromptInfo",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "ServerError",
    "SharingEntry",
    "SharingPlan",
    "Stream",
    "Tls",
    "TokenLogprob",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
