"""Projection facades: one fused GEMM for Q, K and V, and none for the K and V that no sequence of the batch owns.

A facade takes the place of a projection and returns what the model's own code expects of it, always N rows. Rows of K
and V that no owner needs are not computed: their memory is uninitialised, whatever follows (norms, RoPE) works on
them in vain, and nothing reads them.

    separate       q_proj, k_proj, v_proj     [Q], [K], [V]
    concatenated   qkv_proj, c_attn           [Q | K | V]
    interleaved    query_key_value            [Q K V of head 0 | Q K V of head 1 | ...]
"""

from __future__ import annotations

from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kvfold_server.models.packed_weight import pack_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold_server.models.attention import LayerBinding

SLICED_ROWS = 64
"""From this many sharers' rows on, K and V are projected for the owners' rows alone. Two GEMMs instead of one broke
even between 32 and 64 rows left out (bf16 and fp32, hidden sizes 576 and 2,048, one Zen 4 core)."""


class QkvProjection(nn.Module):
    """The weights of a layer's Q, K and V projections as one matrix [q + k + v, hidden], and who needs which rows.

    `forward` maps hidden states [1, N, hidden] to Q [1, N, q], K [1, N, k] and V [1, N, v] of the step in progress.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, widths: list[int], binding: LayerBinding
    ) -> None:
        super().__init__()
        self.packed = pack_weight(weight, bias)
        self.widths = widths
        self.binding = binding
        self._project = self.packed.forward

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects all rows, or leaves out K and V of those after the owners."""
        layer, context = self.binding.layer, self.binding.context
        rows = hidden.shape[1]
        owned = context.active.batch.owner_tokens[layer]
        query_width, key_width, value_width = self.widths
        context.query_rows[layer] += rows
        if owned == rows or (owned > 0 and rows - owned < SLICED_ROWS):
            context.key_value_rows[layer] += rows
            query, key, value = torch.split_with_sizes(self._project(hidden), self.widths, dim=-1)
            return query, key, value
        context.key_value_rows[layer] += owned
        query = self.packed.part(0, query_width)(hidden)
        key_value = hidden.new_empty(1, rows, key_width + value_width)
        if owned > 0:
            # Two dimensions: of a slice of three, torch's bf16 product takes many times as long.
            key_value[0, :owned] = self.packed.part(query_width, sum(self.widths))(hidden[0, :owned])
        key, value = torch.split(key_value, [key_width, value_width], dim=-1)
        return query, key, value


class SeparateParts:
    """Hands out the parts of one projection, one call each, in any order, computing them with the first."""

    def __init__(self, projection: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], count: int) -> None:
        self._projection = projection
        self._hidden: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = [None] * count

    def taker(self, part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What stands for a part, by its place in the projection's result: maps hidden states to that part."""
        return partial(self._take, part)

    def _take(self, part: int, hidden: torch.Tensor) -> torch.Tensor:
        result = self._parts[part]
        if result is None or hidden is not self._hidden:
            self._parts[:] = self._projection(hidden)
            self._hidden = hidden
            result = cast("torch.Tensor", self._parts[part])
        self._parts[part] = None
        if all(other is None for other in self._parts):
            self._hidden = None
        return result


class ProjectionFacade(nn.Module):
    """Stands where a projection stood and computes by other means; holds no weights of its own."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the projection would have returned for hidden [1, N, in]: [1, N, out]."""
        return self._compute(hidden)


class FusedLayout(Enum):
    """How one projection's output holds Q, K and V: side by side, or head by head."""

    CONCATENATED = "concatenated"
    INTERLEAVED = "interleaved"


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a plain matrix product with a bias or none, whose weights a facade can take over."""
    return type(module) in {nn.Linear, Conv1D}


def layout_of(output: torch.Tensor, value: torch.Tensor) -> FusedLayout | None:
    """Finds V [kv_heads, value_dim] of a token in a fused projection's output [width] for it; None if it is not
    there."""
    kv_heads, value_dim = value.shape
    if torch.equal(output[-value.numel() :].view(kv_heads, value_dim), value):
        return FusedLayout.CONCATENATED
    if output.shape[0] % (3 * kv_heads) == 0 and torch.equal(output.view(kv_heads, -1)[:, -value_dim:], value):
        return FusedLayout.INTERLEAVED
    return None
