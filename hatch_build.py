"""Build hook: generates the Python code of the proto files, and compiles the native attention library.

Git ignores both results. Without a C++ compiler the install goes on, and the server
attends on the `reference` backend.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc_tools
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from types import ModuleType


NATIVE = Path("server/kvfold_server/kv/native")


class KvfoldBuildHook(BuildHookInterface):
    """Runs protoc (from grpcio-tools) with `-I proto`, so that imports read `from kvfold.v1 import generation_pb2`.

    Compiles the native library beside its sources, where an editable install loads it from.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates and compiles; for a wheel, adds both results to what is packed."""
        root = Path(self.root)
        target = root / "generated"
        generate(root / "proto", target)
        if version != "editable":
            build_data["force_include"][str(target / "kvfold")] = "kvfold"
        library = self._compile(root / NATIVE) if self.target_name == "wheel" else None
        if version != "editable" and library is not None:
            build_data["force_include"][str(library)] = str(NATIVE.relative_to("server") / library.name)
            build_data["pure_python"] = False
            # The library speaks C, not Python's ABI: one wheel serves every Python 3 of the platform.
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compile(self, folder: Path) -> Path | None:
        build = load_module(folder / "build.py")
        try:
            library: Path = build.build(folder)
        except build.NativeBuildError as error:
            (folder / build.LIBRARY_NAME).unlink(missing_ok=True)
            self.app.display_warning(f"native attention is not built, the reference backend serves instead: {error}")
            return None
        return library


def load_module(path: Path) -> ModuleType:
    """A module of the project by its file: nothing of the project is installed yet when this hook runs."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(proto: Path, target: Path) -> None:
    """Generates modules and type stubs for every proto file below `proto` into `target`, replacing what was there."""
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
