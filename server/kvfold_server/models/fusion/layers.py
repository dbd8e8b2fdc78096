"""Fusing all that can be fused of a patched model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvfold_server.models.fusion.decoder_layer import fuse_decoder_layers
from kvfold_server.models.fusion.gated_mlp import fuse_gated_mlp
from kvfold_server.models.fusion.rms_norm import fuse_rms_norm
from kvfold_server.models.fusion.rotary import fuse_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfold_server.kv.native.layer_ops import LayerOps
    from kvfold_server.models.probe import Probe

logger = logging.getLogger(__name__)


def fuse_layers(model: PreTrainedModel, probe: Probe, ops: LayerOps) -> None:
    """Gives norms, gated MLPs and rotary positions native kernels, and layers made of these one function, where those
    compute the same. The model's attention is kvfold's already."""
    modules = list(model.modules())
    norms = sum(fuse_rms_norm(module, ops) for module in modules)
    mlps = sum(fuse_gated_mlp(module, ops) for module in modules)
    rotaries = sum(fuse_rotary(layer, model.dtype, ops) for layer in probe.layers)
    whole = fuse_decoder_layers(model, probe)
    logger.info(
        "native kernels compute %d norms, %d MLPs and the positions of %d layers, %d of them whole",
        norms,
        mlps,
        rotaries,
        whole,
    )
