"""Putting packed weights in place of a model's linear layers, and one product in place of gate and up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kvfold_server.models.packed_weight import PackedWeight, can_pack
from kvfold_server.models.projections import ProjectionFacade, SeparateParts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATED = ("gate_proj", "up_proj")
GATED_PROJECTION = "kvfold_gate_up"


class GateUpProjection(nn.Module):
    """The gate and up projections of an MLP as one packed weight."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        bias = None if gate.bias is None else torch.cat((gate.bias, up.bias))
        self.packed = PackedWeight(torch.cat((gate.weight.detach(), up.weight.detach())), bias)
        self.width = gate.out_features
        self.hidden_size = gate.in_features
        self.dtype = gate.weight.dtype

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """hidden [..., in] -> gate [..., width] and up [..., width], slices of one result."""
        gate, up = torch.split(self.packed(hidden), [self.width, self.width], dim=-1)
        return gate, up


def pack_linears(model: PreTrainedModel) -> None:
    """Packs every linear layer of a model whose data type and device gain from it. Their own weights are freed, but for
    those that another module holds too (an embedding tied to the logits)."""
    if not can_pack(model.dtype, model.device.type):
        return
    for module in list(model.modules()):
        _fuse_gate_up(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedWeight(child.weight.detach(), child.bias))


def _fuse_gate_up(module: nn.Module) -> None:
    gate, up = (getattr(module, name, None) for name in GATED)
    if type(gate) is not nn.Linear or type(up) is not nn.Linear:
        return
    if gate.weight.shape != up.weight.shape or (gate.bias is None) != (up.bias is None):
        return
    projection = GateUpProjection(gate, up)
    module.add_module(GATED_PROJECTION, projection)
    parts = SeparateParts(projection, len(GATED))
    for part, name in enumerate(GATED):
        setattr(module, name, ProjectionFacade(parts.taker(part)))
