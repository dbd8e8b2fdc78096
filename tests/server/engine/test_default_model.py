"""The default model through the engine, against transformers' own `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import generate, make_request, run_to_end
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold_server.engine.factory import build_engine
from kvfold_server.engine.options import EngineOptions

LICENSE = Path(__file__).parents[3] / "LICENSE"
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def prompts(default_model_folder: Path) -> list[list[int]]:
    """50 prompts of 1 to 246 tokens: pieces of English text."""
    tokens = AutoTokenizer.from_pretrained(default_model_folder)(LICENSE.read_text("utf-8"))["input_ids"]
    return [tokens[37 * index : 37 * index + 1 + 5 * index] for index in range(50)]


# 100 s on two free cores, most of them transformers'; far more where others share them.
@pytest.mark.timeout(900)
def test_50_prompts_in_mixed_batches_get_the_tokens_of_generate_one_by_one(
    default_model_folder: Path, prompts: list[list[int]]
) -> None:
    options = EngineOptions(
        str(default_model_folder),
        dtype="float32",
        kv_memory_bytes=256 << 20,
        max_running=16,
        step_tokens=64,
    )
    engine = build_engine(options)
    outcomes = run_to_end(engine, [make_request(i, prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)])
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    wrong = [
        index for index, prompt in enumerate(prompts) if outcomes[index].tokens != generate(model, prompt, NEW_TOKENS)
    ]
    assert wrong == []
