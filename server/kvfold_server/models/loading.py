"""Loading a prepared folder into a transformers model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from kvfold_server.models.errors import ModelSourceError, UnsupportedModelError
from kvfold_server.models.support import check_config, check_config_file

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The data types that a model can be served in, by the name that the configuration uses."""


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The unpatched model of a prepared folder, eager attention, evaluation mode, no gradients.

    Weights are read from safetensors files only, mapped into memory. Raises ModelSourceError if the folder cannot be
    read, and UnsupportedModelError if its configuration already says that the model cannot be served.
    """
    try:
        check_config_file(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"{folder} has no readable config.json: {error}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    check_config(config)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"the weights in {folder} cannot be read: {error}") from error
    except ImportError as error:
        raise UnsupportedModelError(f"{config.model_type} needs a package that is not installed: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.train(mode=False).to(device)
    return loaded
