"""The inside of an engine process: one thread computes, one reads the channel, one gives signs of life."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from kvfold_server.channel.codec import CodecError, decode_from_front_end, encode_to_front_end
from kvfold_server.channel.frames import FrameBuffer, FrameError
from kvfold_server.channel.messages import CancelRequest, EngineReady, Heartbeat, StepOutput
from kvfold_server.generation.events import FinishCause, MemoryReport, RequestFinished

if TYPE_CHECKING:
    import socket

    from kvfold_server.channel.messages import EngineMessage, FrontEndMessage
    from kvfold_server.engine.interface import Engine
    from kvfold_server.generation.events import EngineEvent
    from kvfold_server.generation.pool_snapshot import PoolSnapshot

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
SNAPSHOT_SECONDS = 0.1
"""While requests run and none ends, the state of the pool is sent at most this often."""

READ_BYTES = 1 << 18


class EngineChannel:
    """The engine's end of the socket. Sending is safe from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def send(self, message: EngineMessage) -> None:
        """Sends a message; waits while the front end does not read. Raises OSError if it is gone."""
        frames = encode_to_front_end(message)
        with self._lock:
            for frame in frames:
                self._socket.sendall(frame)

    def read_into(self, inbox: SimpleQueue[FrontEndMessage]) -> None:
        """Reads messages for ever. When the front end is gone, or talks nonsense, the process ends at once.

        Nobody is left to whom a result could be given, and a step that is being computed may take long.
        """
        buffer = FrameBuffer()
        try:
            while data := self._socket.recv(READ_BYTES):
                for payload in buffer.feed(data):
                    inbox.put(decode_from_front_end(payload))
        except (OSError, FrameError, CodecError) as error:
            logger.error("the channel to the front end broke: %s", error)
        os._exit(0)


class Heart:
    """Tells the front end twice a second that the process lives, and how long it has been busy with a step."""

    def __init__(self, channel: EngineChannel) -> None:
        self._channel = channel
        self._step_began: float | None = None
        self._snapshot: PoolSnapshot | None = None

    def beat_for_ever(self) -> None:
        """The body of a daemon thread."""
        while True:
            began = self._step_began
            busy = 0.0 if began is None else time.monotonic() - began
            try:
                self._channel.send(Heartbeat(self._snapshot, busy))
            except OSError:
                return  # the reading thread ends the process
            time.sleep(HEARTBEAT_SECONDS)

    def step_begins(self) -> None:
        """From now on the process is busy."""
        self._step_began = time.monotonic()

    def step_ends(self, snapshot: PoolSnapshot) -> None:
        """The process is not busy any more; heartbeats carry this state of the pool."""
        self._step_began = None
        self._snapshot = snapshot


class EngineLoop:
    """Takes what the front end wants, lets the engine compute a step, sends what it brought; again and again."""

    def __init__(
        self, engine: Engine, channel: EngineChannel, heart: Heart, inbox: SimpleQueue[FrontEndMessage]
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._heart = heart
        self._inbox = inbox
        self._snapshot_sent_at = 0.0

    def run_for_ever(self) -> None:
        """Ends only with an exception: of the engine, when it is broken, or of the channel."""
        self._heart.step_ends(self._engine.snapshot())
        self._channel.send(EngineReady(self._engine.info))
        while True:
            self.run_once()

    def run_once(self) -> None:
        """One turn. Waits for a message if the engine has nothing to do."""
        events = self._take_messages()
        self._heart.step_begins()
        if self._engine.has_work:
            events.extend(self._engine.step())
        snapshot = self._engine.snapshot()
        self._heart.step_ends(snapshot)
        self._send(events, snapshot)

    def _take_messages(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        if not self._engine.has_work:
            events.extend(self._take(self._inbox.get()))
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                return events
            events.extend(self._take(message))

    def _take(self, message: FrontEndMessage) -> list[EngineEvent]:
        if isinstance(message, CancelRequest):
            return self._engine.cancel(message.request_id)
        try:
            return self._engine.submit(message)
        except ValueError:
            # The front end validates; what it lets through by mistake must not end the other requests.
            error_id = secrets.token_hex(8)
            logger.exception("request %d cannot be taken; error id %s", message.request_id, error_id)
            report = MemoryReport(message.shared_layers, kv_bytes_held=0, kv_bytes_full=0, kv_bytes_held_peak=0)
            cause = FinishCause.INTERNAL_ERROR
            return [RequestFinished(message.request_id, cause, report, error_id=error_id)]

    def _send(self, events: list[EngineEvent], snapshot: PoolSnapshot) -> None:
        now = time.monotonic()
        ended = any(isinstance(event, RequestFinished) for event in events)
        news = ended or now - self._snapshot_sent_at > SNAPSHOT_SECONDS
        if news:
            self._snapshot_sent_at = now
        if events or news:
            self._channel.send(StepOutput(tuple(events), snapshot if news else None))
