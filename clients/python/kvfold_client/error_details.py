"""The rich error model of Google APIs: messages that explain a status, packed into a binary trailer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

TRAILER = "grpc-status-details-bin"

_KINDS: dict[str, type[Message]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RequestInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RetryInfo,
    )
}


def details_of(trailers: Iterable[tuple[str, str | bytes]] | None) -> tuple[Message, ...]:
    """Unpacks the details in the trailers.

    Kinds that are not known here, and a trailer that is no google.rpc.Status, are passed over.
    """
    status = status_pb2.Status()
    for key, value in trailers or ():
        if key == TRAILER and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:  # a proxy or another server wrote it; the status itself is still good
                return ()
    details = []
    for packed in status.details:
        kind = _KINDS.get(packed.TypeName())
        if kind is not None:
            detail = kind()
            if packed.Unpack(detail):
                details.append(detail)
    return tuple(details)
