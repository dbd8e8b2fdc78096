"""The border that every call crosses: unreadable bytes, domain errors and bugs become statuses there."""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from kvfold_server.generation.errors import EngineFailureError, RequestError
from kvfold_server.rpc.errors import STATUS_DETAILS_KEY, status_of
from kvfold_server.rpc.malformed import forgiving_deserializer, lenient_deserializer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from google.protobuf.message import Message

    from kvfold_server.rpc.gate import Gate

    Behavior = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]

logger = logging.getLogger(__name__)


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps the methods in `request_classes`, by their full name; others pass as they are.

    The gate counts the calls, and refuses them when it is closed.
    """

    def __init__(self, request_classes: Mapping[str, type[Message]], gate: Gate) -> None:
        self._request_classes = request_classes
        self._gate = gate
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for every call; a method is wrapped once."""
        method = handler_call_details.method
        wrapped = self._handlers.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            request_class = self._request_classes.get(method)
            if handler is None or request_class is None:
                return handler
            wrapped = self._handlers[method] = self._wrap(handler, request_class)
        return wrapped

    def _wrap(
        self, handler: grpc.RpcMethodHandler[Any, Any], request_class: type[Message]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        stream_behavior: Any = handler.stream_stream
        if handler.request_streaming:  # reflection answers an empty request with an error of its own
            return grpc.stream_stream_rpc_method_handler(
                stream_behavior,
                request_deserializer=forgiving_deserializer(request_class),
                response_serializer=handler.response_serializer,
            )
        behavior: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        make: Any = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            self._guard(behavior),
            request_deserializer=lenient_deserializer(request_class),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _guard(self, behavior: Behavior) -> Behavior:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401
            try:
                if isinstance(request, RequestError):
                    raise request
                with self._gate:
                    return await behavior(request, context)
            except RequestError as error:
                await _abort(context, error)
            except grpc.aio.AbortError:
                raise
            except Exception:  # a bug: the client learns an id, the log the rest
                error_id = secrets.token_hex(8)
                logger.exception("a call failed; error id %s", error_id)
                await _abort(context, EngineFailureError(error_id))

        return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> NoReturn:
    code, status = status_of(error)
    await context.abort(code, str(error), ((STATUS_DETAILS_KEY, status.SerializeToString()),))
