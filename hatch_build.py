"""Build hook: generates the Python code of the proto files into `generated/`, which git ignores."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):
    """Runs protoc (from grpcio-tools) with `-I proto`, so that imports read `from kvfold.v1 import generation_pb2`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the code; for a wheel, adds it to what is packed."""
        root = Path(self.root)
        target = root / "generated"
        generate(root / "proto", target)
        if version != "editable":
            build_data["force_include"][str(target / "kvfold")] = "kvfold"


def generate(proto: Path, target: Path) -> None:
    """Generates modules and type stubs for every proto file below `proto` into `target`, replacing what was there."""
    import grpc_tools
    from grpc_tools import protoc

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    scripts = Path(sys.executable).parent
    plugins = {name: shutil.which(name) or str(scripts / name) for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")}
    files = sorted(str(path.relative_to(proto)) for path in proto.rglob("*.proto"))
    arguments = [
        "protoc",
        f"--proto_path={proto}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        *(f"--plugin={name}={path}" for name, path in plugins.items()),
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out={target}",
        f"--mypy_grpc_out={target}",
        *files,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; its message is above")
    for folder in {target / Path(name).parent for name in files} | {target / "kvfold", target / "kvfold/engine"}:
        (folder / "__init__.py").touch()
    (target / "kvfold" / "py.typed").touch()


if __name__ == "__main__":
    generate(Path(__file__).parent / "proto", Path(__file__).parent / "generated")
