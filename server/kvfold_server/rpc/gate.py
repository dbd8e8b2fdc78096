"""Lets calls in, counts them, and closes when the server drains."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from kvfold_server.generation.errors import DrainingError

if TYPE_CHECKING:
    from types import TracebackType


class Gate:
    """A context manager around every call. `closed` is set from the moment that the server drains."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> None:
        """Raises DrainingError when the gate is closed."""
        if self.closed.is_set():
            raise DrainingError
        self._inside += 1
        self._empty.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._empty.set()

    def close(self) -> None:
        """Lets no further call in."""
        self.closed.set()

    async def wait_empty(self, seconds: float) -> int:
        """Waits for the calls inside to end. Returns how many are left when the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), seconds)
        return self._inside
