"""Many streams read at once, and when their tokens came."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from kvfold.v1 import generation_pb2, generation_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import grpc.aio

ENDLESS = 50_000


class StreamReaders:
    """`messages` holds the moment (of time.monotonic) and the number of tokens of each message, by stream."""

    def __init__(self, count: int) -> None:
        self.messages: list[list[tuple[float, int]]] = [[] for _ in range(count)]
        self._changed = asyncio.Event()

    @property
    def tokens(self) -> int:
        """Tokens that have come so far, on all streams."""
        return sum(count for stream in self.messages for _, count in stream)

    def gaps(self, start: float, end: float) -> list[float]:
        """The times between messages that came after `start` and before `end`, of all streams, in seconds."""
        return [
            later - earlier
            for stream in self.messages
            for earlier, later in pairwise(moment for moment, _ in stream if start < moment < end)
        ]

    async def until_all_have_begun(self) -> None:
        """Until each stream has had its first message."""
        while not all(self.messages):
            self._changed.clear()
            await self._changed.wait()

    async def read(self, index: int, call: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
        """Reads a stream to its end."""
        stream = self.messages[index]
        async for message in call:
            stream.append((time.monotonic(), len(message.token_ids)))
            self._changed.set()


@asynccontextmanager
async def reading(channel: grpc.aio.Channel, prompts: Sequence[Sequence[int]]) -> AsyncIterator[StreamReaders]:
    """Opens an endless stream for each prompt and reads them all until the context is left."""
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    readers = StreamReaders(len(prompts))
    calls = [
        stub.GenerateStream(
            generation_pb2.GenerateStreamRequest(
                token_ids={"ids": prompt}, stopping={"max_tokens": ENDLESS, "ignore_eos": True}
            )
        )
        for prompt in prompts
    ]
    tasks = [asyncio.create_task(readers.read(index, call)) for index, call in enumerate(calls)]
    try:
        yield readers
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
