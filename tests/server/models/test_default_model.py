"""The embedded default model: prepared as a chat model, and computed as transformers computes it."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.step_driver import Job, StepDriver
from transformers import AutoTokenizer

from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_server.models.loading import load_model
from kvfold_server.models.patching import patch_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from kvfold_server.models.patched import PatchedModel

LAYERS = 30
PLAN = SharingPlan(LAYERS, tuple(SharingEntry(sharer, sharer - 9) for sharer in range(11, 18)))

TEXT = (
    "A lighthouse keeper counts the ships that pass in the night and writes their names into a book. When the fog "
    "comes, he rings the bell, and the captains answer with their horns. One winter, a ship answered with a song. "
)


@pytest.fixture(scope="module")
def model(default_model_folder: Path) -> PreTrainedModel:
    return load_model(default_model_folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def patched(model: PreTrainedModel) -> PatchedModel:
    return patch_model(copy.deepcopy(model))


@pytest.fixture(scope="module")
def tokens(default_model_folder: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(default_model_folder)(TEXT * 3)["input_ids"]
    return ids


def test_the_folder_has_what_a_chat_needs(default_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    assert tokenizer.model_max_length == 8192
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((default_model_folder / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2


def test_the_model_is_described(patched: PatchedModel) -> None:
    assert patched.architecture == "LlamaForCausalLM"
    assert patched.context_length == 8192
    assert patched.vocabulary_size == 49152
    assert patched.eos_token_ids == {2}
    assert patched.geometry.layer_count == LAYERS
    assert len(set(patched.geometry.layers)) == 1


def test_mixed_prompts_equal_generate_one_by_one(
    model: PreTrainedModel, patched: PatchedModel, tokens: list[int]
) -> None:
    prompts = [tokens[start : start + 1 + (start * 37) % 90] for start in range(8)]
    found = StepDriver(patched, PLAN, blocks=6000, step_tokens=64, max_running=6).run(
        [Job(prompt, 0, 5) for prompt in prompts]
    )
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
        assert answer == expected[0, len(prompt) :].tolist()


def test_mixed_depths_equal_one_full_forward_with_aliased_layers(
    model: PreTrainedModel, patched: PatchedModel, tokens: list[int]
) -> None:
    jobs = [Job(tokens[depth : depth + 20 + 9 * depth], depth, 5) for depth in (0, 7, 2)]
    naive = NaiveSharing(model)
    expected = [naive.greedy(job.prompt, job.count, PLAN.sources(job.depth)) for job in jobs]
    assert StepDriver(patched, PLAN, blocks=6000, step_tokens=48).run(jobs) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_data_types_follow_fp32(
    dtype: torch.dtype, default_model_folder: Path, patched: PatchedModel, tokens: list[int]
) -> None:
    short = patch_model(load_model(default_model_folder, dtype, torch.device("cpu")))
    assert short.geometry.value_bytes == 2
    jobs = [Job(tokens[:60], depth, 4) for depth in (0, 3)]
    answers = [StepDriver(each, PLAN, blocks=2000).run(jobs) for each in (short, patched)]
    assert answers[0] == answers[1]
