"""Weights in the order in which oneDNN reads them.

torch's own bf16 product reorders the weights in each call; reordered once, a step of few rows takes half the time,
and the results are the same to the bit. The operations are private to torch, so they are tried before they are used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional

ROWS_HINT = 32
"""oneDNN chooses an order for about this many rows of input; that of 32 was as good as any from 1 to 512."""


class PackedWeight(nn.Module):
    """A weight [out, in] with an optional bias [out]; packed where that pays and works, else as it was.

    The packed form replaces the weight: nothing else holds its memory.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._reordered: torch.Tensor | None = None
        self.weight: nn.Parameter | None = None
        if can_pack(weight.dtype, weight.device.type):
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self._parts: dict[tuple[int, int], PackedWeight] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., in] -> [..., out]."""
        if self._reordered is None:
            return functional.linear(hidden, self.dense(), self.bias)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._reordered, self.bias, "none", [], "")
        return result

    def part(self, first: int, stop: int) -> PackedWeight:
        """Outputs [first, stop) as a weight of their own, made when it is first asked for; a copy if packed."""
        if (first, stop) not in self._parts:
            bias = None if self.bias is None else self.bias[first:stop]
            self._parts[first, stop] = PackedWeight(self.dense()[first:stop], bias)
        return self._parts[first, stop]

    def dense(self) -> torch.Tensor:
        """The weight in its usual order [out, in]; a copy if packed."""
        if self.weight is not None:
            return self.weight
        if self._reordered is None:
            raise RuntimeError("a packed weight has one of two forms")
        return self._reordered.to_dense()


@cache
def can_pack(dtype: torch.dtype, device_type: str) -> bool:
    """Whether packed products work here and equal the usual ones. fp32 stays as it is: its product is the oracle."""
    if device_type != "cpu" or dtype is not torch.bfloat16:
        return False
    weight = torch.randn(64, 32, dtype=dtype)
    hidden = torch.randn(3, 32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        result = torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")
        return torch.equal(result, functional.linear(hidden, weight)) and torch.equal(packed.to_dense(), weight)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
