"""Writes docs/api.md from the comments of the public proto files: `python docs/api_generator.py`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "api.md"
PUBLIC = ("kvfold/v1/generation.proto", "kvfold/v1/model.proto", "kvfold/v1/memory.proto")

INTRODUCTION = """# The API of kvfold

Package `kvfold.v1`, served over gRPC. This page is made from the comments of the proto files by
`docs/api_generator.py`. Beside these services, a server has `grpc.health.v1.Health` and server reflection.

In a field marked *optional*, "not set" is told apart from zero. Errors carry `google.rpc` details, such as the field
that is wrong or the delay after which a retry makes sense.
"""

# Numbers of fields in descriptor.proto; paths in the source info are made of them.
_SERVICES, _MESSAGES, _ENUMS = 6, 4, 5
_METHODS, _FIELDS, _VALUES = 2, 2, 2

_SCALARS = {
    value.number: value.name.removeprefix("TYPE_").lower() for value in FieldDescriptorProto.Type.DESCRIPTOR.values
}
_NAMED_TYPES = (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM)


def generate() -> str:
    """Returns the page. Raises RuntimeError if protoc refuses the files."""
    files = [_File(file) for file in _descriptors()]
    parts = [INTRODUCTION, "## Contents\n"]
    parts += [
        f"- {_link(service.name)}: {file.comment(_SERVICES, i)}" for file in files for i, service in file.services()
    ]
    parts.append("")
    for file in files:
        parts += file.service_sections()
    parts.append("## Messages and enums\n")
    for file in files:
        parts += file.type_sections()
    return "\n".join(parts).rstrip() + "\n"


class _File:
    """A proto file and the comments in it, by path."""

    def __init__(self, descriptor: FileDescriptorProto) -> None:
        self._descriptor = descriptor
        self._comments = {
            tuple(location.path): " ".join(location.leading_comments.split())
            for location in descriptor.source_code_info.location
        }

    def comment(self, *path: int) -> str:
        return self._comments.get(path, "")

    def services(self) -> Iterable[tuple[int, ServiceDescriptorProto]]:
        return enumerate(self._descriptor.service)

    def service_sections(self) -> Iterator[str]:
        for index, service in self.services():
            yield f"## {service.name}\n\n{self.comment(_SERVICES, index)}\n"
            yield "| method | request | response | |"
            yield "|---|---|---|---|"
            for number, method in enumerate(service.method):
                comment = self.comment(_SERVICES, index, _METHODS, number)
                yield f"| `{method.name}` | {_request(method)} | {_response(method)} | {comment} |"
            yield ""

    def type_sections(self) -> Iterator[str]:
        for index, message in enumerate(self._descriptor.message_type):
            yield from self._message_section(index, message)
        for index, enum in enumerate(self._descriptor.enum_type):
            yield from self._enum_section(index, enum)

    def _message_section(self, index: int, message: DescriptorProto) -> Iterator[str]:
        yield f"### {message.name}\n\n{self.comment(_MESSAGES, index)}\n"
        if not message.field:
            yield "No fields.\n"
            return
        yield "| field | type | |"
        yield "|---|---|---|"
        for number, field in enumerate(message.field):
            comment = self.comment(_MESSAGES, index, _FIELDS, number)
            yield f"| `{field.name}` = {field.number} | {_type(field, message)} | {comment} |"
        yield ""

    def _enum_section(self, index: int, enum: EnumDescriptorProto) -> Iterator[str]:
        yield f"### {enum.name}\n\n{self.comment(_ENUMS, index)}\n"
        yield "| value | |"
        yield "|---|---|"
        for number, value in enumerate(enum.value):
            yield f"| `{value.name}` = {value.number} | {self.comment(_ENUMS, index, _VALUES, number)} |"
        yield ""


def _descriptors() -> list[FileDescriptorProto]:
    """The public files, compiled with their comments, in the order of `PUBLIC`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "files.binpb"
        arguments = [
            "protoc",
            f"--proto_path={ROOT / 'proto'}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={output}",
            *PUBLIC,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed; its message is above")
        files = {file.name: file for file in FileDescriptorSet.FromString(output.read_bytes()).file}
    return [files[name] for name in PUBLIC]


def _request(method: MethodDescriptorProto) -> str:
    return ("stream of " if method.client_streaming else "") + _link(method.input_type)


def _response(method: MethodDescriptorProto) -> str:
    return ("stream of " if method.server_streaming else "") + _link(method.output_type)


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """The type of a field in words, with what the label and a oneof add to it."""
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
            key, value = nested.field
            return f"map of {_plain_type(key)} to {_plain_type(value)}"
    name = _plain_type(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _plain_type(field: FieldDescriptorProto) -> str:
    return _link(field.type_name) if field.type in _NAMED_TYPES else _SCALARS[field.type]


def _link(type_name: str) -> str:
    """A link to a type of this page; the plain name of one that is elsewhere."""
    package, _, name = type_name.rpartition(".")
    if package in {"", ".kvfold.v1"}:
        return f"[{name}](#{name.lower()})"
    return f"`{package.lstrip('.')}.{name}`"


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
    sys.stderr.write(f"wrote {TARGET}\n")
