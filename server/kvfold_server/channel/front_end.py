"""An engine as the front end sees it: one object for the life of the server, whichever process is behind it."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

from kvfold_server.channel.codec import encode_to_engine
from kvfold_server.channel.messages import CancelRequest, EngineReady, Heartbeat, LoadFailed, StepOutput
from kvfold_server.channel.request_stream import RequestStream
from kvfold_server.generation.errors import EngineUnavailableError, OverloadedError, RequestError
from kvfold_server.generation.events import RequestFinished
from kvfold_server.generation.request import RequestId

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold_server.channel.messages import EngineMessage
    from kvfold_server.generation.model_info import ModelInfo
    from kvfold_server.generation.pool_snapshot import PoolSnapshot
    from kvfold_server.generation.request import GenerationRequest

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A request that was in two engines when they were lost may be what kills them: it is not given to a third."""


class EngineHandle:
    """Submits requests and hands out what comes back. Lives on one event loop; imports no torch.

    The supervisor connects it to one engine process after another. When a process is lost, requests that it had said
    something about fail with EngineUnavailableError; the others are submitted to the next one.
    """

    def __init__(
        self, name: str, on_ready_changed: Callable[[], None] | None = None, max_open: int | None = None
    ) -> None:
        self.name = name
        self.info: ModelInfo | None = None
        """The model, once it has been loaded for the first time; stays while the engine restarts."""
        self.snapshot: PoolSnapshot | None = None
        """The latest state of the pool; None while the engine is not ready."""
        self._on_ready_changed = on_ready_changed
        self._max_open = max_open
        self._send: Callable[[bytes], None] | None = None
        self._ready = False
        self._streams: dict[RequestId, RequestStream] = {}
        self._ids = itertools.count(1)

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._ready

    @property
    def open_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def new_request_id(self) -> RequestId:
        """An id that no other request of this engine has had."""
        return RequestId(next(self._ids))

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Gives a validated request to the engine. The caller reads the stream to its end, or abandons it.

        Raises EngineUnavailableError while there is no engine, and OverloadedError when `max_open` requests are
        open: the engine would refuse one more as well, but only after its step.
        """
        if not self._ready:
            raise EngineUnavailableError(f"the engine of model {self.name!r} is starting")
        if self._max_open is not None and len(self._streams) >= self._max_open:
            raise OverloadedError
        stream = RequestStream(request, self.abandon)
        self._streams[request.request_id] = stream
        self._submit(stream, request)
        return stream

    def stop(self, stream: RequestStream) -> None:
        """Ends a request whose answer is complete; the stream goes on to its end, without further tokens."""
        stream.ignore_tokens()
        self._cancel(stream.request_id)

    def abandon(self, stream: RequestStream) -> None:
        """Ends a request that nobody waits for any more. Does nothing if it has ended."""
        if self._streams.pop(stream.request_id, None) is not None:
            self._cancel(stream.request_id)

    def connect(self, send: Callable[[bytes], None]) -> None:
        """Takes the way to a new engine process. It is used after the engine has said that it is ready."""
        self._send = send

    def receive(self, message: EngineMessage) -> None:
        """Takes what the engine says."""
        match message:
            case StepOutput():
                if message.snapshot is not None:
                    self.snapshot = message.snapshot
                self._dispatch(message)
            case Heartbeat():
                if message.snapshot is not None:
                    self.snapshot = message.snapshot
            case EngineReady():
                self.info = message.info
                self._set_ready(True)
                self._resubmit()
            case LoadFailed():
                pass  # the supervisor's business

    def disconnect(self) -> None:
        """The engine process is gone. Requests that it had said something about fail, the others wait for the next one.

        They wait once: if that one is lost before it is ready, the engine may never be again, and they fail as well.
        """
        was_ready = self._ready
        self._send = None
        self.snapshot = None
        self._set_ready(False)
        for stream in list(self._streams.values()):
            if stream.request is None or stream.attempts >= MAX_ATTEMPTS or not was_ready:
                self._fail(stream, EngineUnavailableError(f"the engine of model {self.name!r} was lost and restarts"))

    def fail_all(self, error: RequestError) -> None:
        """Ends every open request with an error: there will be no other engine."""
        for stream in list(self._streams.values()):
            self._fail(stream, error)

    def _dispatch(self, output: StepOutput) -> None:
        streams = self._streams
        for event in output.events:
            stream = streams.get(event.request_id)
            if stream is None:
                continue  # abandoned meanwhile
            stream.push(event)
            if isinstance(event, RequestFinished):
                streams.pop(event.request_id, None)

    def _submit(self, stream: RequestStream, request: GenerationRequest) -> None:
        if self.info is not None:
            stream.pool_bytes = self.info.pool_bytes
        if self._send is not None:
            self._send(encode_to_engine(request))

    def _resubmit(self) -> None:
        for stream in self._streams.values():
            if stream.request is not None:
                stream.attempts += 1
                self._submit(stream, stream.request)
                logger.info("model %s: request %d is submitted again", self.name, stream.request_id)

    def _cancel(self, request_id: RequestId) -> None:
        if self._send is not None and self._ready:
            self._send(encode_to_engine(CancelRequest(request_id)))

    def _fail(self, stream: RequestStream, error: RequestError) -> None:
        self._streams.pop(stream.request_id, None)
        stream.fail(error)

    def _set_ready(self, ready: bool) -> None:
        if self._ready != ready:
            self._ready = ready
            if self._on_ready_changed is not None:
                self._on_ready_changed()
