"""Root-mean-square norms (Zhang and Sennrich, arXiv:1910.07467) by one kernel.

Models differ in two things, which are found by trying: whether 1 is added to the weight (gemma), and whether the
normalised value is rounded to the model's data type before the weight comes in (most) or after (olmo2, gemma).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kvfold_server.models.fusion.agreement import SAMPLE_ROWS, agrees, sample, share_of_equal

if TYPE_CHECKING:
    from kvfold_server.kv.native.layer_ops import LayerOps

EPSILON_NAMES = ("variance_epsilon", "eps")
VARIANTS = ((0.0, True), (0.0, False), (1.0, False))
"""weight_offset and round_first."""


class FusedRmsNorm:
    """The forward of a norm with a weight [width]."""

    def __init__(self, ops: LayerOps, weight: torch.Tensor, epsilon: float, variant: tuple[float, bool]) -> None:
        self._ops = ops
        self._weight = weight
        self._epsilon = epsilon
        self._weight_offset, self._round_first = variant

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., width] -> [..., width]."""
        return self._ops.rms_norm(
            hidden, self._weight, self._epsilon, weight_offset=self._weight_offset, round_first=self._round_first
        )

    def of_sum(self, hidden: torch.Tensor, addend: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + addend, both [..., width], and the norm of that."""
        return self._ops.add_rms_norm(
            hidden,
            addend,
            self._weight,
            self._epsilon,
            weight_offset=self._weight_offset,
            round_first=self._round_first,
        )


def fuse_rms_norm(module: nn.Module, ops: LayerOps) -> bool:
    """Gives a norm the kernel as its forward. False, and nothing changes, if it is no such norm."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    epsilon = next((getattr(module, name) for name in EPSILON_NAMES if hasattr(module, name)), None)
    if len(parameters) != 1 or weight is None or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    if isinstance(module, nn.LayerNorm) or next(module.children(), None) is not None:
        return False
    hidden = sample(1, SAMPLE_ROWS, weight.shape[0], dtype=weight.dtype)
    with torch.inference_mode():
        expected = module(hidden)
        kernels = [FusedRmsNorm(ops, weight.detach(), epsilon, variant) for variant in VARIANTS]
        results = [kernel(hidden) for kernel in kernels]
    best = max(range(len(kernels)), key=lambda index: share_of_equal(results[index], expected))
    if not agrees(results[best], expected):
        return False
    module.forward = kernels[best]
    return True
