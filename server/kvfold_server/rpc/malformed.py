"""Reading request messages, and saying what is wrong with those that cannot be read."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from kvfold_server.generation.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable


def lenient_deserializer(message_class: type[Message]) -> Callable[[bytes], Message | InvalidRequestError]:
    """A deserializer that returns the error instead of raising it: what it raises, gRPC reports as UNKNOWN."""

    def deserialize(data: bytes) -> Message | InvalidRequestError:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return _explain(message_class, data)

    return deserialize


def forgiving_deserializer(message_class: type[Message]) -> Callable[[bytes], Message]:
    """A deserializer that returns an empty message for bytes that cannot be read."""

    def deserialize(data: bytes) -> Message:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return message_class()

    return deserialize


def _explain(message_class: type[Message], data: bytes) -> InvalidRequestError:
    """Looks for a string that is not UTF-8; anything else that cannot be read is wrong as a whole."""
    try:
        field = _field_without_utf8(_bytes_twin(message_class.DESCRIPTOR.full_name).FromString(data))
    except DecodeError:
        field = None
    if field is None:
        return InvalidRequestError("", f"the bytes are no {message_class.DESCRIPTOR.full_name}")
    return InvalidRequestError(field, "the text is not valid UTF-8")


def _field_without_utf8(twin: Message) -> str | None:
    for field, value in twin.ListFields():
        values = [(f"[{index}]", entry) for index, entry in enumerate(value)] if field.is_repeated else [("", value)]
        for suffix, entry in values:
            if isinstance(entry, bytes) and not _is_utf8(entry):
                return f"{field.name}{suffix}"
            if isinstance(entry, Message):
                inner = _field_without_utf8(entry)
                if inner is not None:
                    return f"{field.name}{suffix}.{inner}"
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _bytes_twin(message_name: str) -> type[Message]:
    """The same message with bytes in place of strings, so that it can be read whatever the strings hold."""
    pool = descriptor_pool.DescriptorPool()
    _add_with_bytes(descriptor_pool.Default().FindMessageTypeByName(message_name).file.name, pool, set())
    twin: type[Message] = message_factory.GetMessageClass(pool.FindMessageTypeByName(message_name))
    return twin


def _add_with_bytes(name: str, pool: descriptor_pool.DescriptorPool, added: set[str]) -> None:
    if name in added:
        return
    added.add(name)
    file = descriptor_pool.Default().FindFileByName(name)
    for dependency in file.dependencies:
        _add_with_bytes(dependency.name, pool, added)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    pending: list[Any] = list(proto.message_type)
    while pending:
        message = pending.pop()
        pending.extend(message.nested_type)
        for field in message.field:
            is_map_key = message.options.map_entry and field.number == 1  # bytes cannot be one
            if not is_map_key and field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool.Add(proto)
