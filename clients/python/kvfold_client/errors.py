"""The exceptions of the client.

KvfoldError                    whatever a call raises, but TypeError and ValueError for wrong arguments
├── InvalidRequestError        a parameter is wrong; `violations` names the fields
├── AuthenticationError        the credentials are missing or wrong
├── PermissionDeniedError      the credentials do not allow this method or model
├── NotFoundError              there is no such model or plan
├── PreconditionError          the model cannot do what was asked, such as a depth beyond its plan
├── ConflictError              the same idempotency key is in use
├── ResourceExhaustedError     a quota is used up, or the request is larger than the pool
├── UnavailableError           no server is reached, or it is overloaded, draining or restarting
├── DeadlineExceededError      the call's `timeout` passed (also a TimeoutError)
├── RequestCancelledError      the server ended the request as cancelled
├── UnimplementedError         the server does not have this method
└── ServerError                a bug of the server, with the id under which it logged it in the message
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2

from kvfold_client.error_details import details_of

if TYPE_CHECKING:
    from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request, by its path such as `sampling.temperature`, and what is wrong with it."""

    field: str
    description: str


class KvfoldError(Exception):
    """A call failed.

    - `code`: the gRPC status.
    - `details`: the google.rpc messages that came with it, unpacked.
    - `partial`: whether a part of the answer had arrived.
    """

    def __init__(
        self, message: str, code: grpc.StatusCode, details: tuple[Message, ...] = (), partial: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = details
        self.partial = partial

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        """The fields that are wrong, if the server named some."""
        return tuple(
            FieldViolation(violation.field, violation.description)
            for detail in self.details
            if isinstance(detail, error_details_pb2.BadRequest)
            for violation in detail.field_violations
        )

    @property
    def reason(self) -> str:
        """The server's constant for the cause, such as `ENGINE_RESTARTING`; empty if it gave none."""
        return next((detail.reason for detail in self.details if isinstance(detail, error_details_pb2.ErrorInfo)), "")

    @property
    def retry_delay(self) -> float | None:
        """After how many seconds the server suggests to try again; None if it does not."""
        for detail in self.details:
            if isinstance(detail, error_details_pb2.RetryInfo):
                return float(detail.retry_delay.ToNanoseconds() / 1e9)
        return None

    @property
    def can_be_retried(self) -> bool:
        """Whether the same request may succeed later, and nothing of its answer has been seen yet.

        The transport has tried an UNAVAILABLE call several times already: wait, for `retry_delay` if it is set.
        """
        return not self.partial and (self.code is grpc.StatusCode.UNAVAILABLE or self.retry_delay is not None)


class InvalidRequestError(KvfoldError):
    """A parameter is wrong; `violations` names the fields."""


class AuthenticationError(KvfoldError):
    """The credentials are missing or wrong."""


class PermissionDeniedError(KvfoldError):
    """The credentials do not allow this method or model."""


class NotFoundError(KvfoldError):
    """There is no such model or plan."""


class PreconditionError(KvfoldError):
    """The model cannot do what was asked, such as a depth beyond its plan."""


class ConflictError(KvfoldError):
    """The same idempotency key is in use."""


class ResourceExhaustedError(KvfoldError):
    """A quota is used up (then `retry_delay` says when to come back), or the request is larger than the whole pool."""


class UnavailableError(KvfoldError):
    """No server is reached, or it is overloaded, draining or restarting."""


class DeadlineExceededError(KvfoldError, TimeoutError):
    """The call's `timeout` passed."""


class RequestCancelledError(KvfoldError):
    """The server ended the request as cancelled."""


class UnimplementedError(KvfoldError):
    """The server does not have this method: it is older than the client."""


class ServerError(KvfoldError):
    """A bug of the server, with the id under which it logged it in the message."""


ERROR_OF_STATUS: dict[grpc.StatusCode, type[KvfoldError]] = {
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
}
"""The exception of each gRPC status: all but OK."""


def error_of(error: grpc.RpcError, partial: bool = False) -> KvfoldError:
    """Turns the error of a failed call into the typed one."""
    code = error.code()
    message = error.details() or code.name
    trailers: Any = error.trailing_metadata()  # pairs; the stubs' private types for them differ between sync and aio
    return ERROR_OF_STATUS[code](message, code, details_of(trailers), partial)
