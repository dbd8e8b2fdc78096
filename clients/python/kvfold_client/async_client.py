"""The asynchronous client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from kvfold.v1 import generation_pb2
from kvfold.v1.generation_pb2_grpc import GenerationServiceStub
from kvfold.v1.memory_pb2_grpc import MemoryServiceStub
from kvfold.v1.model_pb2_grpc import ModelServiceStub
from kvfold_client import requests, responses
from kvfold_client.channel import DEFAULT_TIMEOUT_SECONDS, Tls, call_arguments, channel_options
from kvfold_client.errors import error_of
from kvfold_client.stream import AsyncStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from kvfold_client.generation import Generation, GenerationChunk
    from kvfold_client.memory import ModelMemory
    from kvfold_client.model import ModelDescription, ModelSummary
    from kvfold_client.options import CallOptions, GenerationOptions
    from kvfold_client.prompt import Chat, Prompt

_Message = TypeVar("_Message")
_Result = TypeVar("_Result")


class AsyncClient:
    """A connection to a kvfold server, for asyncio.

        async with AsyncClient("localhost:50051") as client:
            async with client.stream([{"role": "user", "content": "Hello!"}], max_tokens=64) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")

    - `target`: `host:port`, or any gRPC target such as `dns:///service:port`; calls go in turn to all its addresses.
    - `tls`: None for a plain connection.
    - `metadata`: sent with every call, such as `{"authorization": "Bearer ..."}`.
    - `timeout`: seconds that a call may take, unless it names its own; None for no deadline. `watch_memory` has none.

    The keyword arguments of the methods are listed in `CallOptions` and `GenerationOptions`. Every method raises
    `KvfoldError` (see `kvfold_client.errors`) where the call fails. UNAVAILABLE is retried by the transport, as long as
    nothing was received.

    The connection is made when it is first needed, and belongs to the event loop of that moment. Close it with
    `async with` or `close`; it cannot be used after that.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self._target = target
        self._tls = tls
        self._metadata = dict(metadata or {})
        self._timeout = timeout
        self._open_channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection and cancels what still runs on it."""
        if self._open_channel is not None:
            await self._open_channel.close()

    async def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Generation:
        """Generates a whole answer. Cancelling the task cancels the request on the server."""
        request = requests.generation_request(generation_pb2.GenerateRequest, prompt, options)
        return await self._call(GenerationServiceStub(self._channel).Generate, request, responses.generation, options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> AsyncStream[GenerationChunk]:
        """Generates an answer piece by piece. Leaving the stream early cancels the request on the server."""
        request = requests.generation_request(generation_pb2.GenerateStreamRequest, prompt, options)
        call = GenerationServiceStub(self._channel).GenerateStream(
            request, **call_arguments(options, self._timeout, self._metadata)
        )
        return AsyncStream(call, responses.generation_chunk)

    async def tokenize(self, text: str | Chat, **options: Unpack[CallOptions]) -> tuple[int, ...]:
        """Returns the token ids that the model would be given for a text or a chat."""
        request = requests.tokenize_request(text, options)
        return await self._call(GenerationServiceStub(self._channel).Tokenize, request, responses.token_ids, options)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None, **options: Unpack[CallOptions]
    ) -> str:
        """Returns the text of some tokens, by default without special ones."""
        request = requests.detokenize_request(token_ids, skip_special_tokens, options)
        return await self._call(GenerationServiceStub(self._channel).Detokenize, request, responses.text, options)

    async def list_models(self, **options: Unpack[CallOptions]) -> tuple[ModelSummary, ...]:
        """Lists the models that the server hosts."""
        request = requests.list_models_request(options)
        return await self._call(ModelServiceStub(self._channel).ListModels, request, responses.model_summaries, options)

    async def get_model(self, **options: Unpack[CallOptions]) -> ModelDescription:
        """Describes a model: its layers, its KV bytes per token, and its sharing plan with measured quality."""
        request = requests.get_model_request(options)
        return await self._call(ModelServiceStub(self._channel).GetModel, request, responses.model_description, options)

    async def get_memory(self, **options: Unpack[CallOptions]) -> tuple[ModelMemory, ...]:
        """Returns the state of the pools now, of one model or of all."""
        request = requests.get_memory_request(options)
        return await self._call(MemoryServiceStub(self._channel).GetMemory, request, responses.model_memories, options)

    def watch_memory(
        self, *, interval: float = 1.0, **options: Unpack[CallOptions]
    ) -> AsyncStream[tuple[ModelMemory, ...]]:
        """Streams the state of the pools, at once and then every `interval` seconds, until the stream is left."""
        request = requests.watch_memory_request(interval, options)
        call = MemoryServiceStub(self._channel).WatchMemory(request, **call_arguments(options, None, self._metadata))
        return AsyncStream(call, responses.model_memories)

    @property
    def _channel(self) -> grpc.aio.Channel:
        if self._open_channel is None:
            options = channel_options(self._target, self._tls)
            if self._tls is None:
                self._open_channel = grpc.aio.insecure_channel(self._target, options)
            else:
                self._open_channel = grpc.aio.secure_channel(self._target, self._tls.credentials(), options)
        return self._open_channel

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, _Message],
        request: object,
        convert: Callable[[_Message], _Result],
        options: GenerationOptions | CallOptions,
    ) -> _Result:
        try:
            return convert(await method(request, **call_arguments(options, self._timeout, self._metadata)))
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
