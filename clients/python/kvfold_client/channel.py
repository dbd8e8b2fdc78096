"""How a channel to a server is set up: retries, balancing, keepalive, limits, TLS."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvfold_client.options import CallOptions, GenerationOptions

SERVICES = ("kvfold.v1.GenerationService", "kvfold.v1.ModelService", "kvfold.v1.MemoryService")

DEFAULT_TIMEOUT_SECONDS = 120.0
"""Long enough for a queue and a few hundred tokens on a slow CPU, short enough that nobody waits for a lost server."""

_MAX_RESPONSE_BYTES = 32 * 1024 * 1024
"""Above the largest answer: 21 log-probabilities for each token of a long prompt are about 250 bytes a token."""

_SERVICE_CONFIG = {
    # One connection to each address that the name resolves to, calls in turn: a headless service then balances by call.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": service} for service in SERVICES],
            # The first message commits a call, so no caller ever sees an answer begin twice. gRPC adds the jitter.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # Retries stop while more than about one call in ten fails, so that clients do not hold an overloaded server down.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

ChannelOptions = list[tuple[str, str | int]]


@dataclass(frozen=True, slots=True)
class Tls:
    """How a connection is encrypted; all certificates and keys are PEM.

    - `root_certificates`: whom to trust; None for the roots that come with gRPC.
    - `certificate_chain` and `private_key`: the client's own, if the server asks for one.
    - `server_name`: the name to expect in the server's certificate, if it is not the one in the address.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = None
    server_name: str | None = None

    @classmethod
    def from_files(
        cls,
        root_certificates: str | Path | None = None,
        certificate_chain: str | Path | None = None,
        private_key: str | Path | None = None,
        server_name: str | None = None,
    ) -> Tls:
        """Reads the PEM files. Raises OSError if one cannot be read."""
        roots, chain, key = (
            None if path is None else Path(path).read_bytes()
            for path in (root_certificates, certificate_chain, private_key)
        )
        return cls(roots, chain, key, server_name)

    def credentials(self) -> grpc.ChannelCredentials:
        """The gRPC credentials made of them."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def channel_options(target: str, tls: Tls | None) -> ChannelOptions:
    """The options of a channel to `target`, the same for the asynchronous and the synchronous client."""
    options: ChannelOptions = [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
        # A dead connection under a call is found within 95 s. The server allows a ping a minute, and clocks differ.
        ("grpc.keepalive_time_ms", 75_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
    if _is_loopback(target):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy of the environment cannot reach this machine's loopback
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def call_arguments(
    options: GenerationOptions | CallOptions, timeout: float | None, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """The gRPC arguments of one call: its own deadline and metadata over the defaults given."""
    merged = {**metadata, **options.get("metadata", {})}
    return {"timeout": options.get("timeout", timeout), "metadata": tuple(merged.items())}


def _is_loopback(target: str) -> bool:
    """Whether `host:port` names this machine."""
    host = target.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
