"""Putting facades into an attention module: its projections' weights move into one QkvProjection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvfold_server.models.projections import FusedLayout, ProjectionFacade, QkvProjection, SeparateParts, is_projection

if TYPE_CHECKING:
    from kvfold_server.models.attention import LayerBinding
    from kvfold_server.models.probe import ProbedLayer

PROJECTION = "kvfold_projection"
"""The name of the QkvProjection in its attention module."""

SEPARATE_NAMES = ("q_proj", "k_proj", "v_proj")


def install_facades(layer: ProbedLayer, binding: LayerBinding) -> bool:
    """Replaces a layer's projections; their own weights are freed.

    False, and nothing changes, if their layout is unknown: the layer still computes what it did, only K and V that
    nobody owns are projected in vain.
    """
    attention = layer.attention
    separate = [getattr(attention, name, None) for name in SEPARATE_NAMES]
    if all(isinstance(child, nn.Module) and is_projection(child) for child in separate):
        return _install_separate(attention, [child for child in separate if child is not None], binding)
    if layer.fused_child is not None and layer.fused_layout is not None:
        _install_fused(layer, layer.fused_child, layer.fused_layout, binding)
        return True
    return False


def _install_separate(attention: nn.Module, projections: list[nn.Module], binding: LayerBinding) -> bool:
    weights = [_weight(projection) for projection in projections]
    if len({weight.shape[1] for weight in weights}) > 1:
        return False
    biases = [getattr(projection, "bias", None) for projection in projections]
    bias = None
    if any(bias is not None for bias in biases):
        pairs = zip(biases, weights, strict=True)
        bias = torch.cat([weight.new_zeros(weight.shape[0]) if part is None else part for part, weight in pairs])
    query, key, value = (weight.shape[0] for weight in weights)
    projection = QkvProjection(torch.cat(weights), bias, [query, key, value], binding)
    attention.add_module(PROJECTION, projection)
    parts = SeparateParts(projection, len(SEPARATE_NAMES))
    for part, name in enumerate(SEPARATE_NAMES):
        setattr(attention, name, ProjectionFacade(parts.taker(part)))
    return True


def _install_fused(layer: ProbedLayer, name: str, layout: FusedLayout, binding: LayerBinding) -> None:
    fused: nn.Module = getattr(layer.attention, name)
    weight, bias = _weight(fused), getattr(fused, "bias", None)
    kind = layer.kind
    widths = [layer.query_heads * kind.key_dim, kind.kv_heads * kind.key_dim, kind.kv_heads * kind.value_dim]
    if layout is FusedLayout.INTERLEAVED:
        weight = _by_part(weight, kind.kv_heads)
        bias = None if bias is None else _by_part(bias, kind.kv_heads)
    projection = QkvProjection(weight.contiguous(), bias, widths, binding)
    heads = kind.kv_heads

    def concatenated(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat(projection(hidden), dim=-1)

    def interleaved(hidden: torch.Tensor) -> torch.Tensor:
        parts = [part.unflatten(-1, (heads, -1)) for part in projection(hidden)]
        return torch.stack(parts, dim=-2).flatten(-3)

    layer.attention.add_module(PROJECTION, projection)
    setattr(layer.attention, name, ProjectionFacade(interleaved if layout is FusedLayout.INTERLEAVED else concatenated))


def _by_part(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from head by head ([heads, 3, dim, ...]) to part by part ([3, heads, dim, ...])."""
    return tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)


def _weight(projection: nn.Module) -> torch.Tensor:
    """A projection's weight as [out, in], detached from it."""
    weight: torch.Tensor = projection.get_parameter("weight").detach()
    return weight.T if isinstance(projection, Conv1D) else weight
