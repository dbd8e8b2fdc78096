"""A clock beside a streamed answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold_client import FinishInfo, GenerationChunk


class AnswerClock:
    """Times one answer, in seconds since the clock was made; `see` is called with every chunk as it comes."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._finish: FinishInfo | None = None
        self.seconds = 0.0

    def see(self, chunk: GenerationChunk) -> None:
        """Takes note of a chunk that just came."""
        self.seconds = time.monotonic() - self._began
        if self._first is None:
            self._first = self.seconds
        self._finish = chunk.finish or self._finish

    @property
    def first_token_seconds(self) -> float:
        """The time to the first token; the time so far if there was none."""
        return self.seconds if self._first is None else self._first

    @property
    def finish(self) -> FinishInfo:
        """How the answer ended. Raises RuntimeError as long as it has not."""
        if self._finish is None:
            raise RuntimeError("the answer has not ended")
        return self._finish
