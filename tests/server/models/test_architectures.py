"""Every architecture of the matrix, patched, against what transformers itself computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.native import CPU_BACKENDS, layer_ops
from support.step_driver import Job, StepDriver
from support.tiny_models import ARCHITECTURES, random_prompt, tiny_model, tiny_plan

from kvfold_server.models.patching import patch_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_server.models.patched import PatchedModel

LENGTHS = (3, 41, 17, 70)
"""Shorter and longer than a window, a block, a step's token budget."""

NEW_TOKENS = 12


@dataclass(frozen=True)
class Pair:
    """The same weights twice: untouched, and patched to run on a backend."""

    original: PreTrainedModel
    patched: PatchedModel
    plan: SharingPlan
    backend: str

    def run(self, jobs: list[Job]) -> list[list[int]]:
        return StepDriver(self.patched, self.plan, backend=self.backend).run(jobs)


@pytest.fixture(scope="module", params=[f"{name}, {backend}" for name in ARCHITECTURES for backend in CPU_BACKENDS])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    name, backend = request.param.rsplit(", ", 1)
    original = tiny_model(ARCHITECTURES[name]())
    patched = patch_model(copy.deepcopy(original), layer_ops(backend))
    yield Pair(original, patched, tiny_plan(patched.geometry), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_in_short_data_types_is_no_reason_to_refuse(name: str, dtype: torch.dtype, backend: str) -> None:
    assert patch_model(tiny_model(ARCHITECTURES[name]()).to(dtype), layer_ops(backend)).dtype == dtype


def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def test_depth_0_packed_and_chunked_equals_generate_one_by_one(pair: Pair) -> None:
    prompts = [random_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    found = pair.run([Job(prompt, 0, NEW_TOKENS) for prompt in prompts])
    assert found == [generate(pair.original, prompt) for prompt in prompts]


def test_mixed_depths_equal_one_full_forward_with_aliased_layers(pair: Pair) -> None:
    assert pair.plan.max_depth >= 2
    depths = (1, pair.plan.max_depth, 0, pair.plan.max_depth, 2)
    jobs = [
        Job(random_prompt(length, 10 + seed), depth, NEW_TOKENS)
        for seed, (length, depth) in enumerate(zip((*LENGTHS, 30), depths, strict=True))
    ]
    naive = NaiveSharing(pair.original)
    expected = [naive.greedy(job.prompt, job.count, pair.plan.sources(job.depth)) for job in jobs]
    assert pair.run(jobs) == expected


def test_the_deepest_level_alone_skips_the_projections_of_its_sharers(pair: Pair) -> None:
    context, plan = pair.patched.context, pair.plan
    before = list(context.query_rows), list(context.key_value_rows)
    job = Job(random_prompt(20, 20), plan.max_depth, 5)
    found = pair.run([job])
    assert found == [NaiveSharing(pair.original).greedy(job.prompt, job.count, plan.sources(job.depth))]
    tokens = 20 + 5 - 1
    query_rows = [now - then for now, then in zip(context.query_rows, before[0], strict=True)]
    key_value_rows = [now - then for now, then in zip(context.key_value_rows, before[1], strict=True)]
    owners = plan.owners(plan.max_depth)
    assert pair.patched.layers_without_facade == ()
    assert query_rows == [tokens] * plan.layer_count
    assert key_value_rows == [tokens if layer in owners else 0 for layer in range(plan.layer_count)]
