"""Streams yield what the server sends, and leaving them ends the request on the server."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import pytest

from kvfold.v1 import generation_pb2
from kvfold_client import AsyncClient, Client, FinishReason, UnavailableError


async def test_chunks_come_in_order_with_the_facts_of_first_and_last(client: AsyncClient) -> None:
    chunks = [chunk async for chunk in client.stream("a prompt")]
    assert [chunk.text for chunk in chunks] == ["Hello", " world"]
    assert [chunk.token_ids for chunk in chunks] == [(7,), (8,)]
    first, last = chunks
    assert first.prompt is not None
    assert first.prompt.token_count == 3
    assert first.finish is None
    assert last.prompt is None
    assert last.finish is not None
    assert last.finish.reason is FinishReason.LENGTH


async def test_a_chunk_is_there_before_the_stream_ends(server: Any, client: AsyncClient) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    async with client.stream("a prompt") as stream:
        assert (await anext(stream)).text == "Hello"
        assert (await anext(stream)).text == "x"


async def test_leaving_the_block_cancels_the_request(server: Any, client: AsyncClient) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    async with client.stream("a prompt") as stream:
        async for _ in stream:
            break
    assert await asyncio.to_thread(server.cancelled.wait, 10)
    assert [chunk async for chunk in stream] == []


async def test_dropping_the_stream_cancels_the_request(server: Any, client: AsyncClient) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    async for _ in client.stream("a prompt"):
        break
    gc.collect()
    assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_cancelling_the_task_cancels_the_request(server: Any, client: AsyncClient) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    started = asyncio.Event()

    async def consume() -> None:
        async for _ in client.stream("a prompt"):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_a_failure_in_the_middle_is_typed_and_not_to_be_retried(server: Any, client: AsyncClient) -> None:
    def fail_after_one(request: object, context: grpc.ServicerContext) -> Any:
        yield generation_pb2.GenerateStreamResponse(text="Hel", token_ids=[7])
        server.fail(context, grpc.StatusCode.UNAVAILABLE)

    server.answers["GenerateStream"] = fail_after_one
    stream = client.stream("a prompt")
    assert (await anext(stream)).text == "Hel"
    with pytest.raises(UnavailableError) as caught:
        await anext(stream)
    assert caught.value.partial
    assert not caught.value.can_be_retried
    assert server.attempts["GenerateStream"] == 1


async def test_memory_is_watched_until_the_stream_ends(server: Any, client: AsyncClient) -> None:
    seen = [models[0].model async for models in client.watch_memory()]
    assert seen == ["tiny"] * 3
    assert server.calls[0].time_remaining is None


def test_the_synchronous_stream_yields_the_same(sync_client: Client) -> None:
    assert [chunk.text for chunk in sync_client.stream("a prompt")] == ["Hello", " world"]


def test_leaving_the_synchronous_stream_cancels_the_request(server: Any, sync_client: Client) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    with sync_client.stream("a prompt") as stream:
        assert next(stream).text == "Hello"
    assert server.cancelled.wait(10)
    assert list(stream) == []


def test_dropping_the_synchronous_stream_cancels_the_request(server: Any, sync_client: Client) -> None:
    server.answers["GenerateStream"] = server.chunks_until_cancelled
    for _ in sync_client.stream("a prompt"):
        break
    gc.collect()
    assert server.cancelled.wait(10)
