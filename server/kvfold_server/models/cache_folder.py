"""The folder in the user's cache that holds prepared models."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def cache_root() -> Path:
    """KVFOLD_CACHE if it is set, else `kvfold` in the user's cache folder."""
    chosen = os.environ.get("KVFOLD_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold"


def prepared_folder(name: str, prepare: Callable[[Path], None]) -> Path:
    """The prepared model `name`, made by `prepare` (which fills an empty folder) if the cache lacks it.

    Safe with several processes at once: one prepares, the others wait. A folder appears complete or not at all.
    """
    folder = cache_root() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".unfinished", dir=folder.parent))
            try:
                prepare(unfinished)
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    return folder
