from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
from kvfold_server.engine.fake import FakeSettings, fake_token
from kvfold_server.generation.errors import EngineFailureError, RequestError
from kvfold_server.rpc.errors import STATUSES

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Serve = Callable[..., AbstractAsyncContextManager[Any]]
    MakeFakeModel = Callable[..., Path]
    Failing = Callable[[Any], Any]

NAN, INF = float("nan"), float("inf")
PROMPT: dict[str, Any] = {"token_ids": {"ids": [20, 21, 22]}}
USER = {"role": "ROLE_USER", "content": "Hi"}
FAIL, EXIT = 298, 299

GENERATE = "/kvfold.v1.GenerationService/Generate"
STREAM = "/kvfold.v1.GenerationService/GenerateStream"


def sampling(**fields: Any) -> dict[str, Any]:
    return PROMPT | {"sampling": fields}


def stopping(**fields: Any) -> dict[str, Any]:
    return PROMPT | {"stopping": fields}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"chat": {"messages": list(messages)} | fields}


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x" * 4096}, "prompt"),
    ({"token_ids": {}}, "token_ids.ids"),
    ({"token_ids": {"ids": [20] * 4096}}, "token_ids.ids"),
    ({"token_ids": {"ids": [20, 300]}}, "token_ids.ids[1]"),
    ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids[0]"),
    (chat(), "chat.messages"),
    (chat({"content": "Hi"}), "chat.messages[0].role"),
    (chat(USER, {"role": 99, "content": "Hi"}), "chat.messages[1].role"),
    (chat(USER, continue_final_message=True), "chat.continue_final_message"),
    (chat({"role": "ROLE_USER", "content": "refuse me"}), "chat.messages"),
    (chat({"role": "ROLE_USER", "content": "x" * 5000}), "chat"),
    *[(sampling(temperature=value), "sampling.temperature") for value in (NAN, INF, -INF, -0.1, 100.1)],
    *[(sampling(top_p=value), "sampling.top_p") for value in (NAN, INF, 0.0, -1.0, 1.1)],
    *[(sampling(min_p=value), "sampling.min_p") for value in (NAN, -0.1, 1.1)],
    *[(sampling(repetition_penalty=value), "sampling.repetition_penalty") for value in (NAN, INF, 0.0, -1.0, 101.0)],
    *[(sampling(presence_penalty=value), "sampling.presence_penalty") for value in (NAN, INF, -2.1, 2.1)],
    *[(sampling(frequency_penalty=value), "sampling.frequency_penalty") for value in (NAN, INF, -2.1, 2.1)],
    (sampling(logit_bias={300: 1.0}), "sampling.logit_bias[300]"),
    *[(sampling(logit_bias={5: value}), "sampling.logit_bias[5]") for value in (NAN, INF, 100.1, -100.1)],
    (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias"),
    (stopping(max_tokens=0), "stopping.max_tokens"),
    (stopping(max_tokens=4094), "stopping.max_tokens"),
    (stopping(max_tokens=2**32 - 1), "stopping.max_tokens"),
    (stopping(stop_strings=["a"] * 17), "stopping.stop_strings"),
    (stopping(stop_strings=["a", ""]), "stopping.stop_strings[1]"),
    (stopping(stop_strings=["a" * 257]), "stopping.stop_strings[0]"),
    (stopping(stop_token_ids=[1] * 65), "stopping.stop_token_ids"),
    (stopping(stop_token_ids=[1, 300]), "stopping.stop_token_ids[1]"),
    (PROMPT | {"options": {"logprobs": 21}}, "options.logprobs"),
    (PROMPT | {"options": {"prompt_logprobs": 21}}, "options.prompt_logprobs"),
]


def wire(field: int, payload: bytes) -> bytes:
    """A length-delimited field of fewer than 128 bytes."""
    return bytes([field << 3 | 2, len(payload)]) + payload


BAD_BYTES = [
    (b"\xff\xff\xff", ""),
    (b"\x12\x7fshort", ""),
    (wire(2, b"caf\xe9"), "prompt"),
    (wire(1, b"\xc3"), "model"),
    (wire(4, wire(1, wire(2, b"ok")) + wire(1, wire(2, b"\xed\xa0\x80"))), "chat.messages[1].content"),
    (wire(6, wire(2, b"fine") + wire(2, b"\xfe")), "stopping.stop_strings[1]"),
]


def test_every_error_has_a_status() -> None:
    def below(kind: type[RequestError]) -> set[type[RequestError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert below(RequestError) - {RequestError} == STATUSES.keys()
    assert grpc.StatusCode.UNKNOWN not in {row.code for row in STATUSES.values()}


async def test_bad_requests_get_their_code_and_field_and_disturb_nobody(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(step_seconds=0.002)) as served:
        canary = asyncio.create_task(served.stream(token_ids={"ids": [33, 34]}, stopping={"max_tokens": 400}))
        for fields, field in BAD_REQUESTS:
            request = generation_pb2.GenerateRequest(**fields)
            failure = await failing(served.generation.Generate(request))
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT, (fields, failure)
            assert failure.field == field
            assert failure.reason == "INVALID_FIELD"
            assert failure.details["ErrorInfo"].domain == "kvfold.dev"
            streamed = generation_pb2.GenerateStreamRequest(**fields)
            failure = await failing(served.generation.GenerateStream(streamed).read())
            assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        for data, field in BAD_BYTES:
            for call in (served.channel.unary_unary(GENERATE)(data), served.channel.unary_stream(STREAM)(data).read()):
                failure = await failing(call)
                assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        tokens = [token for response in await canary for token in response.token_ids]
        assert tokens == [fake_token((33, 34), position, FakeSettings()) for position in range(400)]
        await served.until_idle()


async def test_mutated_requests_never_get_an_unknown_status(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    rng = random.Random(7)  # noqa: S311
    sound = generation_pb2.GenerateRequest(
        model="fake",
        chat={"messages": [USER]},
        sampling={"temperature": 0.5, "logit_bias": {5: 1.0}},
        stopping={"max_tokens": 2, "stop_strings": ["end"], "stop_token_ids": [7]},
        quality={"shared_layers": 1},
        options={"logprobs": 1},
    ).SerializeToString()
    codes = set()
    async with serve(make_fake_model()) as served:
        for _ in range(400):
            data = bytearray(sound)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                await served.channel.unary_unary(GENERATE)(bytes(data[: rng.randint(1, len(data))]), timeout=10)
            except grpc.aio.AioRpcError as error:
                codes.add(error.code())
        await served.until_idle()
    assert codes <= {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    }


async def test_an_unknown_model_is_not_found(serve: Serve, make_fake_model: MakeFakeModel, failing: Failing) -> None:
    async with serve(make_fake_model()) as served:
        for call in (
            served.generation.Generate(generation_pb2.GenerateRequest(model="other", **PROMPT)),
            served.generation.Tokenize(generation_pb2.TokenizeRequest(model="other", text="x")),
            served.generation.Detokenize(generation_pb2.DetokenizeRequest(model="other")),
            served.model.GetModel(model_pb2.GetModelRequest(model="other")),
            served.memory.GetMemory(memory_pb2.GetMemoryRequest(model="other")),
            served.memory.WatchMemory(memory_pb2.WatchMemoryRequest(model="other")).read(),
        ):
            failure = await failing(call)
            assert failure.code is grpc.StatusCode.NOT_FOUND
            assert failure.details["ResourceInfo"].resource_name == "other"


async def test_the_name_of_one_of_several_models_is_required(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(name="one"), make_fake_model(name="two")) as served:
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT)))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "model")
        answer = await served.generation.Generate(generation_pb2.GenerateRequest(model="two", **PROMPT))
        assert answer.model == "two"


async def test_a_depth_that_the_plan_lacks_is_a_failed_precondition(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model()) as served:
        request = generation_pb2.GenerateRequest(**PROMPT, quality={"shared_layers": 3})
        failure = await failing(served.generation.Generate(request))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        violation = failure.details["PreconditionFailure"].violations[0]
        assert (violation.type, violation.subject) == ("SHARING_DEPTH", "quality.shared_layers")


async def test_a_chat_with_a_model_that_has_no_template_is_a_failed_precondition(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(template=None)) as served:
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(**chat(USER))))
        assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
        assert failure.details["PreconditionFailure"].violations[0].type == "CHAT_TEMPLATE"


async def test_a_request_larger_than_the_pool_is_refused_for_good(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(), model={"kv_memory": 2**18}) as served:
        request = generation_pb2.GenerateRequest(**stopping(max_tokens=4000))
        failure = await failing(served.generation.Generate(request))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.reason == "REQUEST_TOO_LARGE"
        assert int(failure.details["ErrorInfo"].metadata["bytes_needed"]) > 2**18
        assert "QuotaFailure" in failure.details
        assert "RetryInfo" not in failure.details


async def test_a_full_queue_is_unavailable_with_a_delay(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    folder = make_fake_model(step_seconds=0.02)
    async with serve(folder, model={"max_running": 1, "max_waiting": 2}) as served:
        request = generation_pb2.GenerateStreamRequest(**stopping(max_tokens=1000))
        running = served.generation.GenerateStream(request)
        await running.read()
        waiting = [served.generation.GenerateStream(request) for _ in range(2)]
        reads = [asyncio.ensure_future(call.read()) for call in waiting]
        while served.handle.snapshot.waiting_requests < 2:
            await asyncio.sleep(0.01)
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT)))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "OVERLOADED"
        assert failure.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        for call in (running, *waiting):
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        await served.until_idle()


async def test_a_contained_error_of_the_engine_shows_an_id_only(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(fail_token=FAIL)) as served:
        request = generation_pb2.GenerateRequest(token_ids={"ids": [FAIL]})
        failure = await failing(served.generation.Generate(request))
        assert failure.code is grpc.StatusCode.INTERNAL
        error_id = failure.details["ErrorInfo"].metadata["error_id"]
        assert failure.message == str(EngineFailureError(error_id))


async def test_a_bug_of_the_front_end_shows_an_id_only(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(make_fake_model()) as served:
        served.application.models.all[0].set_text(object())
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(prompt="secret words")))
        assert failure.code is grpc.StatusCode.INTERNAL
        assert failure.details["ErrorInfo"].metadata["error_id"] in failure.message
        assert "object" not in failure.message
        assert failure.details["ErrorInfo"].metadata["error_id"] in caplog.text
        assert "secret words" not in caplog.text


async def test_a_killed_engine_is_unavailable_until_it_serves_again(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(step_seconds=0.005)) as served:
        call = served.generation.GenerateStream(generation_pb2.GenerateStreamRequest(**stopping(max_tokens=2000)))
        await call.read()
        os.kill(served.application.supervisors["fake"].process_id, signal.SIGKILL)

        async def read_on() -> None:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )

        failure = await failing(read_on())
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "ENGINE_UNAVAILABLE"
        assert "RetryInfo" in failure.details
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT)))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        await served.application.until_ready()
        answer = await served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT))
        assert answer.finish.usage.completion_tokens == 256


async def test_a_server_whose_engine_still_loads_is_unavailable(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(load_seconds=2), wait=False) as served:
        for call in (
            served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT)),
            served.generation.Tokenize(generation_pb2.TokenizeRequest(text="x")),
            served.model.GetModel(model_pb2.GetModelRequest()),
        ):
            failure = await failing(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")
            assert "RetryInfo" in failure.details
        listed = await served.model.ListModels(model_pb2.ListModelsRequest())
        assert [(model.name, model.ready) for model in listed.models] == [("fake", False)]
        memory = await served.memory.GetMemory(memory_pb2.GetMemoryRequest())
        assert list(memory.models) == [memory_pb2.ModelMemory(model="fake")]


async def test_messages_above_four_mebibytes_are_refused(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model()) as served:
        request = generation_pb2.GenerateRequest(prompt="x" * (4 * 2**20 + 1))
        failure = await failing(served.generation.Generate(request))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"interval": {"nanos": 1000}}, "interval"),
        ({"interval": {"seconds": -1}}, "interval"),
        ({"interval": {"seconds": 315_576_000_000}}, "interval"),
    ],
)
async def test_an_interval_out_of_range_is_refused(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing, fields: dict[str, Any], field: str
) -> None:
    async with serve(make_fake_model()) as served:
        failure = await failing(served.memory.WatchMemory(memory_pb2.WatchMemoryRequest(**fields)).read())
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_tokens_that_do_not_exist_are_not_detokenized(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model()) as served:
        request = generation_pb2.DetokenizeRequest(token_ids=[20, 300])
        failure = await failing(served.generation.Detokenize(request))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids[1]")
        failure = await failing(served.generation.Tokenize(generation_pb2.TokenizeRequest()))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "input")
