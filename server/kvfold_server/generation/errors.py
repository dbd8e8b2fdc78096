"""Why a request was not served. Each error reaches the client with one status; see `kvfold_server.rpc.errors`.

RequestError
 ├─ InvalidRequestError        a field of the request is wrong
 ├─ UnmetPreconditionError     the request is right, but this server cannot do it
 ├─ UnknownModelError          no model of that name
 ├─ RequestTooLargeError       it could never fit in the pool
 ├─ SlowReaderError            the client did not read its stream
 ├─ OverloadedError            the waiting queue is full
 ├─ EngineUnavailableError     the engine starts, restarts, or was lost
 ├─ DrainingError              the server is about to stop
 ├─ DeadlineError              the client's deadline passed
 └─ EngineFailureError         a contained error of the engine
"""

from __future__ import annotations


class RequestError(Exception):
    """Base of all; the message is a sentence for the client."""


class InvalidRequestError(RequestError):
    """A field of the request is wrong. `field` is its path in the request message, such as "sampling.top_p"."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}" if field else description)
        self.field = field
        self.description = description


class UnmetPreconditionError(RequestError):
    """What is asked for needs something that the model does not have. `kind` and `subject` name it."""

    def __init__(self, kind: str, subject: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind
        self.subject = subject


class UnknownModelError(RequestError):
    """The server hosts no model of that name."""

    def __init__(self, model: str) -> None:
        super().__init__(f"there is no model {model!r}")
        self.model = model


class RequestTooLargeError(RequestError):
    """The request could never fit in the pool, not even alone."""

    def __init__(self, bytes_needed: int, pool_bytes: int) -> None:
        super().__init__(f"the request needs up to {bytes_needed} bytes of KV cache, the pool has {pool_bytes}")
        self.bytes_needed = bytes_needed
        self.pool_bytes = pool_bytes


class SlowReaderError(RequestError):
    """More of the answer waits than the server keeps for a client that does not read."""

    def __init__(self) -> None:
        super().__init__("stalled reader: more of the answer waits than the server keeps; the request was cancelled")


class OverloadedError(RequestError):
    """The engine's waiting queue is full."""

    def __init__(self) -> None:
        super().__init__("the server is overloaded: its waiting queue is full")


class EngineUnavailableError(RequestError):
    """The engine starts, restarts, or was lost while it served the request."""


class DrainingError(RequestError):
    """The server is about to stop and takes no new requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class DeadlineError(RequestError):
    """The client's deadline passed. `stage` says what the request was doing."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the deadline passed while {stage}")
        self.stage = stage


class EngineFailureError(RequestError):
    """A contained error of the engine; its log carries `error_id`."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id
