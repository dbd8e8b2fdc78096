"""Fingerprints follow the model, not the way its folder was written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import ARCHITECTURES, tiny_model

from kvfold_server.sharing.fingerprint import FingerprintError, fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(ARCHITECTURES["llama"]()).to(torch.bfloat16)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_sharded_files_and_a_wider_data_type_are_the_same_model(
    model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.to(torch.float32).save_pretrained(tmp_path / "wide")
    assert fingerprint(tmp_path / "shards") == fingerprint(folder) == fingerprint(tmp_path / "wide")


def test_names_and_versions_in_the_configuration_do_not_matter(folder: Path) -> None:
    before = fingerprint(folder)
    change_config(folder, _name_or_path="elsewhere", transformers_version="5.99.0", use_cache=False, rms_norm_eps=1e-6)
    assert fingerprint(folder) == before


def test_a_whole_number_is_the_same_written_as_a_fraction(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000})
    before = fingerprint(folder)
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert fingerprint(folder) == before


def test_another_rope_base_is_another_configuration_of_the_same_weights(folder: Path) -> None:
    before = fingerprint(folder)
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    after = fingerprint(folder)
    assert after.config_hash != before.config_hash
    assert after.weights_hash == before.weights_hash


@pytest.mark.parametrize("row", [0, -1])
def test_one_changed_tensor_is_another_model(folder: Path, row: int) -> None:
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][row] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    after = fingerprint(folder)
    assert after.weights_hash != before.weights_hash
    assert after.config_hash == before.config_hash


def test_a_tensor_of_another_name_is_another_model(folder: Path) -> None:
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["another.name"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(folder).weights_hash != before.weights_hash


def test_a_folder_without_weights_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FingerprintError, match=r"holds no model\.safetensors"):
        fingerprint(folder)
