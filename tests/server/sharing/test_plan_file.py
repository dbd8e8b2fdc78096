"""Plan files: what they hold, what they refuse, and which model they fit."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.sharing import SharingEntry
from kvfold_server.generation.model_info import DepthQuality
from kvfold_server.sharing.fingerprint import ModelFingerprint
from kvfold_server.sharing.plan_file import (
    PlanFile,
    PlanFileError,
    PlanMismatchError,
    find_shipped_plan,
    load_plan,
    read_plan,
)

if TYPE_CHECKING:
    from pathlib import Path

FULL = LayerKind(window=None, rope="rope", kv_heads=1, key_dim=8, value_dim=8)
GEOMETRY = CacheGeometry((FULL,) * 4, value_bytes=2)
FINGERPRINT = ModelFingerprint("llama", 4, "a" * 64, "b" * 64)
TEXT = {"source": "generated", "name": None, "sequences": 4, "tokens_per_sequence": 512, "seed": 0, "sha256": "c" * 64}
PLAN: dict[str, Any] = {
    "format": "kvfold-sharing-plan",
    "version": 1,
    "model": {"name": "tiny", "hash_method": "a way", **dataclasses.asdict(FINGERPRINT)},
    "search": {
        "strategy": "paper",
        "formula": "a formula",
        "seed": 0,
        "dtype": "bfloat16",
        "calibration": TEXT,
    },
    "entries": [{"sharer": 3, "owner": 0, "score": 1.5}, {"sharer": 2, "owner": 1, "score": 2.25}],
    "measurement": {
        "text": TEXT,
        "prefix": 256,
        "dtype": "bfloat16",
        "perplexity_exact": 10.0,
        "depths": [
            {"shared_layers": 2, "kv_bytes_per_token": 64, "perplexity": 12.0, "kl": 0.2, "quality_cost": 0.22},
            {"shared_layers": 1, "kv_bytes_per_token": 96, "perplexity": 11.0, "kl": 0.1, "quality_cost": 0.11},
        ],
    },
}


def write(folder: Path, plan: dict[str, Any]) -> Path:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    return file


def changed(*path: str | int, to: object) -> dict[str, Any]:
    """The plan with one value replaced or added."""
    plan: dict[str, Any] = json.loads(json.dumps(PLAN))
    part: Any = plan
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return plan


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plan = PlanFile.model_validate_json(json.dumps(PLAN))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert read_plan(file) == plan
    assert json.loads(plan.to_json()) == PLAN


def test_each_entry_and_each_measured_depth_is_one_line() -> None:
    lines = PlanFile.model_validate_json(json.dumps(PLAN)).to_json().splitlines()
    assert sum(line.strip().startswith('{ "sharer"') for line in lines) == 2
    assert sum(line.strip().startswith('{ "shared_layers"') for line in lines) == 2


def test_a_plan_for_the_model_gives_entries_and_depths_in_order(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN), FINGERPRINT, GEOMETRY)
    assert plan.plan.entries == (SharingEntry(3, 0), SharingEntry(2, 1))
    assert plan.depth_quality == (DepthQuality(1, 96, 11.0, 0.1, 0.11), DepthQuality(2, 64, 12.0, 0.2, 0.22))


@pytest.mark.parametrize(
    ("field", "other", "says"),
    [
        ("model_type", "qwen3", "the architecture (llama in the plan, qwen3 here)"),
        ("layer_count", 5, "the number of layers (4 in the plan, 5 here)"),
        ("config_hash", "d" * 64, "the configuration (aaaaaaaaaaaa in the plan, dddddddddddd here)"),
        ("weights_hash", "d" * 64, "the weights (bbbbbbbbbbbb in the plan, dddddddddddd here)"),
    ],
)
def test_a_plan_for_another_model_is_refused_and_says_what_differs(
    tmp_path: Path, field: str, other: Any, says: str
) -> None:
    with pytest.raises(PlanMismatchError) as caught:
        load_plan(write(tmp_path, PLAN), dataclasses.replace(FINGERPRINT, **{field: other}), GEOMETRY)
    assert says in str(caught.value)


def test_a_plan_that_joins_layers_of_different_kinds_is_refused(tmp_path: Path) -> None:
    sliding = dataclasses.replace(FULL, window=16)
    with pytest.raises(PlanMismatchError, match="layers 1 and 2 are of different kinds"):
        load_plan(write(tmp_path, PLAN), FINGERPRINT, CacheGeometry((FULL, FULL, sliding, FULL), value_bytes=2))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (changed("surprise", to=1), "surprise: Extra inputs"),
        (changed("entries", 0, "surprise", to=1), "entries.0.surprise: Extra inputs"),
        (changed("version", to=2), "version"),
        (changed("format", to="other"), "format"),
        (changed("model", "weights_hash", to="xyz"), "model.weights_hash"),
        (changed("entries", 0, "sharer", to="3"), "entries.0.sharer"),
        (changed("entries", 1, to={"sharer": 2, "owner": 3, "score": 0}), "an owner lies below its sharer"),
        (changed("entries", 0, to={"sharer": 1, "owner": 0, "score": 0}), "a sharer itself"),
        (changed("entries", 1, to={"sharer": 3, "owner": 1, "score": 0}), "the sharer of two entries"),
        (changed("entries", 0, to={"sharer": 4, "owner": 0, "score": 0}), "a model of 4 layers"),
        (changed("measurement", "depths", 0, "shared_layers", to=3), "depth 3 is measured"),
        (changed("measurement", "depths", 0, "kl", to=float("nan")), "measurement.depths.0.kl"),
    ],
)  # fmt: skip
def test_a_file_that_breaks_a_rule_is_refused_with_the_reason(tmp_path: Path, plan: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanFileError) as caught:
        read_plan(write(tmp_path, plan))
    assert says in str(caught.value)
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanFileError, match=r"plan\.json"):
        read_plan(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot read the plan"):
        read_plan(tmp_path / "nothing.json")


def test_every_shipped_plan_is_found_by_its_model_and_by_no_other() -> None:
    files = [
        file for file in (resources.files("kvfold_server.sharing") / "plans").iterdir() if file.name != "__init__.py"
    ]
    plans = [read_plan(file) for file in files]
    assert plans
    for plan in plans:
        model = plan.model
        identity = ModelFingerprint(model.model_type, model.layer_count, model.config_hash, model.weights_hash)
        assert find_shipped_plan(identity) == plan
        assert find_shipped_plan(dataclasses.replace(identity, weights_hash="0" * 64)) is None
        assert [depth.shared_layers for depth in plan.depth_quality] == list(range(1, plan.plan.max_depth + 1))
