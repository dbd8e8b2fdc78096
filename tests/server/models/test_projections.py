"""Facades compute what is needed, once, and nothing else."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.step_driver import Job, StepDriver
from support.tiny_models import ARCHITECTURES, random_prompt, tiny_model, tiny_plan

from kvfold_server.models.facades import PROJECTION
from kvfold_server.models.patching import patch_model
from kvfold_server.models.projections import SLICED_ROWS

if TYPE_CHECKING:
    from kvfold_scheduler.step_plan import StepPlan
    from kvfold_server.kv.step_batch import StepBatch

LAYOUTS = ("llama", "llama with biases", "phi3", "gpt_neox", "gpt2", "gpt_bigcode")
"""Separate with and without biases; concatenated; interleaved; a transposed weight; one KV head."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_facades_hold_the_weights_once(name: str) -> None:
    model = tiny_model(ARCHITECTURES[name]())
    count = sum(parameter.numel() for parameter in model.parameters())
    patched = patch_model(model)
    assert sum(parameter.numel() for parameter in patched.model.parameters()) == count
    projections = [module for name, module in patched.model.named_modules() if name.endswith(PROJECTION)]
    assert len(projections) == patched.geometry.layer_count


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_large_prefill_projects_keys_and_values_for_the_owners_alone(name: str) -> None:
    original = tiny_model(ARCHITECTURES[name]())
    patched = patch_model(copy.deepcopy(original))
    plan = tiny_plan(patched.geometry)
    jobs = [
        Job(random_prompt(40, 1), 0, 6),
        Job(random_prompt(SLICED_ROWS + 20, 2), plan.max_depth, 6),
        Job(random_prompt(30, 3), 1, 6),
    ]
    context = patched.context
    seen: list[int] = []

    def count(step: StepPlan, batch: StepBatch) -> None:
        for layer, owned in enumerate(batch.owner_tokens):
            sliced = owned == 0 or batch.token_count - owned >= SLICED_ROWS
            expected = owned if sliced else batch.token_count
            assert context.query_rows[layer] - queries[layer] == batch.token_count
            assert context.key_value_rows[layer] - key_values[layer] == expected
            seen.append(batch.token_count - expected)
        queries[:] = context.query_rows
        key_values[:] = context.key_value_rows

    queries, key_values = list(context.query_rows), list(context.key_value_rows)
    found = StepDriver(patched, plan, step_tokens=512).run(jobs, count)
    naive = NaiveSharing(original)
    assert found == [naive.greedy(job.prompt, job.count, plan.sources(job.depth)) for job in jobs]
    assert max(seen) >= SLICED_ROWS


def test_two_models_in_one_process_do_not_meet() -> None:
    originals = [tiny_model(ARCHITECTURES[name](), seed) for seed, name in enumerate(("llama", "llama", "gemma2"))]
    models = [patch_model(copy.deepcopy(original)) for original in originals]
    drivers = [StepDriver(model, tiny_plan(model.geometry)) for model in models]
    job = Job(random_prompt(25, 4), 1, 8)

    def step_the_others(*_: object) -> None:
        for driver in drivers[1:]:
            driver.run([Job(random_prompt(5, 5), 0, 2)])

    (found,) = drivers[0].run([job], step_the_others)
    sources = drivers[0].plan.sources(job.depth)
    assert found == NaiveSharing(originals[0]).greedy(job.prompt, job.count, sources)


def test_a_patched_model_does_not_run_outside_of_a_step() -> None:
    patched = patch_model(tiny_model(ARCHITECTURES["llama"]()))
    with pytest.raises(RuntimeError, match="outside of a step"):
        patched.model(torch.arange(3)[None])


def test_a_model_without_a_backend_does_not_run() -> None:
    patched = patch_model(tiny_model(ARCHITECTURES["llama"]()))
    plan = tiny_plan(patched.geometry)
    driver = StepDriver(patch_model(tiny_model(ARCHITECTURES["llama"]())), plan)
    driver.model = patched
    with pytest.raises(RuntimeError, match="attach"):
        driver.run([Job([1, 2, 3], 0, 1)])


def test_a_step_that_fails_ends() -> None:
    patched = patch_model(tiny_model(ARCHITECTURES["llama"]()))
    plan = tiny_plan(patched.geometry)
    driver = StepDriver(patched, plan)
    with pytest.raises(IndexError):
        driver.run([Job([10**6], 0, 1)])
    with pytest.raises(RuntimeError, match="outside of a step"):
        _ = patched.context.active
    job = Job(random_prompt(9, 6), 0, 3)
    assert len(StepDriver(patched, plan).run([job])[0]) == 3
