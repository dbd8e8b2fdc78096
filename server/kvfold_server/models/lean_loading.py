"""Imports transformers and loads a model without what an engine has no use for: almost half of the CPU time.

Of 1.8 seconds that it takes otherwise (transformers 5.23 beside torch 2.13, a small model, one core),

- 0.45, 400 modules and 40 MB are torch's compiler and tensors that are spread over several processes. transformers
  marks functions for the compiler and asks whether torch was built for several processes; torch marks functions too,
  where it works out shapes in Python. An engine compiles nothing and is one process: a stand-in takes the marks, and
  the answer is no.
- 0.35 go into reading the sources of 1,600 model files for the names that they export, twice.

Nothing that is computed depends on any of it, and what another version of the libraries does otherwise, it does as
always: a start then takes longer. The compiler is loaded when something asks for more than marks.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec


COMPILER = "torch._dynamo"
COMPILER_MARKS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})
NAME_READER = "transformers.utils.import_utils"


@contextmanager
def lean_loading() -> Iterator[None]:
    """For a block that imports transformers for the first time and loads a model."""
    with _one_process(), _no_compiler(), _quick_names():
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """torch says that it was built for one process, as it can be."""
    is_available = torch.distributed.is_available
    vars(torch.distributed)["is_available"] = lambda: False
    try:
        yield
    finally:
        vars(torch.distributed)["is_available"] = is_available


@contextmanager
def _no_compiler() -> Iterator[None]:
    """A stand-in takes the place of torch's compiler, unless that is loaded already."""
    spec = PathFinder.find_spec(COMPILER, torch.__path__)
    if COMPILER in sys.modules or spec is None:
        yield
        return
    stand_in = _CompilerStandIn(spec)
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        stand_in.leave()


class _CompilerStandIn(ModuleType):
    """Its marks leave functions as they are. Asked for anything else, it loads the compiler and makes way for it."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(COMPILER)
        self.__path__ = spec.submodule_search_locations or []  # of its modules, some are imported alone

    def leave(self) -> None:
        """Makes way."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, a module holds anything
        if name in COMPILER_MARKS:
            return _unmarked
        if name.startswith("__"):
            raise AttributeError(name)  # asked of every module, such as by `inspect`
        self.leave()
        return getattr(importlib.import_module(COMPILER), name)


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:  # noqa: ANN401, it may be used with arguments or without
    return _unmarked if function is None else function


@contextmanager
def _quick_names() -> Iterator[None]:
    """Improves the reader of exported names as soon as it is imported."""
    finder = _NameReaderFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _NameReaderFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == NAME_READER else None
        if spec is not None and spec.loader is not None:
            spec.loader = _NameReaderLoader(spec.loader)
        return spec


class _NameReaderLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _read_names_quickly(vars(module))


def _read_names_quickly(reader: dict[str, Any]) -> None:
    """Has it read each file once, and of a file's text no more than the last assignment to __all__.

    Its own functions do the work: the one for folders remembers 128 of 550, too few to find any of them again.
    """
    names_in = reader.get("fetch__all__")
    structure_of = getattr(reader.get("create_import_structure_from_path"), "__wrapped__", None)
    if names_in is not None and structure_of is not None:
        reader["fetch__all__"] = lambda text: names_in(text[text.rfind("\n__all__") + 1 :])
        reader["create_import_structure_from_path"] = functools.cache(structure_of)
