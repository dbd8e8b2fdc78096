"""Encrypted connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme

from kvfold_client import AsyncClient, Client, Tls, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def server_credentials(authority: trustme.CA, name: str, require_client: bool) -> grpc.ServerCredentials:
    certificate = authority.issue_cert(name)
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    roots = authority.cert_pem.bytes() if require_client else None
    return grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)], roots, require_client)


async def test_a_client_with_the_right_root_is_served(
    authority: trustme.CA, start_server: Callable[[grpc.ServerCredentials], Any]
) -> None:
    server = start_server(server_credentials(authority, "127.0.0.1", require_client=False))
    async with AsyncClient(server.address, tls=Tls(authority.cert_pem.bytes())) as client:
        assert (await client.generate("a prompt")).text == "Hello world"


async def test_a_client_with_another_root_is_not(
    authority: trustme.CA, start_server: Callable[[grpc.ServerCredentials], Any]
) -> None:
    server = start_server(server_credentials(authority, "127.0.0.1", require_client=False))
    async with AsyncClient(server.address, tls=Tls(trustme.CA().cert_pem.bytes()), timeout=20) as client:
        with pytest.raises(UnavailableError):
            await client.generate("a prompt")


def test_both_sides_show_certificates_and_the_name_may_differ(
    tmp_path: Path, authority: trustme.CA, start_server: Callable[[grpc.ServerCredentials], Any]
) -> None:
    server = start_server(server_credentials(authority, "kvfold.internal", require_client=True))
    own = authority.issue_cert("client.internal")
    authority.cert_pem.write_to_path(tmp_path / "roots.pem")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    tls = Tls.from_files(
        tmp_path / "roots.pem", tmp_path / "chain.pem", tmp_path / "key.pem", server_name="kvfold.internal"
    )
    with Client(server.address, tls=tls) as client:
        assert client.generate("a prompt").text == "Hello world"
