"""Domain errors to gRPC statuses: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from kvfold_server.generation.errors import (
    DeadlineError,
    DrainingError,
    EngineFailureError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
    SlowReaderError,
    UnknownModelError,
    UnmetPreconditionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

DOMAIN = "kvfold.dev"
"""The domain of every ErrorInfo: who defines its reasons."""

STATUS_DETAILS_KEY = "grpc-status-details-bin"
"""Where gRPC libraries look for a google.rpc.Status."""

OVERLOAD_RETRY_SECONDS = 1.0
"""A waiting queue moves by several requests a second."""

RESTART_RETRY_SECONDS = 2.0
"""An engine that is restarted loads its model first."""

DRAINING_RETRY_SECONDS = 0.5
"""Another replica can be asked at once; a short pause lets the balancer notice."""


@dataclass(frozen=True, slots=True)
class StatusRow:
    """What an error becomes: the code, the reason of its ErrorInfo, and further details."""

    code: grpc.StatusCode
    reason: str
    metadata: Callable[[Any], dict[str, str]]
    details: Callable[[Any], list[Message]]


def _nothing(_error: RequestError) -> list[Message]:
    return []


def _no_metadata(_error: RequestError) -> dict[str, str]:
    return {}


def _retry_after(seconds: float) -> Callable[[Any], list[Message]]:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return lambda _error: [error_details_pb2.RetryInfo(retry_delay=delay)]


def _bad_request(error: InvalidRequestError) -> list[Message]:
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
    return [error_details_pb2.BadRequest(field_violations=[violation])]


def _precondition(error: UnmetPreconditionError) -> list[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=error.kind, subject=error.subject, description=str(error)
    )
    return [error_details_pb2.PreconditionFailure(violations=[violation])]


def _resource(error: UnknownModelError) -> list[Message]:
    return [
        error_details_pb2.ResourceInfo(
            resource_type="kvfold.v1.Model", resource_name=error.model, description=str(error)
        )
    ]


def _quota(subject: str) -> Callable[[RequestError], list[Message]]:
    def details(error: RequestError) -> list[Message]:
        violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=str(error))
        return [error_details_pb2.QuotaFailure(violations=[violation])]

    return details


def _slow_reader(error: SlowReaderError) -> list[Message]:
    return [*_quota("stream")(error), *_retry_after(OVERLOAD_RETRY_SECONDS)(error)]


def _sizes(error: RequestTooLargeError) -> dict[str, str]:
    return {"bytes_needed": str(error.bytes_needed), "pool_bytes": str(error.pool_bytes)}


def _stage(error: DeadlineError) -> dict[str, str]:
    return {"stage": error.stage}


def _error_id(error: EngineFailureError) -> dict[str, str]:
    return {"error_id": error.error_id}


CODE = grpc.StatusCode

STATUSES: dict[type[RequestError], StatusRow] = {
    InvalidRequestError: StatusRow(CODE.INVALID_ARGUMENT, "INVALID_FIELD", _no_metadata, _bad_request),
    UnmetPreconditionError: StatusRow(CODE.FAILED_PRECONDITION, "UNMET_PRECONDITION", _no_metadata, _precondition),
    UnknownModelError: StatusRow(CODE.NOT_FOUND, "UNKNOWN_MODEL", _no_metadata, _resource),
    RequestTooLargeError: StatusRow(CODE.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", _sizes, _quota("kv_memory")),
    SlowReaderError: StatusRow(CODE.RESOURCE_EXHAUSTED, "SLOW_READER", _no_metadata, _slow_reader),
    OverloadedError: StatusRow(CODE.UNAVAILABLE, "OVERLOADED", _no_metadata, _retry_after(OVERLOAD_RETRY_SECONDS)),
    EngineUnavailableError: StatusRow(
        CODE.UNAVAILABLE, "ENGINE_UNAVAILABLE", _no_metadata, _retry_after(RESTART_RETRY_SECONDS)
    ),
    DrainingError: StatusRow(CODE.UNAVAILABLE, "DRAINING", _no_metadata, _retry_after(DRAINING_RETRY_SECONDS)),
    DeadlineError: StatusRow(CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", _stage, _nothing),
    EngineFailureError: StatusRow(CODE.INTERNAL, "INTERNAL", _error_id, _nothing),
}


def status_of(error: RequestError) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The code and the rich status of an error."""
    row = STATUSES[type(error)]
    info = error_details_pb2.ErrorInfo(reason=row.reason, domain=DOMAIN, metadata=row.metadata(error))
    status = status_pb2.Status(code=row.code.value[0], message=str(error))
    for detail in (info, *row.details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return row.code, status
