"""What a person may name as a model, and the prepared folder that stands for it."""

from __future__ import annotations

import re
from pathlib import Path

from kvfold_server.models.default import default_model_folder
from kvfold_server.models.errors import ModelSourceError
from kvfold_server.models.gguf import gguf_folder

DEFAULT_MODEL = "default"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched of a hub model: weights as safetensors, configuration, tokenizer, chat template. No pickle, no
code."""

HUB_FILES_TO_LEAVE = ("consolidated*", "original/*", "onnx/*")
"""The same weights once more, for other programs."""


def resolve_model(name: str) -> Path:
    """The prepared folder for `default`, a local folder, a GGUF file or a hub id; fetched and converted where needed.

    A prepared folder has config.json, safetensors, tokenizer.json, and a chat template if the model has one. Raises
    ModelSourceError, in words for the person who gave the name. Imports no torch; a conversion runs in a process of
    its own.
    """
    if name == DEFAULT_MODEL:
        return default_model_folder()
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelSourceError(f"{name} is a file, and the only model files that kvfold reads are GGUF files")
        return gguf_folder(path.absolute())
    if path.is_dir():
        folder = path.absolute()
    elif HUB_ID.fullmatch(name) and path.suffix.lower() != ".gguf":
        folder = _hub_folder(name)
    else:
        raise ModelSourceError(f"{name} is neither 'default', nor an existing folder or GGUF file, nor a hub id")
    _check_prepared(folder, name)
    return folder


def _check_prepared(folder: Path, name: str) -> None:
    """Raises ModelSourceError if a folder lacks what a prepared folder has."""
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{name} has no config.json, so it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"{name} has no safetensors weights, and kvfold reads no pickled ones "
            "(save_pretrained of transformers writes safetensors)"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelSourceError(f"{name} has no tokenizer.json (save_pretrained of a fast tokenizer writes one)")


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and rarely needed
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_FILES_TO_LEAVE))
        ).absolute()
    except GatedRepoError as error:
        raise ModelSourceError(
            f"{name} is gated: accept its terms on the model hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(f"the model hub has no model {name}, or it is private") from error
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"{name} is not in the local cache of the model hub, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelSourceError(f"{name} cannot be fetched from the model hub: {error}") from error
