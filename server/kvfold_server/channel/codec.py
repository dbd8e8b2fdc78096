"""Messages to frames and back: the only file that knows both `kvfold.engine.v1` and the domain types."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError

from kvfold.engine.v1 import engine_pb2
from kvfold.v1 import generation_pb2, memory_pb2
from kvfold_server.channel.frames import pack_frame
from kvfold_server.channel.messages import CancelRequest, EngineReady, Heartbeat, LoadFailed, StepOutput
from kvfold_server.channel.model_codec import decode_ready, encode_ready
from kvfold_server.generation.events import (
    FinishCause,
    PromptScored,
    RequestFinished,
    TokenGenerated,
)
from kvfold_server.generation.pool_snapshot import PoolSnapshot
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters
from kvfold_server.wire import decode_position, decode_report, encode_position, encode_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.channel.messages import EngineMessage, FrontEndMessage
    from kvfold_server.generation.events import EngineEvent

CAUSES = {
    FinishCause.STOP_TOKEN: engine_pb2.FINISH_CAUSE_STOP_TOKEN,
    FinishCause.LENGTH: engine_pb2.FINISH_CAUSE_LENGTH,
    FinishCause.CANCELLED: engine_pb2.FINISH_CAUSE_CANCELLED,
    FinishCause.QUEUE_FULL: engine_pb2.FINISH_CAUSE_QUEUE_FULL,
    FinishCause.TOO_LARGE: engine_pb2.FINISH_CAUSE_TOO_LARGE,
    FinishCause.INTERNAL_ERROR: engine_pb2.FINISH_CAUSE_INTERNAL_ERROR,
}
CAUSES_BY_NUMBER = {number: cause for cause, number in CAUSES.items()}


class CodecError(Exception):
    """A payload is not a message of this release."""


def encode_to_engine(message: FrontEndMessage) -> bytes:
    """A message of the front end as a frame."""
    frame = engine_pb2.FrontEndFrame()
    if isinstance(message, CancelRequest):
        frame.cancel.request_id = message.request_id
    else:
        _encode_request(message, frame.submit)
    return pack_frame(frame.SerializeToString())


def decode_from_front_end(payload: bytes) -> FrontEndMessage:
    """A payload as a message for the engine. Raises CodecError."""
    frame = engine_pb2.FrontEndFrame()
    try:
        frame.ParseFromString(payload)
    except DecodeError as error:
        raise CodecError("a frame of the front end cannot be read") from error
    match frame.WhichOneof("kind"):
        case "submit":
            return _decode_request(frame.submit)
        case "cancel":
            return CancelRequest(RequestId(frame.cancel.request_id))
        case _:
            raise CodecError("a frame of the front end is of an unknown kind")


def encode_to_front_end(message: EngineMessage) -> list[bytes]:
    """A message of the engine as frames: one, and one more for each scored prompt, which can be large."""
    frame = engine_pb2.EngineFrame()
    frames: list[bytes] = []
    match message:
        case EngineReady():
            frame.ready.CopyFrom(encode_ready(message.info))
        case LoadFailed():
            frame.load_failed.reason = message.reason
        case StepOutput():
            frames.extend(_prompt_frame(event) for event in message.events if isinstance(event, PromptScored))
            frame.step_output.SetInParent()
            _encode_events(message.events, frame.step_output)
            if message.snapshot is not None:
                _encode_snapshot(message.snapshot, frame.step_output.memory)
        case Heartbeat():
            frame.heartbeat.busy_seconds = message.busy_seconds
            if message.snapshot is not None:
                _encode_snapshot(message.snapshot, frame.heartbeat.memory)
    return [*frames, pack_frame(frame.SerializeToString())]


def decode_from_engine(payload: bytes) -> EngineMessage:
    """A payload as a message for the front end. Raises CodecError."""
    frame = engine_pb2.EngineFrame()
    try:
        frame.ParseFromString(payload)
    except DecodeError as error:
        raise CodecError("a frame of the engine cannot be read") from error
    match frame.WhichOneof("kind"):
        case "step_output":
            output = frame.step_output
            snapshot = _decode_snapshot(output.memory) if output.HasField("memory") else None
            return StepOutput(_decode_events(output), snapshot)
        case "heartbeat":
            beat = frame.heartbeat
            return Heartbeat(_decode_snapshot(beat.memory) if beat.HasField("memory") else None, beat.busy_seconds)
        case "ready":
            return EngineReady(decode_ready(frame.ready))
        case "load_failed":
            return LoadFailed(frame.load_failed.reason)
        case _:
            raise CodecError("a frame of the engine is of an unknown kind")


def _encode_request(request: GenerationRequest, submit: engine_pb2.Submit) -> None:
    sampling = request.sampling
    submit.request_id = request.request_id
    submit.prompt_token_ids.extend(request.prompt_token_ids)
    submit.sampling.CopyFrom(
        generation_pb2.SamplingParameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            logit_bias=dict(sampling.logit_bias),
        )
    )
    submit.max_tokens = request.max_tokens
    submit.stop_token_ids.extend(sorted(request.stop_token_ids))
    submit.shared_layers = request.shared_layers
    if request.logprobs is not None:
        submit.logprobs = request.logprobs
    if request.prompt_logprobs is not None:
        submit.prompt_logprobs = request.prompt_logprobs


def _decode_request(submit: engine_pb2.Submit) -> GenerationRequest:
    sampling = submit.sampling
    return GenerationRequest(
        request_id=RequestId(submit.request_id),
        prompt_token_ids=tuple(submit.prompt_token_ids),
        sampling=SamplingParameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            logit_bias=dict(sampling.logit_bias),
        ),
        max_tokens=submit.max_tokens,
        stop_token_ids=frozenset(submit.stop_token_ids),
        shared_layers=submit.shared_layers,
        logprobs=submit.logprobs if submit.HasField("logprobs") else None,
        prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else None,
    )


def _prompt_frame(event: PromptScored) -> bytes:
    frame = engine_pb2.EngineFrame()
    scored = frame.step_output.prompts.add(request_id=event.request_id)
    scored.logprobs.extend(map(encode_position, event.logprobs))
    return pack_frame(frame.SerializeToString())


def _encode_events(events: Sequence[EngineEvent], output: engine_pb2.StepOutput) -> None:
    tokens = [event for event in events if isinstance(event, TokenGenerated)]
    output.request_ids.extend([token.request_id for token in tokens])
    output.token_ids.extend([token.token_id for token in tokens])
    for index, token in enumerate(tokens):
        if token.logprobs is not None:
            output.scored.add(index=index, logprobs=encode_position(token.logprobs))
    for event in events:
        if isinstance(event, RequestFinished):
            output.finished.add(
                request_id=event.request_id,
                cause=CAUSES[event.cause],
                memory=encode_report(event.memory),
                bytes_needed=event.bytes_needed,
                error_id=event.error_id,
            )


def _decode_events(output: engine_pb2.StepOutput) -> tuple[EngineEvent, ...]:
    count = len(output.token_ids)
    if len(output.request_ids) != count or any(scored.index >= count for scored in output.scored):
        raise CodecError("a frame of the engine does not say whose its tokens are")
    tokens = list(map(TokenGenerated, cast("Sequence[RequestId]", output.request_ids), output.token_ids))
    for scored in output.scored:
        tokens[scored.index] = tokens[scored.index]._replace(logprobs=decode_position(scored.logprobs))
    events: list[EngineEvent] = [
        PromptScored(RequestId(scored.request_id), tuple(map(decode_position, scored.logprobs)))
        for scored in output.prompts
    ]
    events.extend(tokens)
    events.extend(
        RequestFinished(
            RequestId(finished.request_id),
            CAUSES_BY_NUMBER[finished.cause],
            decode_report(finished.memory),
            finished.bytes_needed,
            finished.error_id,
        )
        for finished in output.finished
    )
    return tuple(events)


def _encode_snapshot(snapshot: PoolSnapshot, memory: memory_pb2.ModelMemory) -> None:
    memory.pool_bytes = snapshot.pool_bytes
    memory.states.add(state=memory_pb2.BLOCK_STATE_FREE, bytes=snapshot.free_bytes)
    memory.states.add(state=memory_pb2.BLOCK_STATE_PREFILL, bytes=snapshot.prefill_bytes)
    memory.states.add(state=memory_pb2.BLOCK_STATE_DECODE, bytes=snapshot.decode_bytes)
    memory.running_requests = snapshot.running_requests
    memory.waiting_requests = snapshot.waiting_requests
    memory.kv_bytes_full = snapshot.kv_bytes_full


def _decode_snapshot(memory: memory_pb2.ModelMemory) -> PoolSnapshot:
    states = {entry.state: entry.bytes for entry in memory.states}
    return PoolSnapshot(
        pool_bytes=memory.pool_bytes,
        free_bytes=states.get(memory_pb2.BLOCK_STATE_FREE, 0),
        prefill_bytes=states.get(memory_pb2.BLOCK_STATE_PREFILL, 0),
        decode_bytes=states.get(memory_pb2.BLOCK_STATE_DECODE, 0),
        running_requests=memory.running_requests,
        waiting_requests=memory.waiting_requests,
        kv_bytes_full=memory.kv_bytes_full,
    )
