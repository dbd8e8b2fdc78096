"""Weights in int8, multiplied with activations in int8 by oneDNN.

Each output has a step of its own, each row of activations too. Sums of int8 products are exact, so what a row gets does
not depend on the other rows of its batch, to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from kvfold_server.models.int8_rows import LEAST_PEAK, MOST_STEPS, ZERO_POINT, block_size, spread
from kvfold_server.models.packed_weight import ROWS_HINT, WeightForm

if TYPE_CHECKING:
    from kvfold_server.models.int8_rows import Int8Kernels

OUTPUTS_AT_ONCE = 4096
"""Outputs of a weight that are in fp32 together while it is rounded."""

_NONE = torch.zeros(0, dtype=torch.int64)
"""The zero points of a weight that has none."""


class Int8Weight(WeightForm):
    """numbers [out, in] int8 * steps [out] fp32 = the weight, each block of its rows times the Hadamard matrix / size.

    One byte for each value and four for each output. `dtype` is that of the weight it was made of.
    """

    def __init__(self, numbers: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype, kernels: Int8Kernels) -> None:
        super().__init__()
        self._block = block_size(numbers.shape[1])
        self._packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(numbers, [ROWS_HINT, numbers.shape[1]])
        self._steps = steps
        self._dtype = dtype
        self._kernels = kernels

    def multiply(self, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Rounds the rows to 8 bits, multiplies, and scales the exact sums."""
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], self._steps.shape[0])
        rows = self._kernels.quantize(hidden, self._block)
        products = _multiply(rows.numbers, self._packed, self._steps)
        return self._kernels.restore(products, rows.steps, bias, hidden.dtype)

    def outputs(self, first: int, stop: int) -> Int8Weight:
        """A copy of the same numbers."""
        numbers = self._numbers()[first:stop].contiguous()
        return Int8Weight(numbers, self._steps[first:stop].clone(), self._dtype, self._kernels)

    def dense(self) -> torch.Tensor:
        """A copy, rounded to int8 and then to the data type of the weight that it was made of."""
        return spread(self._numbers() * self._steps[:, None], self._block).to(self._dtype)

    @property
    def packed_bytes(self) -> int:
        """Those of numbers and steps, without what oneDNN pads them with."""
        return self._packed.numel() + self._steps.nbytes

    def _numbers(self) -> torch.Tensor:
        return self._packed.to_dense().T


def quantize_weight(weight: torch.Tensor, kernels: Int8Kernels) -> Int8Weight:
    """Rounds a weight [out, in] to int8, with a step for each output."""
    block = block_size(weight.shape[1])
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    steps = torch.empty(weight.shape[0])
    for first in range(0, weight.shape[0], OUTPUTS_AT_ONCE):
        part = slice(first, first + OUTPUTS_AT_ONCE)
        turned = spread(weight[part], block) / block
        steps[part] = turned.abs().amax(-1).clamp(min=LEAST_PEAK) / MOST_STEPS
        numbers[part] = (turned / steps[part, None]).round_().to(torch.int8)
    return Int8Weight(numbers, steps, weight.dtype, kernels)


def int8_refusal(device_type: str) -> str | None:
    """Why int8 weights cannot be served on a device; None if they can."""
    if device_type != "cpu":
        return f"int8 weights run on cpu, not on {device_type}"
    if not _products_are_exact():
        return (
            "int8 weights need a processor with exact int8 products (AVX-512 VNNI, AVX-VNNI or AMX) and torch's oneDNN "
            "products for it"
        )
    return None


def _multiply(numbers: torch.Tensor, packed: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """(numbers [..., in] - ZERO_POINT) times a packed weight, times steps [out]: [..., out] fp32."""
    result: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        numbers, 1.0, ZERO_POINT, packed, steps, _NONE, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


@cache
def _products_are_exact() -> bool:
    """Tries the largest numbers: older processors add pairs of products in 16 bits, where these do not fit."""
    width = 64
    numbers = torch.full((2, width), 255, dtype=torch.uint8)
    weight = torch.full((width, width), 127, dtype=torch.int8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, [ROWS_HINT, width])
        result = _multiply(numbers, packed, torch.ones(width))
        return torch.equal(result, torch.full_like(result, (255 - ZERO_POINT) * 127 * width)) and torch.equal(
            packed.to_dense(), weight
        )
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
