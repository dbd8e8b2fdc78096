"""Domain types to and from the `kvfold.v1` messages that the public API and the engine channel have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
from kvfold_server.generation.events import MemoryReport, PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import LayerKind
    from kvfold_server.generation.model_info import ModelInfo


def encode_position(position: PositionLogprobs) -> generation_pb2.PositionLogprobs:
    """The log-probabilities at one position as a message."""
    message = generation_pb2.PositionLogprobs()
    message.token.token_id = position.token.token_id
    message.token.logprob = position.token.logprob
    for entry in position.top:
        message.top.add(token_id=entry.token_id, logprob=entry.logprob)
    return message


def decode_position(message: generation_pb2.PositionLogprobs) -> PositionLogprobs:
    """Reads what `encode_position` wrote."""
    return PositionLogprobs(
        TokenLogprob(message.token.token_id, message.token.logprob),
        tuple([TokenLogprob(entry.token_id, entry.logprob) for entry in message.top]),
    )


def encode_report(report: MemoryReport) -> memory_pb2.MemoryReport:
    """What was done with a request's KV cache as a message."""
    return memory_pb2.MemoryReport(
        shared_layers=report.shared_layers,
        kv_bytes_held=report.kv_bytes_held,
        kv_bytes_full=report.kv_bytes_full,
        kv_bytes_saved=report.kv_bytes_saved,
        kv_bytes_held_peak=report.kv_bytes_held_peak,
        preemptions=report.preemptions,
    )


def decode_report(message: memory_pb2.MemoryReport) -> MemoryReport:
    """Reads what `encode_report` wrote."""
    return MemoryReport(
        shared_layers=message.shared_layers,
        kv_bytes_held=message.kv_bytes_held,
        kv_bytes_full=message.kv_bytes_full,
        kv_bytes_held_peak=message.kv_bytes_held_peak,
        preemptions=message.preemptions,
    )


def describe_model(info: ModelInfo) -> model_pb2.GetModelResponse:
    """A model as the API describes it; the name is left empty. A plan without entries is left out."""
    message = model_pb2.GetModelResponse(
        architecture=info.architecture,
        dtype=info.dtype,
        weights=info.weights,
        context_length=info.context_length,
        vocabulary_size=info.vocabulary_size,
        layers=[_encode_layer(kind) for kind in info.geometry.layers],
        kv_bytes_per_token=info.geometry.bytes_per_token,
        attention_backend=info.attention_backend,
    )
    if info.plan.entries:
        message.plan.strategy = info.plan_strategy
        for entry in info.plan.entries:
            message.plan.entries.add(sharer=entry.sharer, owner=entry.owner)
        for quality in info.plan_quality:
            message.plan.depths.add(
                shared_layers=quality.shared_layers,
                kv_bytes_per_token=quality.kv_bytes_per_token,
                perplexity=quality.perplexity,
                kl=quality.kl,
                quality_cost=quality.quality_cost,
            )
    return message


def _encode_layer(kind: LayerKind) -> model_pb2.Layer:
    return model_pb2.Layer(
        attention=model_pb2.ATTENTION_TYPE_FULL if kind.window is None else model_pb2.ATTENTION_TYPE_SLIDING,
        window=kind.window or 0,
        kv_heads=kind.kv_heads,
        key_dim=kind.key_dim,
        value_dim=kind.value_dim,
    )
