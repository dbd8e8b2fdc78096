"""Whole models with int8 weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.native import CPU_BACKENDS, layer_ops
from support.rounding import rounded_model
from support.step_driver import Job, StepDriver
from support.tiny_models import ARCHITECTURES, random_prompt, tiny_model, tiny_plan

from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.models.errors import UnsupportedModelError
from kvfold_server.models.int8_weight import Int8Weight, int8_refusal
from kvfold_server.models.packed_linear import weight_bytes
from kvfold_server.models.packed_weight import PackedWeight
from kvfold_server.models.patching import patch_model
from kvfold_server.models.projections import SLICED_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_server.models.patched import PatchedModel

pytestmark = pytest.mark.skipif(int8_refusal("cpu") is not None, reason=str(int8_refusal("cpu")))

MODELS = ("llama", "llama with biases", "phi3", "gpt_neox", "gpt2", "gpt_bigcode", "gemma", "starcoder2", "gpt_oss")
"""Projections of every layout, with and without biases; tied embeddings; an MLP without a gate; experts, which stay."""

MOST_ERROR = {torch.float32: 0.05, torch.float16: 0.1, torch.bfloat16: 0.15}
"""Of logits, relative to their spread. Where rounding in the data type tips a value over the border of two steps, a
random model makes much of it; rounding itself changes the logits of "llama" by 0.11."""


def last_logits(patched: PatchedModel, plan: SharingPlan, jobs: Sequence[Job], backend: str) -> list[torch.Tensor]:
    """The logits that the first token of each job was chosen from; all jobs run in one step."""
    seen: list[torch.Tensor] = []
    forward = patched.forward

    def keep(*arguments: torch.Tensor) -> torch.Tensor:
        logits = forward(*arguments)
        seen.extend(logits)
        return logits

    patched.forward = keep
    try:
        StepDriver(patched, plan, step_tokens=512, backend=backend).run(jobs)
    finally:
        patched.forward = forward
    return seen


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / (expected - expected.mean()).norm())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", MOST_ERROR, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_rounded_linear_layers_in_plain_torch(name: str, dtype: torch.dtype, backend: str) -> None:
    original = tiny_model(ARCHITECTURES[name]()).to(dtype)
    patched = patch_model(copy.deepcopy(original), layer_ops(backend), int8_weights=True)
    plan = tiny_plan(patched.geometry)
    oracle = NaiveSharing(rounded_model(original))
    for depth in (0, plan.max_depth):
        prompt = random_prompt(90, 3)
        (found,) = last_logits(patched, plan, [Job(prompt, depth, 1)], backend)
        expected = oracle.logits(prompt, plan.sources(depth))[-1].float()
        assert relative_error(found, expected) < MOST_ERROR[dtype]


def test_a_request_in_a_batch_of_mixed_depths_gets_the_same_logits_as_alone_to_the_bit() -> None:
    patched = patch_model(
        tiny_model(ARCHITECTURES["llama"]()).to(torch.bfloat16), layer_ops(NativeBackend.name), int8_weights=True
    )
    plan = tiny_plan(patched.geometry)
    lengths = (40, SLICED_ROWS + 20, 30)
    jobs = [
        Job(random_prompt(length, seed), depth, 1)
        for seed, (length, depth) in enumerate(zip(lengths, (0, plan.max_depth, 1), strict=True))
    ]
    by_depth = sorted(jobs, key=lambda job: job.depth)
    together = last_logits(patched, plan, jobs, NativeBackend.name)
    alone = [last_logits(patched, plan, [job], NativeBackend.name)[0] for job in by_depth]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_same_requests_get_the_same_tokens_again(backend: str) -> None:
    patched = patch_model(tiny_model(ARCHITECTURES["llama"]()), layer_ops(backend), int8_weights=True)
    plan = tiny_plan(patched.geometry)
    jobs = [Job(random_prompt(10 + 17 * depth, depth), depth, 12) for depth in (1, plan.max_depth, 0, 2)]
    answers = [StepDriver(patched, plan, backend=backend).run(jobs) for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_packed_weight_is_int8_and_nothing_holds_what_it_was(name: str) -> None:
    original = tiny_model(ARCHITECTURES[name]()).to(torch.bfloat16)
    full = weight_bytes(patch_model(copy.deepcopy(original)).model)
    patched = patch_model(original, int8_weights=True)
    packed = [module for module in patched.model.modules() if isinstance(module, PackedWeight)]
    assert all(isinstance(module.form, Int8Weight) for module in packed)
    values = sum(module.form.dense().numel() for module in packed)
    outputs = sum(module.form.dense().shape[0] for module in packed)
    assert weight_bytes(patched.model) == full - values + 4 * outputs


def test_tied_embeddings_stay_in_the_data_type() -> None:
    patched = patch_model(tiny_model(ARCHITECTURES["gemma"]()).to(torch.bfloat16), int8_weights=True)
    assert patched.dtype == patched.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert isinstance(patched.model.get_output_embeddings().form, Int8Weight)


def test_what_is_computed_wrongly_is_still_refused() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    model.model.layers[4].mlp.register_forward_hook(lambda module, args, output: output.cumsum(1))
    with pytest.raises(UnsupportedModelError, match="differs from the model's own forward"):
        patch_model(model, int8_weights=True)
