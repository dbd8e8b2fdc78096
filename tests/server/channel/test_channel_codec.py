from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.v1 import engine_pb2
from kvfold_server.channel.codec import (
    CodecError,
    decode_from_engine,
    decode_from_front_end,
    encode_to_engine,
    encode_to_front_end,
)
from kvfold_server.channel.frames import HEADER, MAX_FRAME_BYTES, FrameBuffer, FrameError, pack_frame
from kvfold_server.channel.messages import CancelRequest, Heartbeat, LoadFailed, StepOutput
from kvfold_server.generation.events import (
    FinishCause,
    MemoryReport,
    PositionLogprobs,
    PromptScored,
    RequestFinished,
    TokenGenerated,
    TokenLogprob,
)
from kvfold_server.generation.pool_snapshot import PoolSnapshot
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

ids = st.integers(1, 2**64 - 1).map(RequestId)
tokens = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**40)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
logprobs = st.builds(TokenLogprob, tokens, floats)
positions = st.builds(PositionLogprobs, logprobs, st.lists(logprobs, max_size=3).map(tuple))
reports = st.builds(MemoryReport, st.integers(0, 99), counts, counts, counts, st.integers(0, 99))
snapshots = st.builds(PoolSnapshot, counts, counts, counts, counts, st.integers(0, 99), st.integers(0, 99), counts)
requests = st.builds(
    GenerationRequest,
    request_id=ids,
    prompt_token_ids=st.lists(tokens, min_size=1, max_size=20).map(tuple),
    sampling=st.builds(
        SamplingParameters,
        *[floats, st.integers(0, 2**32 - 1), floats, floats, floats, floats, floats, st.integers(0, 2**64 - 1)],
        st.dictionaries(tokens, floats, max_size=3),
    ),
    max_tokens=st.integers(1, 2**31),
    stop_token_ids=st.frozensets(tokens, max_size=3),
    shared_layers=st.integers(0, 99),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
generated = st.builds(TokenGenerated, ids, tokens, st.none() | positions)
finished = st.builds(RequestFinished, ids, st.sampled_from(FinishCause), reports, counts, st.text(max_size=8))
scored = st.builds(PromptScored, ids, st.lists(positions, max_size=3).map(tuple))


def payloads(*frames: bytes) -> list[bytes]:
    return list(FrameBuffer().feed(b"".join(frames)))


@settings(max_examples=200, deadline=None)
@given(message=requests | st.builds(CancelRequest, ids))
def test_what_the_front_end_says_arrives_whole(message: GenerationRequest | CancelRequest) -> None:
    (payload,) = payloads(encode_to_engine(message))
    assert decode_from_front_end(payload) == message


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(scored, max_size=2),
    chosen=st.lists(generated, max_size=4),
    ended=st.lists(finished, max_size=3),
    snapshot=st.none() | snapshots,
)
def test_what_a_step_brought_arrives_whole_and_in_order(
    prompts: list[PromptScored],
    chosen: list[TokenGenerated],
    ended: list[RequestFinished],
    snapshot: PoolSnapshot | None,
) -> None:
    output = StepOutput((*prompts, *chosen, *ended), snapshot)
    arrived = [decode_from_engine(payload) for payload in payloads(*encode_to_front_end(output))]
    assert all(isinstance(message, StepOutput) for message in arrived)
    assert tuple(event for message in arrived for event in message.events) == output.events
    assert arrived[-1].snapshot == snapshot


@given(message=st.builds(LoadFailed, st.text()) | st.builds(Heartbeat, st.none() | snapshots, st.floats(0, 1e6)))
def test_what_the_engine_says_of_itself_arrives_whole(message: LoadFailed | Heartbeat) -> None:
    (payload,) = payloads(*encode_to_front_end(message))
    assert decode_from_engine(payload) == message


@given(contents=st.lists(st.binary(max_size=50), max_size=8), data=st.data())
def test_frames_are_cut_however_they_arrive(contents: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(pack_frame, contents))
    buffer, got = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got.extend(buffer.feed(stream[:size]))
        stream = stream[size:]
    assert got == contents


def test_a_frame_that_is_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(FrameError):
        pack_frame(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(FrameError):
        list(FrameBuffer().feed(HEADER.pack(MAX_FRAME_BYTES + 1)))


@pytest.mark.parametrize(
    "output",
    [
        engine_pb2.StepOutput(request_ids=[1, 2], token_ids=[5]),
        engine_pb2.StepOutput(token_ids=[5], request_ids=[1], scored=[engine_pb2.TokenScored(index=1)]),
    ],
)
def test_tokens_of_nobody_and_scores_of_no_token_are_refused(output: engine_pb2.StepOutput) -> None:
    with pytest.raises(CodecError):
        decode_from_engine(engine_pb2.EngineFrame(step_output=output).SerializeToString())


@pytest.mark.parametrize("decode", [decode_from_engine, decode_from_front_end])
@pytest.mark.parametrize("payload", [b"", b"\xff\xff"])
def test_a_payload_that_is_no_message_is_refused(decode: object, payload: bytes) -> None:
    with pytest.raises(CodecError):
        decode(payload)  # type: ignore[operator]
