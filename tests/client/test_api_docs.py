"""docs/api.md says what the proto files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2

if TYPE_CHECKING:
    from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_generator", DOCS / "api_generator.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_the_proto_files_make(generator: ModuleType) -> None:
    assert (DOCS / "api.md").read_text(encoding="utf-8") == generator.generate(), "run `python docs/api_generator.py`"


def test_every_public_file_is_on_the_page(generator: ModuleType) -> None:
    proto = DOCS.parent / "proto"
    assert set(generator.PUBLIC) == {str(path.relative_to(proto)) for path in proto.glob("kvfold/v1/*.proto")}


@pytest.mark.parametrize("module", [generation_pb2, model_pb2, memory_pb2])
def test_every_method_and_field_is_described(module: ModuleType) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for service in module.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert f"| `{method.name}` |" in page
    for message in module.DESCRIPTOR.message_types_by_name.values():
        section = page.partition(f"### {message.name}\n")[2].partition("\n### ")[0]
        for field in message.fields:
            (row,) = (line for line in section.splitlines() if line.startswith(f"| `{field.name}` = {field.number} |"))
            assert not row.endswith("|  |"), f"{message.name}.{field.name} has no comment"
