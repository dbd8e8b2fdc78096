from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from kvfold_server.channel.codec import decode_from_engine, encode_to_front_end
from kvfold_server.channel.frames import HEADER
from kvfold_server.channel.messages import StepOutput
from kvfold_server.channel.request_stream import RequestStream
from kvfold_server.engine.fake import fake_logprobs
from kvfold_server.generation.answer import AnswerChunk
from kvfold_server.generation.errors import SlowReaderError
from kvfold_server.generation.events import TokenGenerated
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters
from kvfold_server.rpc.conversion import stream_response

if TYPE_CHECKING:
    from kvfold_server.generation.events import EngineEvent

PROMISED_BYTES = 256 * 2**10
REQUEST = GenerationRequest(RequestId(10**6), (1, 2, 3), SamplingParameters(), max_tokens=10_000)


def arrived(number: int, alternatives: int | None) -> EngineEvent:
    """A token as it comes out of the channel: none of its objects is shared with another token."""
    logprobs = None if alternatives is None else fake_logprobs(1000 + number, alternatives)
    event = TokenGenerated(REQUEST.request_id, 1000 + number, logprobs)
    (frame,) = encode_to_front_end(StepOutput((event,)))
    output = decode_from_engine(frame[HEADER.size :])
    assert isinstance(output, StepOutput)
    return output.events[0]


def fill(stream: RequestStream, overflowed: list[RequestStream], alternatives: int | None) -> int:
    """Pushes tokens until the stream gives up. Returns the most bytes that were held before."""
    held = 0
    before, _ = tracemalloc.get_traced_memory()
    for number in itertools.count():
        stream.push(arrived(number, alternatives))
        if overflowed:
            return held
        held = tracemalloc.get_traced_memory()[0] - before
    raise AssertionError


@pytest.mark.parametrize("alternatives", [None, 0, 1, 5, 20])
async def test_what_waits_for_a_stalled_reader_stays_below_256_kib(alternatives: int | None) -> None:
    overflowed: list[RequestStream] = []
    measured, counted = (RequestStream(REQUEST, overflowed.append) for _ in range(2))
    tracemalloc.start()
    try:
        held = fill(measured, overflowed, alternatives)
    finally:
        tracemalloc.stop()
    assert overflowed == [measured]
    with pytest.raises(SlowReaderError):
        await measured.next()

    # The message that the reader does not take may hold as much, once as it is written and once inside of gRPC.
    for number in itertools.count():
        counted.push(arrived(number, alternatives))
        if counted in overflowed:
            break
    full = RequestStream(REQUEST, overflowed.append)
    for other in range(number):
        full.push(arrived(other, alternatives))
    batch = await full.next()
    message = stream_response(AnswerChunk(" word" * number, batch.token_ids, batch.logprobs, None, None), None)
    assert held + 2 * message.ByteSize() < PROMISED_BYTES


async def test_a_reader_that_waits_is_not_blamed_for_what_comes_at_once() -> None:
    stream = RequestStream(REQUEST, on_overflow=pytest.fail)
    reading = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    for number in range(10_000):
        stream.push(arrived(number, None))
    assert (await reading).token_ids == list(range(1000, 11_000))
