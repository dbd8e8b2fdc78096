from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc

from kvfold.v1 import generation_pb2, generation_pb2_grpc
from kvfold_server.engine.fake import FakeSettings, fake_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Serve = Callable[..., AbstractAsyncContextManager[Any]]
    MakeFakeModel = Callable[..., Path]
    Failing = Callable[[Any], Any]

PROMPT = {"token_ids": {"ids": [20, 21, 22]}}


def expected(count: int, prompt: tuple[int, ...] = (20, 21, 22)) -> list[int]:
    return [fake_token(prompt, position, FakeSettings()) for position in range(count)]


def text_of(token_ids: list[int]) -> str:
    """The fake model's tokens are printable ASCII in its tokenizer: 4 is the first one, "!"."""
    return "".join(chr(token_id - 4 + ord("!")) for token_id in token_ids)


async def test_a_stream_brings_prompt_facts_first_and_the_finish_last(
    serve: Serve, make_fake_model: MakeFakeModel
) -> None:
    async with serve(make_fake_model(step_seconds=0.002)) as served:
        responses = await served.stream(**PROMPT, stopping={"max_tokens": 50}, quality={"shared_layers": 1})
        assert responses[0].prompt.token_count == 3
        assert not any(response.HasField("prompt") for response in responses[1:])
        assert not any(response.HasField("finish") for response in responses[:-1])
        tokens = [token for response in responses for token in response.token_ids]
        assert tokens == expected(50)
        assert "".join(response.text for response in responses) == text_of(expected(50))
        finish = responses[-1].finish
        assert finish.reason == generation_pb2.FINISH_REASON_LENGTH
        assert finish.WhichOneof("matched") is None
        assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (3, 50)
        memory = finish.memory
        assert memory.shared_layers == 1
        assert memory.kv_bytes_saved == memory.kv_bytes_full - memory.kv_bytes_held
        assert memory.kv_bytes_held > 0


async def test_a_whole_answer_is_what_the_stream_brings(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model()) as served:
        fields = PROMPT | {"stopping": {"max_tokens": 40}, "options": {"logprobs": 2, "prompt_logprobs": 1}}
        whole = await served.generation.Generate(generation_pb2.GenerateRequest(**fields))
        pieces = await served.stream(**fields)
        assert whole.model == "fake"
        assert whole.text == "".join(piece.text for piece in pieces)
        assert list(whole.token_ids) == [token for piece in pieces for token in piece.token_ids]
        assert list(whole.logprobs) == [entry for piece in pieces for entry in piece.logprobs]
        assert whole.prompt == pieces[0].prompt
        assert whole.finish == pieces[-1].finish
        assert [entry.token.token_id for entry in whole.logprobs] == list(whole.token_ids)
        assert all(len(entry.top) == 2 for entry in whole.logprobs)
        assert [entry.token.token_id for entry in whole.prompt.logprobs] == [21, 22]


async def test_nothing_is_sent_before_the_first_token(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.5)) as served:
        call = served.generation.GenerateStream(generation_pb2.GenerateStreamRequest(**PROMPT))
        headers = asyncio.create_task(call.initial_metadata())
        await asyncio.sleep(0.25)
        assert not headers.done()
        await call.read()
        await headers
        call.cancel()


async def test_a_stop_string_ends_the_answer_before_it(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.002)) as served:
        text = text_of(expected(60))
        stop = text[20:24]
        end = text.index(stop)
        responses = await served.stream(**PROMPT, stopping={"max_tokens": 2000, "stop_strings": ["~~~~", stop]})
        assert "".join(response.text for response in responses) == text[:end]
        finish = responses[-1].finish
        assert finish.reason == generation_pb2.FINISH_REASON_STOP
        assert finish.stop_string == stop
        assert finish.usage.completion_tokens == end + 4
        assert [token for response in responses for token in response.token_ids] == expected(end + 4)
        assert finish.memory.kv_bytes_held > 0
        await served.until_idle()


async def test_text_that_may_begin_a_stop_string_comes_with_the_end(
    serve: Serve, make_fake_model: MakeFakeModel
) -> None:
    async with serve(make_fake_model()) as served:
        text = text_of(expected(30))
        responses = await served.stream(**PROMPT, stopping={"max_tokens": 30, "stop_strings": [text[-1] + "nope"]})
        assert "".join(response.text for response in responses) == text
        assert responses[-1].finish.reason == generation_pb2.FINISH_REASON_LENGTH


async def test_a_stop_token_ends_the_answer_and_is_no_text(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model()) as served:
        tokens = expected(60)
        stop = tokens[30]
        count = tokens.index(stop) + 1
        responses = await served.stream(**PROMPT, stopping={"max_tokens": 60, "stop_token_ids": [stop]})
        assert "".join(response.text for response in responses) == text_of(tokens[: count - 1])
        finish = responses[-1].finish
        assert finish.reason == generation_pb2.FINISH_REASON_STOP
        assert finish.stop_token_id == stop
        assert finish.usage.completion_tokens == count


async def test_end_of_sequence_tokens_end_an_answer_unless_they_are_ignored(
    serve: Serve, make_fake_model: MakeFakeModel
) -> None:
    tokens = expected(60)
    async with serve(make_fake_model(eos_token_ids=[tokens[10]])) as served:
        ended = await served.stream(**PROMPT, stopping={"max_tokens": 60})
        assert ended[-1].finish.stop_token_id == tokens[10]
        ignored = await served.stream(**PROMPT, stopping={"max_tokens": 60, "ignore_eos": True})
        assert ignored[-1].finish.usage.completion_tokens == 60


async def test_a_chat_is_rendered_with_the_models_template(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model()) as served:
        chat = {"messages": [{"role": "ROLE_USER", "content": "Hi"}]}
        tokens = await served.generation.Tokenize(generation_pb2.TokenizeRequest(chat=chat))
        text = await served.generation.Detokenize(
            generation_pb2.DetokenizeRequest(token_ids=tokens.token_ids, skip_special_tokens=False)
        )
        assert text.text == "<user>Hi<|im_end|><assistant>"
        responses = await served.stream(chat=chat, stopping={"max_tokens": 5})
        prompt = tuple(tokens.token_ids)
        assert responses[0].prompt.token_count == len(prompt)
        assert [token for response in responses for token in response.token_ids] == expected(5, prompt)
        chat["messages"].append({"role": "ROLE_ASSISTANT", "content": "Well"})
        continued = await served.generation.Tokenize(
            generation_pb2.TokenizeRequest(chat=chat | {"continue_final_message": True})
        )
        text = await served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=continued.token_ids))
        assert text.text == "<user>Hi<assistant>Well"


async def test_a_long_prompt_does_not_stop_other_streams(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.005)) as served:
        call = served.generation.GenerateStream(
            generation_pb2.GenerateStreamRequest(**PROMPT, stopping={"max_tokens": 2000})
        )
        await call.read()
        long = asyncio.ensure_future(
            served.generation.Tokenize(generation_pb2.TokenizeRequest(text="word " * 300_000), timeout=60)
        )
        worst = 0.0
        while not long.done():
            began = time.monotonic()
            await call.read()
            worst = max(worst, time.monotonic() - began)
        assert len((await long).token_ids) == 1_500_000
        assert worst < 0.5
        call.cancel()


async def test_cancelling_a_stream_frees_its_blocks(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.005)) as served:
        request = generation_pb2.GenerateStreamRequest(**PROMPT, stopping={"max_tokens": 2000})
        calls = [served.generation.GenerateStream(request) for _ in range(8)]
        for call in calls:
            await call.read()
        for call in calls:
            call.cancel()
        await served.until_idle()


async def test_a_deadline_ends_the_request_in_the_engine(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(step_seconds=0.01)) as served:
        request = generation_pb2.GenerateRequest(**PROMPT, stopping={"max_tokens": 4000})
        failure = await failing(served.generation.Generate(request, timeout=0.5))
        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failure.details["ErrorInfo"].metadata["stage"] == "generating"
        await served.until_idle()


async def test_a_deadline_in_the_queue_says_so(serve: Serve, make_fake_model: MakeFakeModel, failing: Failing) -> None:
    async with serve(make_fake_model(step_seconds=0.01), model={"max_running": 1}) as served:
        first = served.generation.GenerateStream(
            generation_pb2.GenerateStreamRequest(**PROMPT, stopping={"max_tokens": 2000})
        )
        await first.read()
        request = generation_pb2.GenerateRequest(**PROMPT)
        failure = await failing(served.generation.Generate(request, timeout=0.4))
        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failure.details["ErrorInfo"].metadata["stage"] == "waiting for the first token"
        first.cancel()
        await served.until_idle()


async def test_a_stalled_reader_loses_its_request_and_slows_nobody(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    small_window = [("grpc.http2.bdp_probe", 0)]  # else the client's library takes in megabytes for its user
    async with (
        serve(make_fake_model(context_length=40_000, step_seconds=0.0005)) as served,
        grpc.aio.insecure_channel(served.address, options=small_window) as channel,
    ):
        fields = PROMPT | {"stopping": {"max_tokens": 10_000}, "options": {"logprobs": 20}}
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stalled = aiter(stub.GenerateStream(generation_pb2.GenerateStreamRequest(**fields)))
        await anext(stalled)
        async with asyncio.timeout(60):
            while served.handle.open_streams:
                others = await served.stream(token_ids={"ids": [30, 31]}, stopping={"max_tokens": 100})
                assert [t for r in others for t in r.token_ids] == expected(100, (30, 31))
        await served.until_idle()
        received = 0

        async def read_on() -> None:
            nonlocal received
            async for response in stalled:
                received += len(response.token_ids)

        failure = await failing(read_on())
        assert received < 5000
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.reason == "SLOW_READER"
        assert {"QuotaFailure", "RetryInfo"} <= failure.details.keys()


async def test_five_hundred_streams_at_once_are_all_right(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.002), model={"max_running": 256}) as served:
        prompts = [(20 + n % 50, 20 + n // 50) for n in range(500)]
        answers = await asyncio.gather(
            *(served.stream(token_ids={"ids": prompt}, stopping={"max_tokens": 20}) for prompt in prompts)
        )
        for prompt, responses in zip(prompts, answers, strict=True):
            assert [t for r in responses for t in r.token_ids] == expected(20, prompt)
        await served.until_idle()
