"""`kvfold eval` on a tiny model in a folder, from its arguments to what it prints."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import pytest
from support.tiny_models import ARCHITECTURES, tiny_model

from kvfold_server.commands import calibrate, evaluate
from kvfold_server.models.int8_weight import int8_refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = ("--prefix", 40, "--continue", 20, "--windows", 3, "--kv-memory", "4MiB")
KEYS = {
    "perplexity",
    "perplexity_exact",
    "quality_cost",
    "kl",
    "top1_agreement",
    "kv_bytes_per_token",
    "kv_bytes_per_token_exact",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Line {number} of {number * 7919 % 1000}.\n" for number in range(100)))
    return file


@pytest.fixture
def folder(make_fake_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model whose logits depend strongly on what attention sees, so that any fold costs something."""
    folder = make_fake_model()
    config = ARCHITECTURES["llama"]()
    config.vocab_size, config.max_position_embeddings = 300, 512
    tiny_model(config).save_pretrained(folder)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    return evaluate.run(parser.parse_args([str(argument) for argument in arguments]))


def plan_for(folder: Path, text: Path) -> Path:
    parser = argparse.ArgumentParser()
    calibrate.configure(parser)
    file = folder.parent / "plan.json"
    options = ("--max-depth", "2", "--text", str(text), "-o", str(file))
    assert calibrate.run(parser.parse_args([str(folder), *options])) == 0
    return file


def test_json_has_the_keys_that_programs_rely_on(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--text", text, *SMALL, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= KEYS
    assert (report["shared_layers"], report["windows"], report["quality_cost"]) == (0, 3, 0.0)


def test_a_depth_of_a_plan_costs_quality_and_saves_its_share_of_the_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"Line {number} of {number * 7919 % 1000}.\n" for number in range(600)))
    plan = plan_for(folder, text)
    capsys.readouterr()
    assert run(folder, "--plan", plan, "--text", text, "--shared-layers", 2, *SMALL, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quality_cost"] > 0
    assert report["kv_bytes_per_token"] / report["kv_bytes_per_token_exact"] == pytest.approx(4 / 6)


@pytest.mark.skipif(int8_refusal("cpu") is not None, reason=str(int8_refusal("cpu")))
def test_int8_weights_are_measured_against_the_models_own(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--text", text, *SMALL, "--dtype", "float32", "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert run(folder, "--text", text, *SMALL, "--dtype", "float32", "--weights", "int8", "--json") == 0
    rounded = json.loads(capsys.readouterr().out)
    assert rounded["weights"] == "int8"
    assert rounded["perplexity_exact"] == own["perplexity_exact"]
    assert 0 < rounded["quality_cost"] < 0.1


def test_for_people_it_says_what_was_saved(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--text", text, *SMALL) == 0
    assert "saved 0.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--text", "nothing.txt"), "nothing.txt cannot be read"),
        (("--windows", 0), "prefix, continuation and windows must be at least 1"),
        (("--windows", 1000), "1000 windows of 60 tokens need 60000 tokens, the text has"),
        (("--prefix", 600), "a window has 620 tokens, the model's context 512"),
        (("--shared-layers", 1), "the model's sharing plan has depths 0 to 0"),
        (("--kv-memory", "lots"), "--kv-memory"),
        (("--attention-backend", "magic"), "the attention backend is one of"),
        (("--device", "meta", "--weights", "int8"), "meta"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    arguments: tuple[object, ...], says: str, folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--text", text, *SMALL, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.splitlines()[-1].startswith("kvfold: ")
