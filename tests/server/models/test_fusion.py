"""Native kernels inside a model: they compute what its own code does, and only where they do."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.native import layer_ops
from support.tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from kvfold_server.kv.native.layer_ops import Activation
from kvfold_server.models.fusion.decoder_layer import FusedDecoderLayer
from kvfold_server.models.fusion.gated_mlp import fuse_gated_mlp
from kvfold_server.models.fusion.layers import fuse_layers
from kvfold_server.models.fusion.rms_norm import FusedRmsNorm, fuse_rms_norm
from kvfold_server.models.packed_linear import pack_linears
from kvfold_server.models.patching import patch_model
from kvfold_server.models.probe import probe_model

if TYPE_CHECKING:
    from types import FunctionType

    from kvfold_server.kv.native.layer_ops import LayerOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [64, 40, 7]
"""A width for every vector size, the plain path included."""

ROWS = 300
"""Enough rows for several threads."""


@pytest.fixture(scope="module")
def ops() -> LayerOps:
    found = layer_ops("native")
    assert found is not None
    return found


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_rounding_only(found: torch.Tensor, expected: torch.Tensor) -> None:
    step = torch.finfo(expected.dtype).eps
    # Far below 0, an activation is a difference of almost equal numbers: small, with an error of its inputs' size.
    torch.testing.assert_close(found, expected, rtol=2 * step + 1e-6, atol=step / 10 + 4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm])
def test_a_norm_is_what_the_model_computes(
    ops: LayerOps, kind: type[nn.Module], width: int, dtype: torch.dtype
) -> None:
    norm = kind(width).to(dtype)
    norm.get_parameter("weight").data = random(width, dtype=dtype, seed=1)
    hidden = 3 * random(1, ROWS, width, dtype=dtype, seed=2)
    with torch.inference_mode():
        expected = norm(hidden)
        assert fuse_rms_norm(norm, ops)
        assert_rounding_only(norm(hidden), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_of_a_sum_is_that_of_torchs_sum_to_the_bit(ops: LayerOps, width: int, dtype: torch.dtype) -> None:
    hidden, addend = (random(1, ROWS, width, dtype=dtype, seed=seed) for seed in (1, 2))
    norm = FusedRmsNorm(ops, random(width, dtype=dtype, seed=3), 1e-6, (0.0, True))
    total, normed = norm.of_sum(hidden, addend)
    assert torch.equal(total, hidden + addend)
    assert torch.equal(normed, norm(hidden + addend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("activation", "expected"), [(0, nn.functional.silu), (1, lambda x: nn.functional.gelu(x, approximate="tanh"))]
)
def test_a_gate_is_activation_times_up(
    ops: LayerOps, activation: int, expected: FunctionType, width: int, dtype: torch.dtype
) -> None:
    gate_up = 4 * random(1, ROWS, 2 * width, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_rounding_only(ops.gate(gate_up, activation), expected(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 48, 6])
def test_rotary_positions_are_equal_to_the_bit_and_touch_nothing_else(
    ops: LayerOps, dim: int, dtype: torch.dtype
) -> None:
    packed = random(1, ROWS, 5 * dim, dtype=dtype)
    cosine, sine = (random(1, ROWS, dim, dtype=dtype, seed=seed) for seed in (1, 2))

    def heads(buffer: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        return buffer[:, :, first * dim : stop * dim].view(1, ROWS, -1, dim).transpose(1, 2)

    expected = apply_rotary_pos_emb(heads(packed, 0, 3), heads(packed, 3, 4), cosine, sine)
    found = packed.clone()
    ops.rotate(heads(found, 0, 3)[0], heads(found, 3, 4)[0], cosine[0], sine[0])
    assert torch.equal(heads(found, 0, 3), expected[0])
    assert torch.equal(heads(found, 3, 4), expected[1])
    assert torch.equal(heads(found, 4, 5), heads(packed, 4, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_or_on_threads(ops: LayerOps, dtype: torch.dtype) -> None:
    hidden = random(1, ROWS, 64, dtype=dtype)
    weight = random(64, dtype=dtype, seed=1)
    together = ops.rms_norm(hidden, weight, 1e-6, weight_offset=0.0, round_first=True)
    alone = ops.rms_norm(hidden[:, 17:18], weight, 1e-6, weight_offset=0.0, round_first=True)
    assert torch.equal(together[:, 17:18], alone)


def test_a_data_type_that_no_kernel_knows_is_refused_in_words(ops: LayerOps) -> None:
    with pytest.raises(TypeError, match="float64"):
        ops.gate(random(1, 4, 8, dtype=torch.float64), Activation.SILU)


class ClampedNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).clamp(-1, 1)


def test_a_norm_that_does_something_else_stays_as_it_was(ops: LayerOps) -> None:
    norm = ClampedNorm(64).requires_grad_(requires_grad=False)
    assert not fuse_rms_norm(norm, ops)
    hidden = random(1, 4, 64, dtype=torch.float32)
    assert float(norm(hidden).abs().max()) <= 1


class DoublingMlp(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "fuses"), [(LlamaMLP, True), (DoublingMlp, False)])
def test_an_mlp_fuses_only_if_it_is_a_gated_one(ops: LayerOps, kind: type[LlamaMLP], fuses: bool) -> None:
    model = tiny_model(ARCHITECTURES["llama"]()).to(torch.bfloat16)
    mlp = kind(model.config).to(torch.bfloat16)
    mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
    model.model.layers[0].mlp = mlp
    pack_linears(model)
    hidden = random(1, 4, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = mlp(hidden)
        assert fuse_gated_mlp(mlp, ops) is fuses
        assert_rounding_only(mlp(hidden), expected)


def test_interleaved_rotary_positions_stay_as_they_were(ops: LayerOps) -> None:
    model = tiny_model(ARCHITECTURES["cohere2"]())
    fuse_layers(model, probe_model(model), ops)
    assert all("forward" not in layer.self_attn.__dict__ for layer in model.model.layers)


def test_one_models_kernels_do_not_reach_another(ops: LayerOps) -> None:
    other = tiny_model(ARCHITECTURES["llama"]())
    fused = copy.deepcopy(other)
    fuse_layers(fused, probe_model(fused), ops)
    assert all("forward" in layer.self_attn.__dict__ for layer in fused.model.layers)
    assert all("forward" not in module.__dict__ for module in other.modules())
    assert type(other.model.layers[0].self_attn).forward.__globals__["apply_rotary_pos_emb"] is apply_rotary_pos_emb


WHOLE = ("llama", "llama with biases", "mistral with a window", "qwen2", "qwen3", "seed_oss", "mixtral")
IN_PARTS = ("granite", "gemma2", "olmo2", "gpt_oss", "phi3", "starcoder2", "glm4", "cohere2", "ernie4_5")
"""Layers that scale what they add, have more norms, other projections or another order of positions."""


def patched_layers(name: str, ops: LayerOps) -> list[nn.Module]:
    model = tiny_model(ARCHITECTURES[name]())
    patch_model(model, ops)
    return list(model.model.layers)


@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_the_usual_form_become_one_function(ops: LayerOps, name: str) -> None:
    assert all(isinstance(layer.forward, FusedDecoderLayer) for layer in patched_layers(name, ops))


@pytest.mark.parametrize("name", IN_PARTS)
def test_layers_of_another_form_keep_their_own_code(ops: LayerOps, name: str) -> None:
    assert not any(isinstance(layer.forward, FusedDecoderLayer) for layer in patched_layers(name, ops))


class HalvingLayer(LlamaDecoderLayer):
    def forward(self, *arguments: object, **keywords: object) -> torch.Tensor:
        return 0.5 * super().forward(*arguments, **keywords)


def test_a_layer_that_looks_usual_but_computes_something_else_keeps_its_own_code(ops: LayerOps) -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    unusual = HalvingLayer(model.config, 2)
    unusual.load_state_dict(model.model.layers[2].state_dict())
    model.model.layers[2] = unusual.eval().requires_grad_(requires_grad=False)
    patch_model(model, ops)
    fused = [isinstance(layer.forward, FusedDecoderLayer) for layer in model.model.layers]
    assert fused == [index != 2 for index in range(len(fused))]
