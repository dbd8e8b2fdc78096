"""The default model through the engine, against transformers' own `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import generate, make_request, run_to_end
from support.native import CPU_BACKENDS, layer_ops
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvfold_server.engine.factory import build_engine
from kvfold_server.engine.options import EngineOptions

LICENSE = Path(__file__).parents[3] / "LICENSE"
NEW_TOKENS = 16

NEAR_TIE = 0.25
"""Two logits this close count as a tie in bf16: those of this model are 10 to 25, with steps of 0.06 to 0.125."""


@pytest.fixture(scope="module")
def prompts(default_model_folder: Path) -> list[list[int]]:
    """50 prompts of 1 to 246 tokens: pieces of English text."""
    tokens = AutoTokenizer.from_pretrained(default_model_folder)(LICENSE.read_text("utf-8"))["input_ids"]
    return [tokens[37 * index : 37 * index + 1 + 5 * index] for index in range(50)]


@pytest.fixture(scope="module")
def expected(default_model_folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates from each, alone, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.float32)
    return [generate(model, prompt, NEW_TOKENS) for prompt in prompts]


def answers(folder: Path, prompts: list[list[int]], backend: str, dtype: str) -> list[list[int]]:
    """What an engine generates from all of them in mixed batches."""
    layer_ops(backend)  # skips where the backend cannot run
    options = EngineOptions(
        str(folder),
        dtype=dtype,
        kv_memory_bytes=256 << 20,
        max_running=16,
        step_tokens=64,
        attention_backend=backend,
    )
    outcomes = run_to_end(
        build_engine(options), [make_request(i, prompt, NEW_TOKENS) for i, prompt in enumerate(prompts)]
    )
    return [outcomes[index].tokens for index in range(len(prompts))]


# 100 s on two free cores, most of them transformers'; far more where others share them.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_50_prompts_in_mixed_batches_get_the_tokens_of_generate_one_by_one(
    default_model_folder: Path, prompts: list[list[int]], expected: list[list[int]], backend: str
) -> None:
    found = answers(default_model_folder, prompts, backend, "float32")
    assert [index for index, tokens in enumerate(found) if tokens != expected[index]] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_in_bfloat16_an_answer_leaves_that_of_generate_only_at_near_ties(
    default_model_folder: Path, prompts: list[list[int]], backend: str, record_property: pytest.RecordProperty
) -> None:
    model = AutoModelForCausalLM.from_pretrained(default_model_folder, dtype=torch.bfloat16)
    some = prompts[1::4]
    found = answers(default_model_folder, some, backend, "bfloat16")
    gaps = [
        gap
        for prompt, tokens in zip(some, found, strict=True)
        if (gap := gap_where_they_part(model, prompt, tokens)) is not None
    ]
    record_property("answers that part at a near-tie", f"{len(gaps)} of {len(some)}")
    assert all(gap <= NEAR_TIE for gap in gaps), gaps


def gap_where_they_part(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float | None:
    """How far the model's own logit of the first other token is below its best one; None if no token differs."""
    theirs = generate(model, prompt, len(tokens))
    split = next((index for index, pair in enumerate(zip(tokens, theirs, strict=True)) if pair[0] != pair[1]), None)
    if split is None:
        return None
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + theirs[:split]])).logits[0, -1].float()
    return float(logits.max() - logits[tokens[split]])
