"""Patching a transformers model without touching its forward."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

import torch

from kvfold_server.models.attention import ATTENTION_NAME, BINDING, LayerBinding
from kvfold_server.models.errors import UnsupportedModelError
from kvfold_server.models.facades import install_facades
from kvfold_server.models.fusion.layers import fuse_layers
from kvfold_server.models.packed_linear import pack_linears, packs_linears, quantize_linears
from kvfold_server.models.patched import PatchedModel
from kvfold_server.models.probe import probe_model
from kvfold_server.models.self_check import SelfCheck
from kvfold_server.models.step_context import StepContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfold_server.kv.native.layer_ops import LayerOps

logger = logging.getLogger(__name__)


def patch_model(model: PreTrainedModel, ops: LayerOps | None = None, *, int8_weights: bool = False) -> PatchedModel:
    """Probes, patches and checks a model, in place. It computes steps from then on and can be called in no other way.

    With `ops`, native kernels compute what they can of its layers. `int8_weights` rounds the weights of its linear
    layers, after the check, which is of everything else: rounding is meant to change what the model computes.

    Raises UnsupportedModelError, with the reason, if the model cannot be served or its steps do not compute what its
    own forward did; the model is of no use then.
    """
    try:
        return _patch(model, ops, int8_weights=int8_weights)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"the model's forward fails: {type(error).__name__}: {error}") from error


def _patch(model: PreTrainedModel, ops: LayerOps | None, *, int8_weights: bool) -> PatchedModel:
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError("the model computes the logits of all positions, always (no logits_to_keep)")
    probe = probe_model(model)
    check = SelfCheck(model, probe.geometry)
    context = StepContext(probe.geometry.layer_count)
    without_facade = []
    for index, layer in enumerate(probe.layers):
        binding = LayerBinding(index, layer.kind.window, context)
        setattr(layer.attention, BINDING, binding)
        if not install_facades(layer, binding):
            without_facade.append(index)
    if without_facade:
        logger.warning("layers %s project K and V of all rows: the layout of their weights is unknown", without_facade)
    if int8_weights or packs_linears(model):
        pack_linears(model)
    model.set_attn_implementation(ATTENTION_NAME)
    if ops is not None:
        fuse_layers(model, probe, ops)
    parts = (model, probe.geometry, context, tuple(without_facade))
    with torch.inference_mode():
        check.run(PatchedModel(*parts))
        if int8_weights:
            quantize_linears(model, ops)
    return PatchedModel(*parts)  # without the backend of the check
