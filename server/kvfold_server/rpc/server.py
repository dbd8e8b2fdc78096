"""The gRPC server: services, health, reflection, limits, TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvfold.v1 import generation_pb2_grpc, memory_pb2_grpc, model_pb2_grpc
from kvfold_server.rpc.boundary import Boundary
from kvfold_server.rpc.gate import Gate
from kvfold_server.rpc.generation import GenerationServicer
from kvfold_server.rpc.memory import MemoryServicer
from kvfold_server.rpc.model import ModelServicer

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvfold_server.rpc.hosted_model import HostedModels

SERVICES = ("kvfold.v1.GenerationService", "kvfold.v1.ModelService", "kvfold.v1.MemoryService")
HEALTH = "grpc.health.v1.Health"

MAX_REQUEST_BYTES = 4 * 2**20
"""Four million characters are more than any context holds."""

MAX_CONCURRENT_STREAMS = 1024
"""Of one connection; as many as may wait for an engine."""

MIN_PING_INTERVAL_MS = 60_000
"""Clients may ask once a minute whether the connection lives, also while no call runs."""

CONNECTION_AGE_GRACE_MS = 600_000
"""Streams of a connection that has reached its age have ten minutes to end."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM-encoded certificate chain and private key."""

    certificate: bytes
    key: bytes


class RpcServer:
    """Serves the models over gRPC until it is stopped. Health "" says that the process lives.

    The health of each service says whether all models can be asked.
    """

    def __init__(self, models: HostedModels, max_connection_age: float | None = None) -> None:
        self.gate = Gate()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                Boundary(_request_classes(*SERVICES), self.gate),
                # A gate of their own that stays open: these are answered while the server drains.
                Boundary(_request_classes(HEALTH, reflection.SERVICE_NAME), Gate()),
            ],
            options=_options(max_connection_age),
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(models), self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(models), self._server)
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(models, self.gate), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, HEALTH, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int, tls: TlsFiles | None = None) -> int:
        """Listens; port 0 takes a free one. Returns the port. Raises OSError if it cannot be had."""
        await self.set_ready(False)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)])
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:  # gRPC says no more than that it failed
            raise OSError(f"cannot listen on {address}") from error
        await self._server.start()
        return bound

    async def set_ready(self, ready: bool) -> None:
        """Tells health checks whether all models can be asked. Once the server drains they cannot."""
        serving = ready and not self.gate.closed.is_set()
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in SERVICES:
            await self._health.set(service, status)

    async def drain(self, seconds: float) -> int:
        """Refuses new calls and waits for the running ones. Returns how many are left when the time is over."""
        self.gate.close()
        await self.set_ready(False)
        return await self.gate.wait_empty(seconds)

    async def stop(self) -> None:
        """Ends what still runs, and closes all connections."""
        await self._server.stop(grace=None)


def _request_classes(*services: str) -> dict[str, type[Message]]:
    pool = descriptor_pool.Default()
    return {
        f"/{service}/{method.name}": message_factory.GetMessageClass(method.input_type)
        for service in services
        for method in pool.FindServiceByName(service).methods
    }


def _options(max_connection_age: float | None) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),  # two servers on one port are a mistake, not a cluster
    ]
    if max_connection_age is not None:
        options.append(("grpc.max_connection_age_ms", int(max_connection_age * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_MS))
    return options
