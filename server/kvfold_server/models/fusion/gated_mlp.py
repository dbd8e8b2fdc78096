"""Gated MLPs, down(activation(gate) * up), with the activation and the product by one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfold_server.kv.native.layer_ops import Activation
from kvfold_server.models.fusion.agreement import SAMPLE_ROWS, agrees, sample
from kvfold_server.models.packed_linear import GATED_PROJECTION, GateUpProjection

if TYPE_CHECKING:
    from torch import nn

    from kvfold_server.kv.native.layer_ops import LayerOps


class GatedMlp:
    """The forward of an MLP whose gate and up projections are one product."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: Activation, ops: LayerOps) -> None:
        self._gate_up = gate_up.forward
        self._down = down.forward
        self._activation = activation
        self._ops = ops

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., in] -> [..., in]."""
        result: torch.Tensor = self._down(self._ops.gate(self._gate_up(hidden), self._activation))
        return result


def fuse_gated_mlp(module: nn.Module, ops: LayerOps) -> bool:
    """Gives an MLP whose gate and up are one product the kernel in its forward. False, and nothing changes, if it has
    another form or activation."""
    projection, down = getattr(module, GATED_PROJECTION, None), getattr(module, "down_proj", None)
    if not isinstance(projection, GateUpProjection) or down is None:
        return False
    hidden = sample(1, SAMPLE_ROWS, projection.hidden_size, dtype=projection.dtype)
    with torch.inference_mode():
        expected = module(hidden)
        for activation in Activation:
            fused = GatedMlp(projection.packed, down, activation, ops)
            if agrees(fused(hidden), expected):
                module.forward = fused
                return True
    return False
