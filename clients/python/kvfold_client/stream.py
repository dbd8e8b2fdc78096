"""Answers that arrive piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
import grpc.aio

from kvfold_client.errors import error_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

Item = TypeVar("Item", covariant=True)  # noqa: PLC0105  (the name a reader of `AsyncStream[Item]` expects)


class AsyncStream(Generic[Item]):
    """An asynchronous iterator over the pieces of a running call; it raises `KvfoldError` where the call fails.

    Leaving it early cancels the call: at once with `async with` or `close`, else when the last reference to it goes.
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, Any], convert: Callable[[Any], Item]) -> None:
        self._call = call
        self._convert = convert
        self._partial = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        if self._call.cancelled():
            raise StopAsyncIteration
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._partial) from error
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        self._partial = True
        return self._convert(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call if it still runs; the iteration ends. May be called again."""
        self._call.cancel()

    def __del__(self) -> None:
        self._call.cancel()  # grpc.aio keeps references to a running call, so that it would go on unseen


class Stream(Generic[Item]):
    """The same for synchronous code: an iterator, ended by `with`, `close` or the loss of its last reference."""

    def __init__(self, call: Any, convert: Callable[[Any], Item]) -> None:  # noqa: ANN401  (grpc's type for it is private)
        self._call = call
        self._convert = convert
        self._partial = False
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if self._closed:
            raise StopIteration
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            raise error_of(error, self._partial) from error
        self._partial = True
        return self._convert(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call if it still runs; the iteration ends. May be called again."""
        self._closed = True
        self._call.cancel()
