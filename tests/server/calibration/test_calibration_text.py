"""Calibration text: what the model writes, what a file holds, and what is kept for the next time."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from support.tiny_models import ARCHITECTURES, tiny_model

from kvfold_server.calibration.text import (
    CalibrationTextError,
    GeneratedTextParameters,
    generated_text,
    generated_text_name,
    text_from_file,
    write_text,
)
from kvfold_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

PARAMETERS = GeneratedTextParameters(sequences=3, tokens=24, seed=5)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = ARCHITECTURES["llama"]()
    config.vocab_size = 300  # more than the tokenizer has tokens
    return tiny_model(config)


@pytest.fixture
def folder(make_fake_model: Callable[..., Path]) -> Path:
    return make_fake_model()


def greedy(model: PreTrainedModel, start: list[int], tokens: int) -> list[int]:
    """What transformers generates from a start, up to `tokens` in all."""
    prompt = torch.tensor([start])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens - len(start),
        do_sample=False,
        pad_token_id=0,
    )[0].tolist()


def test_rows_of_starts_of_different_length_go_on_as_each_would_alone(model: PreTrainedModel) -> None:
    starts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    # So little of the mass that only the most probable token remains.
    parameters = dataclasses.replace(PARAMETERS, top_p=1e-6)
    text = write_text(model, iter(starts), frozenset(), parameters)
    assert text.tolist() == [greedy(model, start, 24) for start in starts]


def test_a_row_whose_text_ends_goes_on_with_the_next_start(model: PreTrainedModel) -> None:
    parameters = dataclasses.replace(PARAMETERS, sequences=1, tokens=16, top_p=1e-6)
    alone = greedy(model, [5, 6, 7], 16)
    end = alone[5]
    ends_at = alone.index(end, 3)
    text = write_text(model, itertools.chain([[5, 6, 7]], itertools.repeat([20, 21, 22])), frozenset({end}), parameters)
    assert text[0, : ends_at + 1].tolist() == alone[: ends_at + 1]
    assert text[0, ends_at + 1 : ends_at + 4].tolist() == [20, 21, 22]


def test_text_follows_the_seed(model: PreTrainedModel, folder: Path) -> None:
    one, again = (generated_text(model, folder, PARAMETERS) for _ in range(2))
    other = generated_text(model, folder, dataclasses.replace(PARAMETERS, seed=6))
    assert one.shape == (3, 24)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_chat_turns_and_prose_take_turns_where_there_is_a_template(model: PreTrainedModel, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    rows = generated_text(model, folder, dataclasses.replace(PARAMETERS, sequences=6))
    starts_with_user = [tokenizer.decode(row.tolist(), skip_special_tokens=False).startswith("<user>") for row in rows]
    assert starts_with_user == [True, False] * 3


def test_a_model_without_a_template_begins_with_prose(
    model: PreTrainedModel, make_fake_model: Callable[..., Path]
) -> None:
    folder = make_fake_model(template=None)
    tokenizer = Tokenizer.load(folder)
    rows = generated_text(model, folder, PARAMETERS)
    assert not any("<user>" in tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows)


def test_a_second_calibration_reads_the_text_of_the_first(model: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache" / generated_text_name("hash", torch.float32, PARAMETERS)
    written = generated_text(model, folder, PARAMETERS, cache_file=file)
    steps: list[int] = []
    read = generated_text(model, folder, PARAMETERS, cache_file=file, progress=steps.append)
    assert torch.equal(read, written)
    assert steps == [24]
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_text_is_kept_under_everything_that_determines_it() -> None:
    variants = [
        PARAMETERS,
        dataclasses.replace(PARAMETERS, sequences=4),
        dataclasses.replace(PARAMETERS, tokens=25),
        dataclasses.replace(PARAMETERS, seed=6),
        dataclasses.replace(PARAMETERS, temperatures=(0.7, 1.0)),
        dataclasses.replace(PARAMETERS, top_p=0.9),
    ]
    names = {
        generated_text_name(model_hash, dtype, parameters)
        for model_hash, dtype, parameters in itertools.product(
            ("one", "other"), (torch.float32, torch.bfloat16), variants
        )
    }
    assert len(names) == 2 * 2 * len(variants)


def test_windows_of_a_file_are_its_tokens_in_order(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One thing after another, ünaltered.\n" * 5, encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    windows = text_from_file(file, tokenizer, 4, 10)
    assert windows.shape == (4, 10)
    assert windows.flatten().tolist() == tokenizer.encode(file.read_text("utf-8"), add_special_tokens=False)[:40]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"too short", "holds 9 tokens; 4 x 10 are needed"), (b"\xff\xff", "not UTF-8 text"), (None, "cannot be read")],
)
def test_a_file_that_cannot_serve_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationTextError, match=says):
        text_from_file(file, Tokenizer.load(folder), 4, 10)
