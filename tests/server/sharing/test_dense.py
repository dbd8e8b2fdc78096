"""The dense forward, against transformers' own eager attention fed with another layer's K and V."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.tiny_models import ARCHITECTURES, random_prompt, tiny_model, tiny_plan

from kvfold_scheduler.sharing import SharingEntry
from kvfold_server.models.probe import probe_model
from kvfold_server.sharing.candidates import candidates
from kvfold_server.sharing.dense import DenseModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from kvfold_server.sharing.dense import Trace

TOKENS = torch.tensor([random_prompt(40, seed=1), random_prompt(40, seed=2)])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_depth_computes_what_the_models_own_attention_does_with_the_owners_kv(architecture: str) -> None:
    model = tiny_model(ARCHITECTURES[architecture]())
    probe = probe_model(model)
    plan = tiny_plan(probe.geometry)
    for depth in (0, 1, plan.max_depth):
        with DenseModel(model, probe) as dense:
            logits, _ = dense.logits(TOKENS, plan.sources(depth))
        naive = NaiveSharing(model)
        expected = torch.stack([naive.logits(row.tolist(), plan.sources(depth)) for row in TOKENS])
        assert_close(logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "mixtral", "phi3"])
def test_starting_from_another_forward_changes_nothing(
    architecture: str, dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]]
) -> None:
    _, dense = dense_of(architecture)
    plan = tiny_plan(dense.geometry)
    base: Trace | None = None
    # Up and down again: layers become sharers, owners come back.
    for depth in (0, 1, 2, plan.max_depth, 1, 1, 0):
        replayed, base = dense.logits(TOKENS, plan.sources(depth), base=base)
        computed, _ = dense.logits(TOKENS, plan.sources(depth))
        assert torch.equal(replayed, computed)


def test_only_layers_from_the_first_change_upward_are_computed(
    dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]],
) -> None:
    model, dense = dense_of("llama")
    _, base = dense.logits(TOKENS, dense.unshared)
    computed: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: computed.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    dense.logits(TOKENS, (0, 1, 2, 3, 0, 5), base=base)
    for hook in hooks:
        hook.remove()
    assert computed == [4, 5]


def test_positions_select_logits_and_hidden_states_are_those_before_the_head(
    dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]],
) -> None:
    model, dense = dense_of("llama")
    sources = (0, 1, 2, 0, 4, 1)
    every, _ = dense.logits(TOKENS, sources)
    some, _ = dense.logits(TOKENS, sources, positions=torch.tensor([3, 17]))
    hidden, _ = dense.hidden(TOKENS, sources)
    assert torch.equal(some, every[:, [3, 17]])
    assert_close(model.lm_head(hidden), every)


@pytest.mark.parametrize("sources", [(0, 0, 1, 3, 4, 5), (0, 2, 2, 3, 4, 5)], ids=["a chain", "an owner above"])
def test_a_source_that_is_no_owner_below_is_refused(
    sources: tuple[int, ...], dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]]
) -> None:
    _, dense = dense_of("llama")
    with pytest.raises(ValueError, match="a source is an owner"):
        dense.logits(TOKENS, sources)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_local_error_is_the_change_of_the_sharers_own_output(
    architecture: str, dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]]
) -> None:
    _, dense = dense_of(architecture)
    pairs = candidates(dense.geometry)
    errors = dense.local_errors(TOKENS, pairs)
    _, exact = dense.hidden(TOKENS, dense.unshared)
    assert list(errors) == pairs
    for pair in pairs:
        sources = list(dense.unshared)
        sources[pair.sharer] = pair.owner
        _, folded = dense.hidden(TOKENS, sources)
        mine, theirs = exact.layer_outputs[pair.sharer], folded.layer_outputs[pair.sharer]
        expected = ((theirs - mine).norm(dim=-1) / mine.norm(dim=-1)).square().mean()
        assert errors[pair] == pytest.approx(float(expected), rel=1e-4)


def test_the_model_is_as_it_was_afterwards_even_if_a_forward_fails() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    probe = probe_model(model)
    before = model(input_ids=TOKENS).logits
    implementation = model.config._attn_implementation
    with pytest.raises(IndexError), DenseModel(model, probe) as dense:
        _, base = dense.logits(TOKENS, dense.unshared)
        dense.logits(TOKENS, (0, 1, 2, 3, 4, 0), positions=torch.tensor([10**6]), base=base)
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_layers_that_share_are_of_one_kind(dense_of: Callable[[str], tuple[PreTrainedModel, DenseModel]]) -> None:
    _, dense = dense_of("gemma2")
    windows = [kind.window for kind in dense.geometry.layers]
    assert len(set(windows)) == 2
    assert candidates(dense.geometry)
    assert all(windows[entry.sharer] == windows[entry.owner] for entry in candidates(dense.geometry))
    assert SharingEntry(1, 0) not in candidates(dense.geometry)
