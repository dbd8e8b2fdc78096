"""Rotary positions (RoFormer, arXiv:2104.09864) by one kernel, in place.

The attention modules of transformers call a function of their own file, `apply_rotary_pos_emb`. A fused module runs the
same code with that one name bound to the kernel; no other module sees it.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from kvfold_server.models.fusion.agreement import SAMPLE_ROWS, sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kvfold_server.kv.native.layer_ops import LayerOps
    from kvfold_server.models.probe import ProbedLayer

    RotaryFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]

ROTARY_NAME = "apply_rotary_pos_emb"


class FusedRotary:
    """Stands for a model's own `apply_rotary_pos_emb`, which computes what the kernel does not."""

    def __init__(self, original: RotaryFunction, ops: LayerOps) -> None:
        self._original = original
        self._ops = ops

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        *arguments: Any,  # noqa: ANN401
        **keywords: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [1, heads, N, dim], key [1, kv_heads, N, dim], cosine and sine [1, N, dim] -> both, rotated in
        place."""
        if arguments or keywords or not _takes(query, key, cosine, sine):
            return self._original(query, key, cosine, sine, *arguments, **keywords)
        self._ops.rotate(query[0], key[0], cosine[0], sine[0])
        return query, key


def _takes(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    return (
        query.dtype == key.dtype == cosine.dtype == sine.dtype
        and query.shape[0] == 1
        and cosine.shape == sine.shape == (1, query.shape[2], query.shape[3])
        and key.shape[3] == query.shape[3]
        and query.stride(3) == key.stride(3) == 1
        and cosine.is_contiguous()
        and sine.is_contiguous()
    )


def fused_rotary_of(attention: nn.Module) -> FusedRotary | None:
    """What stands for the rotary function of an attention module; None if that was not fused."""
    forward = attention.__dict__.get("forward")
    found = forward.__func__.__globals__.get(ROTARY_NAME) if isinstance(forward, MethodType) else None
    return found if isinstance(found, FusedRotary) else None


def fuse_rotary(layer: ProbedLayer, dtype: torch.dtype, ops: LayerOps) -> bool:
    """Gives a layer's attention module the kernel in place of its rotary function.

    False, and nothing changes, if it has none or one that computes something else.
    """
    attention, dim = layer.attention, layer.kind.key_dim
    forward = type(attention).forward
    if not isinstance(forward, FunctionType) or ROTARY_NAME not in forward.__code__.co_names:
        return False
    original = forward.__globals__.get(ROTARY_NAME)
    if original is None or dim % 2 or not _agrees(original, ops, (layer.query_heads, layer.kind.kv_heads, dim), dtype):
        return False
    names = {**forward.__globals__, ROTARY_NAME: FusedRotary(original, ops)}
    bound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = MethodType(bound, attention)
    return True


def _agrees(original: RotaryFunction, ops: LayerOps, shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
    query_heads, kv_heads, dim = shape
    query = sample(1, query_heads, SAMPLE_ROWS, dim, dtype=dtype)
    key = sample(1, kv_heads, SAMPLE_ROWS, dim, dtype=dtype, seed=1)
    # Halves that differ tell rotations of pairs (i, i + dim / 2) from those of pairs (2 i, 2 i + 1).
    cosine, sine = (sample(1, SAMPLE_ROWS, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    with torch.inference_mode():
        try:
            expected = original(query, key, cosine, sine)
        except (RuntimeError, TypeError, ValueError):
            return False  # another signature, or other shapes of cosine and sine
        found = FusedRotary(original, ops)(query.clone(), key.clone(), cosine, sine)
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
