"""What an engine says about one request, on its way to the one who waits for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from kvfold_server.generation.errors import (
    EngineFailureError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
    SlowReaderError,
)
from kvfold_server.generation.events import EngineEvent, FinishCause, PromptScored, RequestFinished, TokenGenerated

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold_server.generation.events import PositionLogprobs
    from kvfold_server.generation.request import GenerationRequest, RequestId

MAX_UNREAD_BYTES = 200 * 2**10
"""What a stream keeps for a reader that is busy with its last message; with that message it is below 256 KiB."""

TOKEN_BYTES = 100
LOGPROB_BYTES = 164
ALTERNATIVE_BYTES = 120
"""The most that a token takes as objects or in a message, what its log-probability adds, and each alternative."""


class StreamBatch(NamedTuple):
    """Everything that arrived since the last batch. `logprobs` has an entry a token if they were asked for."""

    prompt_logprobs: tuple[PositionLogprobs, ...] | None
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    finished: RequestFinished | None


class RequestStream:
    """A bounded buffer between the engine's link and one reader. Tokens that arrive before the reader comes are joined.

    Every stream ends once: with a batch that has `finished`, or with a RequestError. A reader that lets too much wait
    loses the stream with SlowReaderError, and `on_overflow` is called to end the request in the engine. One that waits
    itself does not: if much comes at once, because this process stood still, it is not the reader's fault.
    """

    __slots__ = (
        "_error",
        "_finished",
        "_logprobs",
        "_on_overflow",
        "_prompt_logprobs",
        "_stopping",
        "_token_ids",
        "_unread_bytes",
        "_waiter",
        "attempts",
        "pool_bytes",
        "request",
        "request_id",
    )

    def __init__(self, request: GenerationRequest, on_overflow: Callable[[RequestStream], None]) -> None:
        self.request_id: RequestId = request.request_id
        self.request: GenerationRequest | None = request
        """Kept until the engine has said something: until then it can be submitted again."""
        self.attempts = 1
        self.pool_bytes = 0
        self._on_overflow = on_overflow
        self._prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._unread_bytes = 0
        self._finished: RequestFinished | None = None
        self._error: RequestError | None = None
        self._stopping = False
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> StreamBatch:
        """Waits until something is there, and returns all of it. Raises the RequestError that ended the stream."""
        while self._error is None and self._finished is None and not self._token_ids:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        if self._error is not None:
            raise self._error
        batch = StreamBatch(self._prompt_logprobs, self._token_ids, self._logprobs, self._finished)
        self._prompt_logprobs = None
        self._token_ids = []
        if self._logprobs:
            self._logprobs = []
        self._unread_bytes = 0
        return batch

    def ignore_tokens(self) -> None:
        """From now on only the end of the request is of interest."""
        self._stopping = True

    def push(self, event: EngineEvent) -> None:
        """Takes an event from the engine. Prompt log-probabilities wait for the first token."""
        self.request = None
        if isinstance(event, TokenGenerated):
            if self._error is None and not self._stopping:
                self._push_token(event)
        elif isinstance(event, PromptScored):
            self._prompt_logprobs = event.logprobs
        else:
            self._finish(event)

    def fail(self, error: RequestError) -> None:
        """Ends the stream with an error, unless it has ended."""
        if self._finished is None and self._error is None:
            self._error = error
            self._token_ids = []
            self._logprobs = []
            self._wake()

    def _push_token(self, event: TokenGenerated) -> None:
        self._token_ids.append(event.token_id)
        self._unread_bytes += TOKEN_BYTES
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
            self._unread_bytes += LOGPROB_BYTES + ALTERNATIVE_BYTES * len(event.logprobs.top)
        if self._unread_bytes > MAX_UNREAD_BYTES and self._waiter is None:
            self.fail(SlowReaderError())
            self._on_overflow(self)
        self._wake()

    def _finish(self, event: RequestFinished) -> None:
        match event.cause:
            case FinishCause.QUEUE_FULL:
                self.fail(OverloadedError())
            case FinishCause.TOO_LARGE:
                self.fail(RequestTooLargeError(event.bytes_needed, self.pool_bytes))
            case FinishCause.INTERNAL_ERROR:
                self.fail(EngineFailureError(event.error_id))
            case FinishCause.STOP_TOKEN | FinishCause.LENGTH | FinishCause.CANCELLED:
                self._finished = event
                self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
