"""Putting packed weights in place of a model's linear layers, and one product in place of gate and up.

Then, if asked for, int8 in place of the packed weights.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvfold_server.models.int8_rows import PlainKernels
from kvfold_server.models.int8_weight import quantize_weight
from kvfold_server.models.packed_weight import PackedWeight, can_pack, pack_weight
from kvfold_server.models.projections import ProjectionFacade, SeparateParts
from kvfold_server.runtime import release_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfold_server.kv.native.layer_ops import LayerOps

logger = logging.getLogger(__name__)

GATED = ("gate_proj", "up_proj")
GATED_PROJECTION = "kvfold_gate_up"


class GateUpProjection(nn.Module):
    """The gate and up projections of an MLP as one packed weight."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        bias = None if gate.bias is None else torch.cat((gate.bias, up.bias))
        self.packed = pack_weight(torch.cat((gate.weight.detach(), up.weight.detach())), bias)
        self.width = gate.out_features
        self.hidden_size = gate.in_features
        self.dtype = gate.weight.dtype

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """hidden [..., in] -> gate [..., width] and up [..., width], slices of one result."""
        gate, up = torch.split(self.packed(hidden), [self.width, self.width], dim=-1)
        return gate, up


def packs_linears(model: PreTrainedModel) -> bool:
    """Whether a model's products gain from packed weights, by its data type and device."""
    return can_pack(model.dtype, model.device.type)


def pack_linears(model: PreTrainedModel) -> None:
    """Packs every linear layer of a model. Their own weights are freed, but for those that another module holds too (an
    embedding tied to the logits)."""
    for module in list(model.modules()):
        _fuse_gate_up(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, pack_weight(child.weight.detach(), child.bias))


def quantize_linears(model: PreTrainedModel, ops: LayerOps | None) -> None:
    """Puts int8 in place of every packed weight; what it had is freed. Embeddings, norms and weights that no linear
    layer holds (those of experts) stay as they are."""
    before = weight_bytes(model)
    kernels = PlainKernels() if ops is None else ops
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.change_form(quantize_weight(module.form.dense(), kernels))
    release_freed_memory()
    logger.info("int8 weights: %.1f MiB instead of %.1f", weight_bytes(model) / 2**20, before / 2**20)


def weight_bytes(model: nn.Module) -> int:
    """The memory of a model's weights; what several modules hold counts once."""
    stored = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.parameters()}
    forms = [module.form for module in model.modules() if isinstance(module, PackedWeight)]
    return sum(stored.values()) + sum(form.packed_bytes for form in forms)


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
