"""What a plan is bound to: hashes of a model's structure and weights that do not depend on how its folder was written.

File names, sharding, the stored data type, and fields such as `transformers_version` or `_name_or_path` leave them
unchanged.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

if TYPE_CHECKING:
    from pathlib import Path

HASH_METHOD = (
    "sha256 of structure fields; sha256 of names, shapes and up to 32 evenly spread rows of each tensor in bfloat16"
)
"""Stated in each plan file. Whole weights would take seconds per gigabyte; training or merging changes every row."""

_ROWS_PER_TENSOR = 32

_STRUCTURE_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "layer_types", "sliding_window", "rope_parameters",
    "partial_rotary_factor", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale",
    "num_experts", "num_local_experts", "num_experts_per_tok", "no_rope_layers",
)  # fmt: skip
"""What shapes a decoder's output beside its weights. A list of what counts: versions of transformers add fields at
will."""


class FingerprintError(ValueError):
    """A model folder lacks what a fingerprint needs."""


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """Hashes in hexadecimal, and what the messages about them name."""

    model_type: str
    layer_count: int
    config_hash: str
    weights_hash: str


def fingerprint(folder: Path) -> ModelFingerprint:
    """The fingerprint of a model folder with config.json and safetensors files. Raises FingerprintError, OSError.

    Reads a few megabytes, whatever the size of the model.
    """
    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    fields = config.to_dict()
    structure = {name: _plain(fields[name]) for name in _STRUCTURE_FIELDS if fields.get(name) is not None}
    return ModelFingerprint(
        model_type=str(config.model_type),
        layer_count=int(config.num_hidden_layers),
        config_hash=hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest(),
        weights_hash=_weights_hash(folder),
    )


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """A value of a configuration without what is unset; whole numbers the same whether written as 10000 or 10000.0."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _weights_hash(folder: Path) -> str:
    holders: dict[str, Path] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            holders.update(dict.fromkeys(tensors.keys(), file))
    digest = hashlib.sha256()
    opened: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in set(holders.values())}
    for name in sorted(holders):
        tensor: torch.Tensor = opened[holders[name]].get_tensor(name)  # mapped: only the rows that are taken are read
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        if tensor.dim() == 0:
            continue
        rows = tensor[_spread(tensor.shape[0])]
        rows = rows.to(torch.bfloat16).view(torch.int16) if rows.is_floating_point() else rows
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if not single.exists():
        raise FingerprintError(f"{folder} holds no model.safetensors")
    return [single]


def _spread(count: int) -> list[int]:
    """Up to _ROWS_PER_TENSOR of `count` rows, first and last among them."""
    if count <= _ROWS_PER_TENSOR:
        return list(range(count))
    return [index * (count - 1) // (_ROWS_PER_TENSOR - 1) for index in range(_ROWS_PER_TENSOR)]
