"""Whole decoder layers of the usual form as one function, without the modules in between.

    q, k, v = projected(norm(hidden))           of some models, q and k of each head have norms, too
    q, k = rotated(q, k)
    hidden = hidden + o(attention(q, k, v))     hidden = hidden + mlp(norm(hidden))

For few sequences a step is as long as Python takes to call what it consists of: a layer's own code passes through a
dozen modules and twice as many small operations, the function through its products and kernels. Only a layer whose
norms and rotary positions have kernels already is tried, and the function must give what its own code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.step_batch import StepBatch
from kvfold_server.models.attention import BINDING
from kvfold_server.models.facades import PROJECTION, SEPARATE_NAMES
from kvfold_server.models.fusion.agreement import SAMPLE_ROWS, agrees, sample
from kvfold_server.models.fusion.rms_norm import FusedRmsNorm
from kvfold_server.models.fusion.rotary import FusedRotary, fused_rotary_of

if TYPE_CHECKING:
    from torch import nn

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.kv.backends.base import AttentionCall
    from kvfold_server.models.attention import LayerBinding
    from kvfold_server.models.probe import Probe, ProbedLayer

LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
ATTENTION_CHILDREN = frozenset({*SEPARATE_NAMES, PROJECTION, "o_proj"})


class FusedDecoderLayer:
    """The forward of a decoder layer. Its parts stay with the layer's modules, which are called by nobody else."""

    def __init__(self, module: nn.Module, layer: ProbedLayer, rotary: FusedRotary, call: AttentionCall) -> None:
        attention = layer.attention
        binding: LayerBinding = getattr(attention, BINDING)
        self._context = binding.context
        self._call = call
        self._kind = layer.kind
        self._query_heads = layer.query_heads
        self._rotary = rotary
        self._norm = module.get_submodule(LAYER_NORMS[0]).forward
        self._project = attention.get_submodule(PROJECTION).forward
        self._output = attention.get_submodule("o_proj").forward
        self._second_norm = cast("FusedRmsNorm", module.get_submodule(LAYER_NORMS[1]).forward)
        self._mlp = module.get_submodule("mlp").forward
        norms = dict(attention.named_children())
        self._head_norms = [norms[name].forward for name in HEAD_NORMS] if HEAD_NORMS[0] in norms else []

    def __call__(
        self,
        hidden: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,  # noqa: ANN401 - what transformers passes to every layer; none of it changes what this one computes
    ) -> torch.Tensor:
        """hidden [1, N, hidden], cosine and sine [1, N, key_dim] -> [1, N, hidden]."""
        projected = self._project(self._norm(hidden))
        attended = None
        if not self._head_norms:
            attended = self._context.active.backend.attend_projected(self._call, projected, position_embeddings)
        if attended is None:
            attended = self._attend(projected, position_embeddings)
        hidden, normed = self._second_norm.of_sum(hidden, self._output(attended.view(1, hidden.shape[1], -1)))
        return hidden.add_(self._mlp(normed))

    def _attend(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Step by step, what a backend's `attend_projected` does: [N, heads, value_dim]."""
        kind = self._kind
        query, key, value = projected
        rows = query.shape[1]
        query = query.view(1, rows, self._query_heads, kind.key_dim)
        key = key.view(1, rows, kind.kv_heads, kind.key_dim)
        if self._head_norms:
            query, key = self._head_norms[0](query), self._head_norms[1](key)
        query, key = self._rotary(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        step = self._context.active
        layer = self._call.layer
        if step.batch.owner_tokens[layer] > 0:
            step.backend.write(layer, key[0].transpose(0, 1), value.view(rows, kind.kv_heads, kind.value_dim))
        return step.backend.attend(self._call, query[0].transpose(0, 1))


class _Recording(ReferenceBackend):
    """Remembers the last call."""

    last: AttentionCall | None = None

    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        self.last = call
        return super().attend(call, query)


def fuse_decoder_layers(model: nn.Module, probe: Probe) -> int:
    """Gives every layer of the usual form the one function as its forward. Returns how many have it.

    Comes after the fusion of norms and rotary positions, when the model's attention is kvfold's already.
    """
    owners = {child: module for module in model.modules() for child in module.children()}
    pairs = [(owners[layer.attention], layer) for layer in probe.layers]
    candidates = [(module, layer) for module, layer in pairs if _has_the_form(module, layer)]
    if not candidates:
        return 0
    module, layer = candidates[0]
    binding: LayerBinding = getattr(layer.attention, BINDING)
    batch, backend = _sample_step(probe.geometry, module.get_submodule(LAYER_NORMS[0]).get_parameter("weight").dtype)
    with torch.inference_mode(), binding.context.step(batch, backend):
        return sum(_fuse(module, layer, batch, backend) for module, layer in candidates)


def _has_the_form(module: nn.Module, layer: ProbedLayer) -> bool:
    children, parts = dict(module.named_children()), dict(layer.attention.named_children())
    norms = [children.get(name) for name in LAYER_NORMS] + [parts[name] for name in HEAD_NORMS if name in parts]
    return (
        children.keys() == {*LAYER_NORMS, "self_attn", "mlp"}
        and children["self_attn"] is layer.attention
        and parts.keys() - HEAD_NORMS == ATTENTION_CHILDREN
        and (HEAD_NORMS[0] in parts) == (HEAD_NORMS[1] in parts)
        and fused_rotary_of(layer.attention) is not None
        and all(norm is not None and isinstance(norm.forward, FusedRmsNorm) for norm in norms)
    )


def _fuse(module: nn.Module, layer: ProbedLayer, batch: StepBatch, backend: _Recording) -> bool:
    weight = module.get_submodule(LAYER_NORMS[0]).get_parameter("weight")
    rotary = fused_rotary_of(layer.attention)
    hidden = sample(1, batch.token_count, weight.shape[0], dtype=weight.dtype)
    cosine, sine = (sample(1, batch.token_count, layer.kind.key_dim, dtype=weight.dtype, seed=seed) for seed in (1, 2))
    arguments: dict[str, Any] = {
        "attention_mask": None,
        "position_ids": batch.positions[None],
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": (cosine, sine),
    }
    try:
        expected = module(hidden, **arguments)
        if backend.last is None or rotary is None or not isinstance(expected, torch.Tensor):
            return False
        fused = FusedDecoderLayer(module, layer, rotary, backend.last)
        if not agrees(fused(hidden, **arguments), expected):
            return False
    except (RuntimeError, TypeError, ValueError):
        return False  # the layer takes other arguments, or its parts return something else
    module.forward = fused
    return True


def _sample_step(geometry: CacheGeometry, dtype: torch.dtype) -> tuple[StepBatch, _Recording]:
    """A step of one new sequence that owns all layers."""
    layers, width = geometry.layer_count, geometry.blocks_for(SAMPLE_ROWS)
    arena = Arena(geometry, layers * width, dtype, torch.device("cpu"))
    tables = torch.arange(1, layers * width + 1, dtype=torch.int32).view(1, layers, width)
    batch = StepBatch(
        token_count=SAMPLE_ROWS,
        positions=torch.arange(SAMPLE_ROWS),
        rows=torch.zeros(1, dtype=torch.int64),
        query_starts=(0, SAMPLE_ROWS),
        kv_lengths=(SAMPLE_ROWS,),
        owner_tokens=(SAMPLE_ROWS,) * layers,
        sources=torch.arange(layers)[:, None],
    )
    return batch, _Recording(arena, tables)
