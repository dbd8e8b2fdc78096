"""GGUF files: converted once to safetensors, because reading one takes seconds per hundred million weights.

The conversion runs in a process of its own (`python -m kvfold_server.models.gguf FILE FOLDER`): it needs several
times the memory of the model, and the process that asks for it may be one that imports no torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvfold_server.models.cache_folder import prepared_folder
from kvfold_server.models.errors import ModelError, ModelSourceError

CONVERSION = 1
"""Counted up when converted folders change, so that older ones in a cache are not taken for them."""


def gguf_folder(file: Path) -> Path:
    """The prepared folder of a GGUF file, found by the file's content. Raises ModelSourceError if it cannot be
    converted."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return prepared_folder(f"gguf-{digest[:16]}-{CONVERSION}", lambda folder: convert(file, folder))


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file's weights (bfloat16 safetensors), configuration and tokenizer into a folder.

    Says so on stderr. Raises ModelSourceError.
    """
    sys.stderr.write(f"kvfold: converting {file.name} once; this takes a while (20 s for 135 million weights)\n")
    command = [sys.executable, "-m", "kvfold_server.models.gguf", str(file), str(folder)]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["the conversion stopped without a word"]
        raise ModelSourceError(f"{file.name} cannot be converted: {lines[-1]}")


def _convert_here(file: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415 - only the conversion's own process pays for it
    from transformers import (  # noqa: PLC0415
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
    )

    from kvfold_server.models.support import check_config  # noqa: PLC0415

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(file.parent, **source)
    check_config(config)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    # GGUF files name no limit, and the tokenizer would say 10^30.
    tokenizer.model_max_length = config.max_position_embeddings
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=dequantized, dtype=torch.bfloat16, **source
    )
    # The configuration read from GGUF may lack an end of sequence; the tokenizer's is what a chat turn ends with.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    """Converts the file named first into the folder named second; the reason of a failure is the last line on
    stderr."""
    try:
        _convert_here(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
    except (ModelError, ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n".replace("\n", " ").strip() + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
