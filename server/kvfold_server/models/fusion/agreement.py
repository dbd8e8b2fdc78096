"""Whether a kernel computes what a model's own code does: compared on random input, before it takes its place."""

from __future__ import annotations

import torch

SAMPLE_ROWS = 5

MOST_STEPS = 2
"""Steps of the data type between two results, at most: the last rounding may go either way."""

SUM_ERROR = 1e-5
"""Relative difference of two sums in fp32 in another order, at most."""

LEAST_EQUAL = 0.9
"""Of the values of a short data type, to the bit. Rounding in another place moves more of them."""


def sample(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def share_of_equal(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How many values are equal to the bit; 0.0 if any value is off by more than rounding."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return 0.0
    largest = float(expected.float().abs().max())
    bound = (MOST_STEPS * torch.finfo(expected.dtype).eps + SUM_ERROR) * (expected.float().abs() + 0.01 * largest)
    if not bool(((found.float() - expected.float()).abs() <= bound).all()):
        return 0.0
    return float((found == expected).float().mean())


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the results are the same up to the order of sums."""
    equal = share_of_equal(found, expected)
    return equal > 0.0 if expected.dtype is torch.float32 else equal >= LEAST_EQUAL
