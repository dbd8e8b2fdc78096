"""A real gRPC server on a real socket, whose answers a test writes down."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2

from kvfold.v1 import generation_pb2, generation_pb2_grpc, memory_pb2, memory_pb2_grpc, model_pb2, model_pb2_grpc
from kvfold_client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from google.protobuf.message import Message

MEMORY = memory_pb2.MemoryReport(
    shared_layers=8, kv_bytes_held=220, kv_bytes_full=300, kv_bytes_saved=80, kv_bytes_held_peak=220
)
FINISH = generation_pb2.FinishInfo(
    reason=generation_pb2.FINISH_REASON_LENGTH,
    usage=generation_pb2.Usage(prompt_tokens=3, completion_tokens=2),
    memory=MEMORY,
)
CHUNKS = (
    generation_pb2.GenerateStreamResponse(prompt=generation_pb2.PromptInfo(token_count=3), text="Hello", token_ids=[7]),
    generation_pb2.GenerateStreamResponse(text=" world", token_ids=[8], finish=FINISH),
)
POOL = memory_pb2.ModelMemory(
    model="tiny",
    pool_bytes=1000,
    block_bytes=10,
    tokens_per_block=16,
    states=[
        memory_pb2.BlockStateBytes(state=memory_pb2.BLOCK_STATE_FREE, bytes=700),
        memory_pb2.BlockStateBytes(state=memory_pb2.BLOCK_STATE_PREFILL, bytes=100),
        memory_pb2.BlockStateBytes(state=memory_pb2.BLOCK_STATE_DECODE, bytes=200),
    ],
    running_requests=2,
    waiting_requests=1,
    kv_bytes_held=300,
    kv_bytes_full=400,
    kv_bytes_saved=100,
    ready=True,
)


@dataclass(frozen=True)
class ReceivedCall:
    """What the server saw of one attempt of a call."""

    method: str
    request: Any
    metadata: dict[str, str]
    time_remaining: float | None


class ScriptedServer(
    generation_pb2_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    memory_pb2_grpc.MemoryServiceServicer,
):
    """Answers as `answers[method]` says, called with the request and the context; keeps what it received."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: list[ReceivedCall] = []
        self.attempts: Counter[str] = Counter()
        self.cancelled = Event()
        self.answers: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = {
            "Generate": lambda request, context: generation_pb2.GenerateResponse(
                model="tiny",
                prompt=generation_pb2.PromptInfo(token_count=3),
                text="Hello world",
                token_ids=[7, 8],
                finish=FINISH,
            ),
            "GenerateStream": lambda request, context: iter(CHUNKS),
            "Tokenize": lambda request, context: generation_pb2.TokenizeResponse(token_ids=[1, 2, 3]),
            "Detokenize": lambda request, context: generation_pb2.DetokenizeResponse(text="abc"),
            "ListModels": lambda request, context: model_pb2.ListModelsResponse(
                models=[model_pb2.ModelSummary(name="tiny", ready=True)]
            ),
            "GetModel": lambda request, context: model_pb2.GetModelResponse(name="tiny"),
            "GetMemory": lambda request, context: memory_pb2.GetMemoryResponse(models=[POOL]),
            "WatchMemory": lambda request, context: iter([memory_pb2.WatchMemoryResponse(models=[POOL])] * 3),
        }

    def chunks_until_cancelled(self, request: object, context: grpc.ServicerContext) -> Iterator[Message]:
        """A stream that never ends by itself; sets `cancelled` when the client leaves."""
        left = Event()
        context.add_callback(lambda: (left.set(), self.cancelled.set()))
        yield CHUNKS[0]
        while not left.wait(0.01):
            yield generation_pb2.GenerateStreamResponse(text="x", token_ids=[9])

    def fail(
        self, context: grpc.ServicerContext, code: grpc.StatusCode, message: str = "why", *details: Message
    ) -> NoReturn:
        """Ends the call with a status and packed details, as a server of Google's error model does."""
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, message)

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = {entry.key: entry.value for entry in context.invocation_metadata()}
        remaining = context.time_remaining()  # without a deadline, this kind of server says centuries
        self.calls.append(ReceivedCall(method, request, metadata, remaining if remaining < 1e6 else None))
        self.attempts[method] += 1
        return self.answers[method](request, context)

    def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Generate", request, context)

    def GenerateStream(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._answer("GenerateStream", request, context)

    def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Tokenize", request, context)

    def Detokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("Detokenize", request, context)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("ListModels", request, context)

    def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("GetModel", request, context)

    def GetMemory(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("GetMemory", request, context)

    def WatchMemory(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._answer("WatchMemory", request, context)


def serve(servicer: ScriptedServer, credentials: grpc.ServerCredentials | None = None) -> grpc.Server:
    """Starts a server on a free port of this machine's loopback and notes its address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    servicer.address = f"127.0.0.1:{port}"
    server.start()
    return server


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    servicer = ScriptedServer()
    running = serve(servicer)
    yield servicer
    running.stop(grace=None).wait()


@pytest.fixture
def start_server() -> Iterator[Callable[[grpc.ServerCredentials], ScriptedServer]]:
    """Starts a server with credentials."""
    running: list[grpc.Server] = []

    def start(credentials: grpc.ServerCredentials) -> ScriptedServer:
        servicer = ScriptedServer()
        running.append(serve(servicer, credentials))
        return servicer

    yield start
    for each in running:
        each.stop(grace=None).wait()


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=20) as client:
        yield client


@pytest.fixture
def sync_client(server: ScriptedServer) -> Iterator[Client]:
    with Client(server.address, timeout=20) as client:
        yield client
