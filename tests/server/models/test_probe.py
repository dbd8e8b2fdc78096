"""What the load-time probe reads from a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.tiny_models import ARCHITECTURES, WINDOW, tiny_model
from transformers import CwmConfig, MistralConfig, PhimoeConfig

from kvfold_server.models.probe import probe_model

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import LayerKind

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def kinds(name: str) -> tuple[LayerKind, ...]:
    return probe_model(tiny_model(ARCHITECTURES[name]())).geometry.layers


def test_layers_of_one_kind_are_equal() -> None:
    (kind,) = set(kinds("llama"))
    assert kind.window is None
    assert (kind.kv_heads, kind.key_dim, kind.value_dim) == (2, 16, 16)


def test_sliding_and_full_layers_are_of_different_kinds() -> None:
    layers = kinds("gemma2")
    assert [kind.window for kind in layers] == [WINDOW, None] * 3
    assert len({kind.rope for kind in layers}) == 1


def test_layers_with_another_rope_base_are_of_different_kinds() -> None:
    sliding, full = kinds("gemma3_text")[:2]
    assert sliding.rope != full.rope
    assert "none" not in {sliding.rope, full.rope}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_without_rope_are_of_a_kind_of_their_own(dtype: torch.dtype) -> None:
    model = tiny_model(ARCHITECTURES["smollm3"]()).to(dtype)
    names = [kind.rope for kind in probe_model(model).geometry.layers]
    assert [name == "none" for name in names] == [False, False, True, False, False, True]
    assert len(set(names)) == 2


def test_a_layer_that_leaves_out_rope_although_it_receives_it_counts_as_without() -> None:
    assert [kind.rope == "none" for kind in kinds("cohere2")] == [False, True] * 3


def test_positions_added_at_the_input_are_no_missing_rope() -> None:
    assert {kind.rope for kind in kinds("gpt2")} == {"of the model"}


@pytest.mark.parametrize("window", [3, 4096, 131_072])
def test_a_window_of_any_width_is_read_without_a_prompt_as_long(window: int) -> None:
    model = tiny_model(MistralConfig(**SMALL, sliding_window=window))
    assert {kind.window for kind in probe_model(model).geometry.layers} == {window}


def test_a_window_that_the_model_never_passes_to_its_attention_is_read_from_the_mask() -> None:
    model = tiny_model(PhimoeConfig(**SMALL, num_local_experts=2, sliding_window=2047))
    assert {kind.window for kind in probe_model(model).geometry.layers} == {2047}


def test_the_geometry_counts_the_bytes_of_the_models_own_data_type() -> None:
    model = tiny_model(CwmConfig(**SMALL, bos_token_id=1, eos_token_id=2, head_dim=16))
    assert probe_model(model).geometry.token_bytes == 2 * 2 * 16 * 4
    assert probe_model(model.to(torch.bfloat16)).geometry.token_bytes == 2 * 2 * 16 * 2


def test_the_probe_leaves_no_trace() -> None:
    model = tiny_model(ARCHITECTURES["mistral"]())
    tokens = torch.arange(9)[None]
    before = model(tokens).logits
    probe_model(model)
    assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
