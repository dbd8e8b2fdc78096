"""Every status becomes one exception, with the details that the server gave."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

import kvfold_client
from kvfold.v1 import generation_pb2
from kvfold_client import AsyncClient, Client, KvfoldError

if TYPE_CHECKING:
    from collections.abc import Callable

EXCEPTIONS = {
    grpc.StatusCode.CANCELLED: kvfold_client.RequestCancelledError,
    grpc.StatusCode.UNKNOWN: kvfold_client.ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: kvfold_client.InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: kvfold_client.DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: kvfold_client.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: kvfold_client.ConflictError,
    grpc.StatusCode.PERMISSION_DENIED: kvfold_client.PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: kvfold_client.ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: kvfold_client.PreconditionError,
    grpc.StatusCode.ABORTED: kvfold_client.ConflictError,
    grpc.StatusCode.OUT_OF_RANGE: kvfold_client.InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: kvfold_client.UnimplementedError,
    grpc.StatusCode.INTERNAL: kvfold_client.ServerError,
    grpc.StatusCode.UNAVAILABLE: kvfold_client.UnavailableError,
    grpc.StatusCode.DATA_LOSS: kvfold_client.ServerError,
    grpc.StatusCode.UNAUTHENTICATED: kvfold_client.AuthenticationError,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_every_status_has_an_exception() -> None:
    assert set(EXCEPTIONS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", EXCEPTIONS, ids=lambda code: code.name)
async def test_a_status_becomes_its_exception(server: Any, client: AsyncClient, code: grpc.StatusCode) -> None:
    server.answers["Generate"] = lambda request, context: server.fail(context, code)
    server.answers["GenerateStream"] = lambda request, context: server.fail(context, code)
    with pytest.raises(EXCEPTIONS[code], match=r"^why$") as caught:
        await client.generate("a prompt")
    assert caught.value.code is code
    with pytest.raises(EXCEPTIONS[code]):
        await anext(client.stream("a prompt"))


@pytest.mark.parametrize("code", EXCEPTIONS, ids=lambda code: code.name)
def test_the_synchronous_client_raises_the_same(server: Any, sync_client: Client, code: grpc.StatusCode) -> None:
    server.answers["Generate"] = lambda request, context: server.fail(context, code)
    server.answers["GenerateStream"] = lambda request, context: server.fail(context, code)
    with pytest.raises(EXCEPTIONS[code], match=r"^why$"):
        sync_client.generate("a prompt")
    with pytest.raises(EXCEPTIONS[code]):
        next(sync_client.stream("a prompt"))


async def test_the_fields_that_are_wrong_are_named(server: Any, client: AsyncClient) -> None:
    wrong = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="must be above 0")
        ]
    )
    server.answers["Generate"] = lambda request, context: server.fail(
        context, grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p must be above 0", wrong
    )
    with pytest.raises(kvfold_client.InvalidRequestError) as caught:
        await client.generate("a prompt")
    assert caught.value.violations == (kvfold_client.FieldViolation("sampling.top_p", "must be above 0"),)
    assert caught.value.retry_delay is None
    assert not caught.value.can_be_retried


async def test_the_delay_and_the_reason_are_told(server: Any, client: AsyncClient) -> None:
    details = (
        error_details_pb2.ErrorInfo(reason="TOO_MANY_TOKENS", domain="kvfold"),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
    )
    server.answers["Generate"] = lambda request, context: server.fail(
        context, grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", *details
    )
    with pytest.raises(kvfold_client.ResourceExhaustedError) as caught:
        await client.generate("a prompt")
    assert (caught.value.reason, caught.value.retry_delay) == ("TOO_MANY_TOKENS", 1.5)
    assert caught.value.can_be_retried
    assert caught.value.details == details


async def test_details_that_are_no_status_leave_the_status(server: Any, client: AsyncClient) -> None:
    def garbage(request: object, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such model")

    server.answers["Generate"] = garbage
    with pytest.raises(kvfold_client.NotFoundError, match="no such model") as caught:
        await client.generate("a prompt")
    assert caught.value.details == ()


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_unavailable_is_retried_before_the_first_message(server: Any, client: AsyncClient, method: str) -> None:
    good = server.answers[method]

    def fail_twice(request: object, context: grpc.ServicerContext) -> Any:
        if server.attempts[method] <= 2:
            server.fail(context, grpc.StatusCode.UNAVAILABLE)
        return good(request, context)

    server.answers[method] = fail_twice
    if method == "Generate":
        text = (await client.generate("a prompt")).text
    else:
        text = "".join([chunk.text async for chunk in client.stream("a prompt")])
    assert text == "Hello world"
    assert server.attempts[method] == 3


async def test_four_attempts_are_made_and_no_more(server: Any, client: AsyncClient) -> None:
    server.answers["Generate"] = lambda request, context: server.fail(context, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(kvfold_client.UnavailableError) as caught:
        await client.generate("a prompt")
    assert server.attempts["Generate"] == 4
    assert caught.value.can_be_retried


@pytest.mark.parametrize(
    "code", [code for code in EXCEPTIONS if code is not grpc.StatusCode.UNAVAILABLE], ids=lambda code: code.name
)
async def test_nothing_else_is_retried(server: Any, client: AsyncClient, code: grpc.StatusCode) -> None:
    server.answers["Generate"] = lambda request, context: server.fail(context, code)
    with pytest.raises(KvfoldError):
        await client.generate("a prompt")
    assert server.attempts["Generate"] == 1


async def test_retries_are_throttled_when_calls_keep_failing(server: Any, client: AsyncClient) -> None:
    server.answers["Generate"] = lambda request, context: server.fail(context, grpc.StatusCode.UNAVAILABLE)
    for _ in range(3):
        with pytest.raises(kvfold_client.UnavailableError):
            await client.generate("a prompt")
    assert server.attempts["Generate"] < 12


async def test_the_deadline_is_sent_and_kept(server: Any, client: AsyncClient) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        async for _ in client.stream("a prompt", timeout=0.3):
            pass
    assert isinstance(caught.value, kvfold_client.DeadlineExceededError)
    assert 0.2 < time.monotonic() - began < 10
    assert 0 < server.calls[0].time_remaining < 0.4
    assert server.cancelled.wait(10)


@pytest.mark.parametrize(("timeout", "expected"), [({}, 20), ({"timeout": 5}, 5), ({"timeout": None}, None)])
async def test_a_call_has_the_clients_deadline_or_its_own(
    server: Any, client: AsyncClient, timeout: Any, expected: float | None
) -> None:
    await client.generate("a prompt", **timeout)
    remaining = server.calls[0].time_remaining
    assert remaining is None if expected is None else expected - 3 < remaining < expected + 1


async def test_a_client_has_a_deadline_unless_told_otherwise(server: Any) -> None:
    async with AsyncClient(server.address) as client:
        await client.generate("a prompt")
    assert 110 < server.calls[0].time_remaining < 121


@pytest.mark.parametrize("make", [lambda client: client.generate("x"), lambda client: client.list_models()])
def test_an_unreachable_server_is_unavailable(make: Callable[[Client], object]) -> None:
    with Client(f"127.0.0.1:{free_port()}", timeout=20) as client, pytest.raises(kvfold_client.UnavailableError):
        make(client)


async def test_an_answer_beyond_the_limit_is_refused(server: Any, client: AsyncClient) -> None:
    large = generation_pb2.GenerateResponse(text="x" * (33 * 1024 * 1024))
    server.answers["Generate"] = lambda request, context: large
    with pytest.raises(kvfold_client.ResourceExhaustedError):
        await client.generate("a prompt")
