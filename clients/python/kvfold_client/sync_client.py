"""The synchronous client: the same methods as `AsyncClient`, on the same requests, results and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from kvfold.v1 import generation_pb2
from kvfold.v1.generation_pb2_grpc import GenerationServiceStub
from kvfold.v1.memory_pb2_grpc import MemoryServiceStub
from kvfold.v1.model_pb2_grpc import ModelServiceStub
from kvfold_client import requests, responses
from kvfold_client.channel import DEFAULT_TIMEOUT_SECONDS, Tls, call_arguments, channel_options
from kvfold_client.errors import error_of
from kvfold_client.stream import Stream

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


class Client:
    """A connection to a kvfold server, for synchronous code; may be used from several threads.

        with Client("localhost:50051") as client:
            for chunk in client.stream("The sea is", max_tokens=32):
                print(chunk.text, end="")

    Arguments, results and errors are those of `AsyncClient`.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self._metadata = dict(metadata or {})
        self._timeout = timeout
        options = channel_options(target, tls)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options)
        self._generation = GenerationServiceStub(self._channel)
        self._models = ModelServiceStub(self._channel)
        self._memory = MemoryServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and cancels what still runs on it."""
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Generation:
        """Generates a whole answer."""
        request = requests.generation_request(generation_pb2.GenerateRequest, prompt, options)
        return self._call(self._generation.Generate, request, responses.generation, options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Stream[GenerationChunk]:
        """Generates an answer piece by piece. Leaving the stream early cancels the request on the server."""
        request = requests.generation_request(generation_pb2.GenerateStreamRequest, prompt, options)
        call = self._generation.GenerateStream(request, **call_arguments(options, self._timeout, self._metadata))
        return Stream(call, responses.generation_chunk)

    def tokenize(self, text: str | Chat, **options: Unpack[CallOptions]) -> tuple[int, ...]:
        """Returns the token ids that the model would be given for a text or a chat."""
        request = requests.tokenize_request(text, options)
        return self._call(self._generation.Tokenize, request, responses.token_ids, options)

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool | None = None, **options: Unpack[CallOptions]
    ) -> str:
        """Returns the text of some tokens, by default without special ones."""
        request = requests.detokenize_request(token_ids, skip_special_tokens, options)
        return self._call(self._generation.Detokenize, request, responses.text, options)

    def list_models(self, **options: Unpack[CallOptions]) -> tuple[ModelSummary, ...]:
        """Lists the models that the server hosts."""
        request = requests.list_models_request(options)
        return self._call(self._models.ListModels, request, responses.model_summaries, options)

    def get_model(self, **options: Unpack[CallOptions]) -> ModelDescription:
        """Describes a model: its layers, its KV bytes per token, and its sharing plan with measured quality."""
        request = requests.get_model_request(options)
        return self._call(self._models.GetModel, request, responses.model_description, options)

    def get_memory(self, **options: Unpack[CallOptions]) -> tuple[ModelMemory, ...]:
        """Returns the state of the pools now, of one model or of all."""
        request = requests.get_memory_request(options)
        return self._call(self._memory.GetMemory, request, responses.model_memories, options)

    def watch_memory(self, *, interval: float = 1.0, **options: Unpack[CallOptions]) -> Stream[tuple[ModelMemory, ...]]:
        """Streams the state of the pools, at once and then every `interval` seconds, until the stream is left."""
        request = requests.watch_memory_request(interval, options)
        call = self._memory.WatchMemory(request, **call_arguments(options, None, self._metadata))
        return Stream(call, responses.model_memories)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Any, _Message],
        request: object,
        convert: Callable[[_Message], _Result],
        options: GenerationOptions | CallOptions,
    ) -> _Result:
        try:
            return convert(method(request, **call_arguments(options, self._timeout, self._metadata)))
        except grpc.RpcError as error:
            raise error_of(error) from error
