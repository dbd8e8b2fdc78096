"""Weights in the form in which they are multiplied: as they were, or in the order in which oneDNN reads them.

torch's own bf16 product reorders the weights in each call; reordered once, a step of few rows takes half the time,
and the results are the same to the bit. The operations are private to torch, so they are tried before they are used.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

ROWS_HINT = 32
"""oneDNN chooses an order for about this many rows of input; that of 32 was as good as any from 1 to 512."""


class WeightForm(nn.Module):
    """A weight [out, in] in one form."""

    @abstractmethod
    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """hidden [..., in] times the weight, plus bias [out]: [..., out]."""

    @abstractmethod
    def outputs(self, first: int, stop: int) -> WeightForm:
        """Outputs [first, stop) in the same form."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The weight [out, in] in the model's data type."""

    @property
    @abstractmethod
    def packed_bytes(self) -> int:
        """The memory that it takes beside its parameters."""


class DenseWeight(WeightForm):
    """As it was."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By torch's own product."""
        return functional.linear(hidden, self.weight, bias)

    def outputs(self, first: int, stop: int) -> DenseWeight:
        """A view."""
        return DenseWeight(self.weight[first:stop])

    def dense(self) -> torch.Tensor:
        """The weight itself."""
        return self.weight

    @property
    def packed_bytes(self) -> int:
        """None: the weight is a parameter."""
        return 0


class ReorderedWeight(WeightForm):
    """A copy in oneDNN's order; see `can_pack`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self._product = torch.ops.mkldnn._linear_pointwise.default  # naming the overload saves a search in each call

    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By oneDNN's product."""
        result: torch.Tensor = self._product(hidden, self._reordered, bias, "none", [], "")
        return result

    def outputs(self, first: int, stop: int) -> ReorderedWeight:
        """A copy."""
        return ReorderedWeight(self.dense()[first:stop])

    def dense(self) -> torch.Tensor:
        """A copy."""
        return self._reordered.to_dense()

    @property
    def packed_bytes(self) -> int:
        """Those of its values, without what oneDNN pads them with."""
        return self._reordered.numel() * self._reordered.element_size()


class PackedWeight(nn.Module):
    """A weight [out, in] in some form, with an optional bias [out]. Nothing else holds the weight's memory."""

    def __init__(self, form: WeightForm, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._parts: dict[tuple[int, int], PackedWeight] = {}
        self.change_form(form)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., in] -> [..., out]."""
        return self._multiply(hidden)

    def part(self, first: int, stop: int) -> PackedWeight:
        """Outputs [first, stop) as a weight of their own, made when it is first asked for; a copy if packed."""
        if (first, stop) not in self._parts:
            bias = None if self.bias is None else self.bias[first:stop]
            self._parts[first, stop] = PackedWeight(self.form.outputs(first, stop), bias)
        return self._parts[first, stop]

    def change_form(self, form: WeightForm) -> None:
        """Takes another form of the same weight. The memory of the one it had is freed, and that of its parts."""
        self.form = form
        self._multiply = partial(form.multiply, bias=self.bias)  # a module looks its parts up slowly
        self._parts.clear()


def pack_weight(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    """Packs a weight [out, in] where that pays and works; else it stays as it was."""
    packs = can_pack(weight.dtype, weight.device.type)
    return PackedWeight(ReorderedWeight(weight) if packs else DenseWeight(weight), bias)


@cache
def can_pack(dtype: torch.dtype, device_type: str) -> bool:
    """Whether packed products work here and equal the usual ones. fp32 stays as it is: its product is the oracle."""
    if device_type != "cpu" or dtype is not torch.bfloat16:
        return False
    weight = torch.randn(64, 32, dtype=dtype)
    hidden = torch.randn(3, 32, dtype=dtype)
    try:
        packed = ReorderedWeight(weight)
        result = packed.multiply(hidden, None)
        return torch.equal(result, functional.linear(hidden, weight)) and torch.equal(packed.dense(), weight)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
