"""A request on its way through the engine, as its call sees it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvfold_server.generation.answer import AnswerChunk, AnswerEnd, EndReason
from kvfold_server.generation.errors import DeadlineError
from kvfold_server.generation.events import FinishCause
from kvfold_server.text.answer import AnswerText
from kvfold_server.text.detokenizer import make_detokenizer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvfold_server.channel.front_end import EngineHandle
    from kvfold_server.channel.request_stream import StreamBatch
    from kvfold_server.generation.events import RequestFinished
    from kvfold_server.generation.request import GenerationRequest
    from kvfold_server.text.tokenizer import Tokenizer


class RunningAnswer:
    """Submits a request and turns what comes back into chunks. A context manager: leaving it ends the request.

    `deadline` is in seconds of the event loop's clock; when it passes, the request ends in the engine and `next`
    raises.
    """

    def __init__(
        self,
        handle: EngineHandle,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        stop_strings: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        deadline: float | None = None,
    ) -> None:
        """Raises EngineUnavailableError if there is no engine to submit to."""
        detokenizer = make_detokenizer(tokenizer, request.prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._text = AnswerText(detokenizer, stop_strings)
        self._handle = handle
        self._prompt_tokens = len(request.prompt_token_ids)
        self._completion_tokens = 0
        self._stream = handle.submit(request)
        self._timer: asyncio.TimerHandle | None = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._handle.abandon(self._stream)

    async def next(self) -> AnswerChunk:
        """Waits for the next chunk; the last one has `end`. Raises the RequestError that ended the request."""
        batch = await self._stream.next()
        finished = batch.finished
        stopped_by_token = finished is not None and finished.cause is FinishCause.STOP_TOKEN
        spoken = batch.token_ids[:-1] if stopped_by_token else batch.token_ids  # a stop token is no text
        piece = self._text.add(spoken)
        if piece.matched is not None:
            return await self._stop_at(batch, piece.text, piece.token_count, piece.matched)
        text = piece.text
        self._completion_tokens += len(batch.token_ids)
        end = None
        if finished is not None:
            rest = self._text.finish()
            text += rest.text
            end = self._end(finished, rest.matched, batch.token_ids[-1] if stopped_by_token else None)
        return AnswerChunk(text, batch.token_ids, batch.logprobs, batch.prompt_logprobs, end)

    async def _stop_at(self, batch: StreamBatch, text: str, token_count: int, matched: str) -> AnswerChunk:
        """Ends the request at a stop string; its end brings the memory report."""
        self._completion_tokens += token_count
        finished = batch.finished
        if finished is None:
            self._handle.stop(self._stream)
        while finished is None:
            finished = (await self._stream.next()).finished
        end = self._end(finished, matched, None)
        return AnswerChunk(
            text, batch.token_ids[:token_count], batch.logprobs[:token_count], batch.prompt_logprobs, end
        )

    def _end(self, finished: RequestFinished, stop_string: str | None, stop_token_id: int | None) -> AnswerEnd:
        stopped = stop_string is not None or stop_token_id is not None
        return AnswerEnd(
            reason=EndReason.STOP if stopped else EndReason.LENGTH,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            memory=finished.memory,
            stop_string=stop_string,
            stop_token_id=stop_token_id if stop_string is None else None,
        )

    def _expire(self) -> None:
        self._stream.fail(DeadlineError("generating" if self._completion_tokens else "waiting for the first token"))
        self._handle.abandon(self._stream)
