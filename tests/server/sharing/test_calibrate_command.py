"""`kvfold calibrate` on a tiny model in a folder, from its arguments to the plan file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from kvfold_server.commands import calibrate
from kvfold_server.models.loading import load_model
from kvfold_server.models.probe import probe_model
from kvfold_server.sharing.fingerprint import fingerprint
from kvfold_server.sharing.plan_file import load_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def folder(make_fake_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model as transformers initialises it, whose layers change little: even KVSharer's rule finds pairs."""
    folder = make_fake_model()
    config = ARCHITECTURES["llama"]()
    config.vocab_size, config.max_position_embeddings = 300, 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    calibrate.configure(parser)
    return calibrate.run(parser.parse_args([str(argument) for argument in arguments]))


def saved(file: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return plan


def test_a_plan_from_the_models_own_text_fits_the_model_and_tells_how_it_was_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    assert run(folder, "--max-depth", 2, "--seed", 3, "--dtype", "float32", "-o", file) == 0
    geometry = probe_model(load_model(folder, torch.float32, torch.device("cpu"))).geometry
    plan = load_plan(file, fingerprint(folder), geometry)
    assert plan.plan.max_depth == 2
    assert [depth.shared_layers for depth in plan.depth_quality] == [1, 2]
    assert [depth.kv_bytes_per_token for depth in plan.depth_quality] == [5 * 256, 4 * 256]
    assert plan.search.strategy == "output-aware"
    assert plan.search.calibration.source == "generated"
    assert plan.search.seed == plan.search.calibration.seed == 3
    assert plan.search.calibration.sha256 != plan.measurement.text.sha256
    assert (plan.search.calibration.sequences, plan.measurement.text.sequences) == (4, 8)
    assert plan.model.name == "fake"
    assert str(tmp_path) not in file.read_text("utf-8")
    out = capsys.readouterr().out
    assert "output-aware" in out
    assert "1,280" in out


def test_calibrating_again_reads_the_kept_text_and_finds_the_same_plan(folder: Path, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        assert run(folder, "--strategy", "random", "--max-depth", 2, "-o", tmp_path / name) == 0
    assert len(list((tmp_path / "cache" / "calibration").iterdir())) == 1
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_a_file_serves_as_text_and_all_strategies_are_compared_on_its_unseen_part(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of {number * 7919 % 1000}.\n" for number in range(600)))
    assert run(folder, "--strategy", "all", "--depths", "1,2", "--text", text) == 0
    plan = saved(tmp_path / "fake.plan.json")
    out = capsys.readouterr().out
    assert all(name in out for name in ("paper", "similar", "random", "output-aware"))
    assert plan["measurement"]["text"]["source"] == "file"
    assert plan["measurement"]["text"]["name"] == "text.txt"
    assert [depth["shared_layers"] for depth in plan["measurement"]["depths"]] == [1, 2]
    assert f"{plan['search']['strategy']} plan of 2 entries" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--depths", "2,four"], "--depths is a list of numbers"),
        (["--depths", "0,2"], "--depths is a list of numbers"),
        (["--depths", "5", "--max-depth", "4"], "beyond --max-depth 4"),
        (["--max-depth", "0"], "--max-depth is at least 1"),
        (["--max-depth", "6"], "can share 5 at most, not 6"),
        (["--text", "nothing.txt"], "nothing.txt cannot be read"),
        (["-o", "no/such/folder/plan.json"], "cannot be written"),
        (["-o", "."], "is a folder"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--strategy", "random", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.splitlines()[-1].startswith("kvfold: ")
    assert not list(tmp_path.glob("*.json"))


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder.parent / "missing") == 2
    assert "missing" in capsys.readouterr().err
