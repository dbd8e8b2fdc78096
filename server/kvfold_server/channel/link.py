"""The front end's end of the socket to one engine process."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

from kvfold_server.channel.codec import CodecError, decode_from_engine
from kvfold_server.channel.frames import FrameBuffer, FrameError
from kvfold_server.channel.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold_server.channel.messages import EngineMessage


class EngineLink(asyncio.Protocol):
    """Reads frames and passes them on; notes when the engine was last heard.

    `lost` is done, with words for the log, when nothing more will come. `heard_at` is in seconds of time.monotonic.
    """

    def __init__(self, receive: Callable[[EngineMessage], None]) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heard_at = time.monotonic()
        self.busy_seconds = 0.0
        self._receive = receive
        self._buffer = FrameBuffer()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self.heard_at = time.monotonic()
        try:
            for payload in self._buffer.feed(data):
                message = decode_from_engine(payload)
                if isinstance(message, Heartbeat):
                    self.busy_seconds = message.busy_seconds
                self._receive(message)
        except (FrameError, CodecError) as error:
            self._end(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._end("it closed the channel" if exc is None else f"the channel broke: {exc}")

    def send(self, frame: bytes) -> None:
        """Sends a frame. What is sent to an engine that is gone is dropped: its loss is noticed elsewhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        """Closes the socket, which tells the engine to exit."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self.close()
