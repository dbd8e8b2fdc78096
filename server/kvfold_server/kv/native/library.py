"""Loads the native library and declares its functions for attention; `interface.h` describes them."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Final

import torch

from kvfold_server.kv.backends.base import BackendUnavailableError
from kvfold_server.kv.native.build import LIBRARY_NAME, SOURCE_FOLDER

INTERFACE_VERSION: Final = 5
BEST_PATH: Final = -1
OK: Final = 0

NUMBERS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The library's names for the data types that it knows."""

NO_NUMBER: Final = -1
"""Stands for any other."""


class SimdPath(IntEnum):
    """Instruction sets that the kernels are compiled for. Any path gives the same result up to rounding."""

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


class NativeUnavailableError(BackendUnavailableError):
    """Native attention cannot run here; the text says why, and what would help."""


class CacheConfig(ctypes.Structure):
    """`CacheConfig` of interface.h."""

    _fields_ = (
        ("arena", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("slot_positions", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
        ("layers", ctypes.c_int64),
        ("blocks_per_layer", ctypes.c_int64),
        ("slots_per_layer", ctypes.c_int64),
        ("tokens_per_block", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("number", ctypes.c_int32),
        ("path", ctypes.c_int32),
    )


class ProjectedCall(ctypes.Structure):
    """`ProjectedCall` of interface.h."""

    _fields_ = (
        ("layer", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("owner_tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
        ("query_token", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("key_token", ctypes.c_int64),
        ("value", ctypes.c_void_p),
        ("value_token", ctypes.c_int64),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


@cache
def load_library(path: Path = SOURCE_FOLDER / LIBRARY_NAME) -> ctypes.CDLL:
    """The library, loaded once. Raises NativeUnavailableError."""
    build_hint = "with a C++ compiler installed, `python -m kvfold_server.kv.native.build` builds it"
    if not path.exists():
        raise NativeUnavailableError(f"native attention was not built at install; {build_hint}")
    try:
        library = ctypes.CDLL(str(path))
        library.kvfold_interface_version.restype = ctypes.c_int32
        version = library.kvfold_interface_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"native attention does not load: {error}; {build_hint}") from error
    if version != INTERFACE_VERSION:
        raise NativeUnavailableError(f"native attention was built from another version of kvfold; {build_hint}")
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, whole, small, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    strides = [whole, whole, whole]
    library.kvfold_paths.argtypes = []
    library.kvfold_create.argtypes = [ctypes.POINTER(CacheConfig), ctypes.POINTER(pointer)]
    library.kvfold_destroy.argtypes = [pointer]
    library.kvfold_destroy.restype = None
    library.kvfold_path.argtypes = [pointer]
    library.kvfold_begin.argtypes = [pointer, small, whole, *[pointer] * 5]
    library.kvfold_write.argtypes = [pointer, whole, whole, pointer, *strides, pointer, *strides]
    library.kvfold_attend_projected.argtypes = [pointer, ctypes.POINTER(ProjectedCall)]
    library.kvfold_attend.argtypes = [pointer, whole, whole, whole, real, real, pointer, pointer, whole, whole, pointer]


def available_paths() -> tuple[SimdPath, ...]:
    """The paths that this machine can run, the most portable first. Raises NativeUnavailableError."""
    bits = load_library().kvfold_paths()
    return tuple(path for path in SimdPath if bits & 1 << path)


def torch_parallel_function() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch runs on; None if torch uses none that has it.

    Attention then shares torch's threads. Looking it up through torch's own library finds torch's copy of the runtime,
    which is not the system's.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(torch_library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
