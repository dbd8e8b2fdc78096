"""Building and loading the native library where something is missing."""

from __future__ import annotations

import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from kvfold_server.kv.native.build import SOURCE_FOLDER, NativeBuildError, build
from kvfold_server.kv.native.library import NativeUnavailableError, SimdPath, load_library

if TYPE_CHECKING:
    from pathlib import Path


def copy_sources(folder: Path) -> None:
    for source in SOURCE_FOLDER.iterdir():
        if source.suffix in {".cpp", ".h"}:
            shutil.copy(source, folder)


def test_without_a_compiler_the_build_says_what_it_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, clang\+\+\)"):
        build(tmp_path)


def test_a_failing_compiler_leaves_the_library_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_sources(tmp_path)
    (tmp_path / "_attention.so").write_text("the old one")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NativeBuildError, match="compiling"):
        build(tmp_path)
    assert (tmp_path / "_attention.so").read_text() == "the old one"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiler_that_knows_no_vector_instructions_builds_the_plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_sources(tmp_path)
    compiler = tmp_path / "old-compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx*) exit 1;; esac\nexec c++ "$@" -O0\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert load_library(build(tmp_path)).kvfold_paths() == 1 << SimdPath.PLAIN


def test_a_missing_library_is_reported_with_the_way_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailableError, match=r"was not built at install; .*kvfold_server\.kv\.native\.build"):
        load_library(tmp_path / "_attention.so")


def test_a_file_that_is_no_library_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "_attention.so"
    broken.write_text("no library")
    with pytest.raises(NativeUnavailableError, match="does not load"):
        load_library(broken)
