"""From messages to results: the only file that reads responses.

A value of an enum that this client does not know (the server is newer) becomes UNSPECIFIED.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
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

if TYPE_CHECKING:
    from collections.abc import Iterable

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_BLOCK_STATES = {
    memory_pb2.BLOCK_STATE_FREE: BlockState.FREE,
    memory_pb2.BLOCK_STATE_PREFILL: BlockState.PREFILL,
    memory_pb2.BLOCK_STATE_DECODE: BlockState.DECODE,
}
_ATTENTION_TYPES = {
    model_pb2.ATTENTION_TYPE_FULL: AttentionType.FULL,
    model_pb2.ATTENTION_TYPE_SLIDING: AttentionType.SLIDING,
}


def generation(message: generation_pb2.GenerateResponse) -> Generation:
    """Reads a whole answer."""
    return Generation(
        model=message.model,
        prompt=_prompt_info(message.prompt),
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        finish=_finish_info(message.finish),
    )


def generation_chunk(message: generation_pb2.GenerateStreamResponse) -> GenerationChunk:
    """Reads a piece of a streamed answer."""
    return GenerationChunk(
        prompt=_prompt_info(message.prompt) if message.HasField("prompt") else None,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        finish=_finish_info(message.finish) if message.HasField("finish") else None,
    )


def token_ids(message: generation_pb2.TokenizeResponse) -> tuple[int, ...]:
    """Reads the tokens of a text."""
    return tuple(message.token_ids)


def text(message: generation_pb2.DetokenizeResponse) -> str:
    """Reads the text of some tokens."""
    return message.text


def model_summaries(message: model_pb2.ListModelsResponse) -> tuple[ModelSummary, ...]:
    """Reads the list of models."""
    return tuple(ModelSummary(name=model.name, ready=model.ready) for model in message.models)


def model_description(message: model_pb2.GetModelResponse) -> ModelDescription:
    """Reads the description of a model."""
    return ModelDescription(
        name=message.name,
        architecture=message.architecture,
        dtype=message.dtype,
        weights=message.weights,
        context_length=message.context_length,
        vocabulary_size=message.vocabulary_size,
        layers=tuple(
            Layer(
                attention=_ATTENTION_TYPES.get(layer.attention, AttentionType.UNSPECIFIED),
                window=layer.window,
                kv_heads=layer.kv_heads,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
            )
            for layer in message.layers
        ),
        kv_bytes_per_token=message.kv_bytes_per_token,
        plan=_sharing_plan(message.plan) if message.HasField("plan") else None,
        attention_backend=message.attention_backend,
    )


def model_memories(
    message: memory_pb2.GetMemoryResponse | memory_pb2.WatchMemoryResponse,
) -> tuple[ModelMemory, ...]:
    """Reads the state of the pools."""
    return tuple(
        ModelMemory(
            model=model.model,
            ready=model.ready,
            pool_bytes=model.pool_bytes,
            block_bytes=model.block_bytes,
            tokens_per_block=model.tokens_per_block,
            state_bytes=_state_bytes(model.states),
            running_requests=model.running_requests,
            waiting_requests=model.waiting_requests,
            kv_bytes_held=model.kv_bytes_held,
            kv_bytes_full=model.kv_bytes_full,
            kv_bytes_saved=model.kv_bytes_saved,
        )
        for model in message.models
    )


def _state_bytes(entries: Iterable[memory_pb2.BlockStateBytes]) -> dict[BlockState, int]:
    """Adds up the bytes by state: there may be several states that this client does not know."""
    sums: Counter[BlockState] = Counter()
    for entry in entries:
        sums[_BLOCK_STATES.get(entry.state, BlockState.UNSPECIFIED)] += entry.bytes
    return dict(sums)


def _prompt_info(message: generation_pb2.PromptInfo) -> PromptInfo:
    return PromptInfo(token_count=message.token_count, logprobs=_logprobs(message.logprobs))


def _logprobs(messages: Iterable[generation_pb2.PositionLogprobs]) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(token=_token(position.token), top=tuple(_token(token) for token in position.top))
        for position in messages
    )


def _token(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob)


def _finish_info(message: generation_pb2.FinishInfo) -> FinishInfo:
    matched = message.WhichOneof("matched")
    return FinishInfo(
        reason=_FINISH_REASONS.get(message.reason, FinishReason.UNSPECIFIED),
        stop_string=message.stop_string if matched == "stop_string" else None,
        stop_token_id=message.stop_token_id if matched == "stop_token_id" else None,
        usage=Usage(prompt_tokens=message.usage.prompt_tokens, completion_tokens=message.usage.completion_tokens),
        memory=_memory_report(message.memory),
    )


def _memory_report(message: memory_pb2.MemoryReport) -> MemoryReport:
    return MemoryReport(
        shared_layers=message.shared_layers,
        kv_bytes_held=message.kv_bytes_held,
        kv_bytes_full=message.kv_bytes_full,
        kv_bytes_saved=message.kv_bytes_saved,
        kv_bytes_held_peak=message.kv_bytes_held_peak,
        preemptions=message.preemptions,
    )


def _sharing_plan(message: model_pb2.SharingPlan) -> SharingPlan:
    return SharingPlan(
        entries=tuple(SharingEntry(sharer=entry.sharer, owner=entry.owner) for entry in message.entries),
        strategy=message.strategy,
        depths=tuple(
            DepthQuality(
                shared_layers=depth.shared_layers,
                kv_bytes_per_token=depth.kv_bytes_per_token,
                perplexity=depth.perplexity,
                kl=depth.kl,
                quality_cost=depth.quality_cost,
            )
            for depth in message.depths
        ),
    )
