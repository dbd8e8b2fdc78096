"""Compiles the native attention library beside its sources.

The package's build hook runs this at install; `python -m kvfold_server.kv.native.build` does the same later, for
instance once a compiler is there. Standard library only.

The system's C++ compiler (`$CXX`, or `c++`, `g++`, `clang++`) compiles each path with its own instruction set. Which
path runs is decided when the library is used, so that the result works on any machine of the architecture.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_FOLDER = Path(__file__).resolve().parent
LIBRARY_NAME = "_attention.so"

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

X86_PATHS = {
    "path_avx2.cpp": ("KVFOLD_WITH_AVX2", AVX2_FLAGS),
    "path_avx512.cpp": ("KVFOLD_WITH_AVX512", AVX512_FLAGS),
    "path_avx512_bf16.cpp": ("KVFOLD_WITH_AVX512_BF16", (*AVX512_FLAGS, "-mavx512bf16")),
}
"""Sources that need instructions beyond the architecture's own: the macro that says they were built, and the flags."""


class NativeBuildError(Exception):
    """There is no compiler, or it failed; the text says which."""


def find_compiler() -> str:
    """The path of the C++ compiler. Raises NativeBuildError if there is none."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NativeBuildError(f"no C++ compiler found (looked for {', '.join(names)})")


def build(folder: Path = SOURCE_FOLDER) -> Path:
    """Compiles the sources in `folder` and puts the library there; an older one is replaced only by a complete one.

    A path whose instructions the compiler does not know is left out. Raises NativeBuildError.
    """
    compiler = find_compiler()
    optional = X86_PATHS if platform.machine() in {"x86_64", "AMD64"} else {}
    sources = {source.name for source in folder.glob("*.cpp")}
    common = sorted(sources - set(X86_PATHS) - {"paths.cpp"})
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as workers:

        def compile_source(name: str, flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
            target = Path(scratch) / f"{name}.o"
            command = [compiler, *FLAGS, *flags, "-c", str(folder / name), "-o", str(target)]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        required = {name: workers.submit(compile_source, name, ()) for name in common}
        paths = {name: workers.submit(compile_source, name, flags) for name, (_, flags) in optional.items()}
        built = [name for name, run in paths.items() if run.result().returncode == 0]
        macros = tuple(f"-D{optional[name][0]}" for name in built)
        required["paths.cpp"] = workers.submit(compile_source, "paths.cpp", macros)
        for name, run in required.items():
            _check(run.result(), f"compiling {name}")
        objects = [str(Path(scratch) / f"{name}.o") for name in (*required, *built)]
        library = Path(scratch) / LIBRARY_NAME
        link = [compiler, "-shared", "-o", str(library), *objects]
        _check(subprocess.run(link, capture_output=True, text=True, check=False), "linking")
        # Beside the target first, then renamed: a process that has the old library mapped keeps it whole.
        partial = folder / f"{LIBRARY_NAME}.new"
        shutil.copy2(library, partial)
        return partial.replace(folder / LIBRARY_NAME)


def _check(run: subprocess.CompletedProcess[str], what: str) -> None:
    if run.returncode != 0:
        raise NativeBuildError(f"{what} failed with {run.args[0]}:\n{run.stderr[-2000:]}")


def main() -> int:
    """Builds the library in place and says where it is."""
    try:
        sys.stdout.write(f"built {build()}\n")
    except NativeBuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
