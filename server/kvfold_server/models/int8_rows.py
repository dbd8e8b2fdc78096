"""Rows in 8 bits, by plain torch: what `LayerOps` computes in one pass, where there are no native kernels.

A row is multiplied, block by block, by a Hadamard matrix H before it is rounded. H is orthogonal up to its size, so a
weight that is multiplied by H / size gives the same product, but what is large in one value (some dimensions of hidden
states are hundreds of times as large as the others) is spread over the block, and the row's step becomes small
(as in QuaRot, arXiv:2404.00456, which turns whole hidden states by rewriting the model).
"""

from __future__ import annotations

from functools import cache
from typing import Final, Protocol

import torch

from kvfold_server.kv.native.layer_ops import Int8Rows

ZERO_POINT: Final = 128
MOST_STEPS: Final = 127
"""From the zero point, either way."""

LARGEST_BLOCK: Final = 64
"""Blocks of 16, 32 and 64 cost the default model 0.74%, 0.68% and 0.57% of its quality, none 3.2%."""

LEAST_PEAK: Final = 1e-30
"""Of a row; a row of zeros is divided by it."""


class Int8Kernels(Protocol):
    """What stands before and after a product of int8 numbers."""

    def quantize(self, hidden: torch.Tensor, block: int) -> Int8Rows:
        """Multiplies each `block` values of hidden [..., width] by the Hadamard matrix and rounds each row to 8 bits.

        A row that holds something that is no finite number gets a step that is none.
        """

    def restore(
        self, products: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """products [..., width] fp32 times steps [...], plus bias [width]: [..., width] in `dtype`."""


class PlainKernels:
    """The kernels in plain torch."""

    def quantize(self, hidden: torch.Tensor, block: int) -> Int8Rows:
        """In fp32 until it rounds."""
        turned = spread(hidden, block)
        peaks = turned.abs().amax(-1).clamp_(min=LEAST_PEAK)
        numbers = turned * (MOST_STEPS / peaks)[..., None] + ZERO_POINT
        return Int8Rows(numbers.round_().nan_to_num_(0.0).to(torch.uint8), peaks / MOST_STEPS)

    def restore(
        self, products: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Computes in fp32 and rounds once."""
        result = products * steps[..., None]
        return (result if bias is None else result + bias).to(dtype)


def block_size(width: int) -> int:
    """The largest power of two up to LARGEST_BLOCK that divides a row; of a row of odd width nothing is spread."""
    block = LARGEST_BLOCK
    while width % block:
        block //= 2
    return block


def spread(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Each `block` values of rows [..., width] times the Hadamard matrix, in fp32."""
    return (rows.to(torch.float32).reshape(-1, block) @ hadamard(block)).view(rows.shape)


@cache
def hadamard(size: int) -> torch.Tensor:
    """The Hadamard matrix [size, size] in Sylvester's order, fp32; size is a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
