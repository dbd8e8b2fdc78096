"""The load-time probe: what each layer of a model passes to its attention, read from one forward pass.

Every token of the pass is the same and attention, registered under a throw-away name, returns zeros, so the hidden
states at all positions are equal (unless positions were added at the input): keys then differ between positions by
their RoPE alone.

Windows are read from the mask that transformers builds for a layer (masks.py), neither from a long prompt nor from the
`sliding_window` argument, which some models never pass.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.models.attention import unknown_arguments
from kvfold_server.models.errors import UnsupportedModelError
from kvfold_server.models.masks import recorded_mask, window_of
from kvfold_server.models.projections import FusedLayout, is_projection, layout_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

PROBE_TOKENS = 32
"""Positions of the pass: enough for RoPE bases to differ in their cosines."""


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """One layer: its attention module, its kind, and the child that projects Q, K and V in one, if there is one."""

    attention: nn.Module
    kind: LayerKind
    query_heads: int
    fused_child: str | None
    fused_layout: FusedLayout | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a model is, layer by layer from the embedding upward."""

    layers: tuple[ProbedLayer, ...]
    geometry: CacheGeometry


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of the attention function received. Tensors are [1, heads, PROBE_TOKENS, dim]."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    arguments: dict[str, Any]


def probe_model(model: PreTrainedModel) -> Probe:
    """Reads the layers of an unpatched model. Raises UnsupportedModelError, with the reason, if kvfold cannot serve it.

    The model is left as it was but for its attention implementation, which the caller sets next.
    """
    layer_count: int = model.config.num_hidden_layers
    recorder = _Recorder(model)
    try:
        with torch.inference_mode(), recorder.recording() as name:
            model.set_attn_implementation(name)
            model(
                input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device),
                position_ids=torch.arange(PROBE_TOKENS, device=model.device)[None],
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.long, device=model.device),  # nobody reads them
            )
    finally:
        model.set_attn_implementation("eager")
    calls = recorder.calls
    if not calls:
        raise UnsupportedModelError("the model does not call the attention registry of transformers")
    repeated = [module for module, count in Counter(call.module for call in calls).items() if count > 1]
    if repeated:
        raise UnsupportedModelError("the model calls the attention function several times in one layer")
    if len(calls) != layer_count:
        raise UnsupportedModelError(
            f"{len(calls)} of {layer_count} layers call the attention function: the others keep another kind of state"
        )
    layers = tuple(_layer(call, recorder) for call in calls)
    try:
        geometry = CacheGeometry(tuple(layer.kind for layer in layers), calls[0].key.element_size())
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error
    return Probe(layers, geometry)


def _layer(call: _Call, recorder: _Recorder) -> ProbedLayer:
    arguments = dict(call.arguments)
    scaling = arguments.pop("scaling", None)
    if not isinstance(scaling, float | int):
        raise UnsupportedModelError("the model passes no scaling to its attention")
    declared = arguments.pop("sliding_window", None)
    softcap = arguments.pop("softcap", None)
    if softcap is not None and not isinstance(softcap, float | int):
        raise UnsupportedModelError("the model's softcap is not a number")
    arguments.pop("s_aux", None)
    if unknown := unknown_arguments(arguments):
        raise UnsupportedModelError(f"the attention of the model uses {', '.join(unknown)}, which no backend computes")
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        raise UnsupportedModelError("the attention of the model mixes data types")
    if call.query.shape[1] % call.key.shape[1] or call.key.shape[1] != call.value.shape[1]:
        raise UnsupportedModelError("the query heads are not a multiple of the KV heads")
    window = recorder.window(call)
    if declared is not None and declared != window:
        raise UnsupportedModelError(f"the model asks for a window of {declared} tokens but its mask has {window}")
    child, layout = recorder.fused_projection(call)
    return ProbedLayer(
        attention=call.module,
        kind=LayerKind(
            window=window,
            rope=recorder.rope(call),
            kv_heads=call.key.shape[1],
            key_dim=call.key.shape[3],
            value_dim=call.value.shape[3],
        ),
        query_heads=call.query.shape[1],
        fused_child=child,
        fused_layout=layout,
    )


class _Recorder:
    """Records the attention calls of one forward pass, and what the projections and the RoPE of each module gave."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.calls: list[_Call] = []
        self._position_embeddings: dict[nn.Module, tuple[torch.Tensor, ...]] = {}
        self._first_rows: dict[nn.Module, torch.Tensor] = {}
        self._windows: dict[int, int | None] = {}

    @contextmanager
    def recording(self) -> Iterator[str]:
        """Registers the recorder under a name of its own, which it yields, and hooks the model; undoes both."""
        name = f"kvfold_probe_{uuid4().hex}"
        AttentionInterface.register(name, self._attention)
        AttentionMaskInterface.register(name, recorded_mask)
        hooks = []
        takes_positions: dict[type[nn.Module], bool] = {}  # a model has hundreds of modules, of a dozen classes
        for module in self._model.modules():
            kind = type(module)
            if kind not in takes_positions:
                takes_positions[kind] = "position_embeddings" in inspect.signature(kind.forward).parameters
            if takes_positions[kind]:
                hooks.append(module.register_forward_pre_hook(self._see_positions, with_kwargs=True))
            if is_projection(module):
                hooks.append(module.register_forward_hook(self._see_projection))
        try:
            yield name
        finally:
            for hook in hooks:
                hook.remove()
            AttentionInterface._global_mapping.pop(name)
            AttentionMaskInterface._global_mapping.pop(name)

    def window(self, call: _Call) -> int | None:
        """The window of a call's mask; layers of one kind receive the same mask, which is read once."""
        if id(call.mask) not in self._windows:
            self._windows[id(call.mask)] = window_of(call.mask)
        return self._windows[id(call.mask)]

    def fused_projection(self, call: _Call) -> tuple[str | None, FusedLayout | None]:
        """The child of an attention module that projects Q, K and V in one, and how they lie in its output."""
        width = sum(states.shape[1] * states.shape[3] for states in (call.query, call.key, call.value))
        for name, child in call.module.named_children():
            output = self._first_rows.get(child)
            if output is not None and output.shape[0] == width:
                return name, layout_of(output, call.value[0, :, 0])
        return None, None

    def rope(self, call: _Call) -> str:
        """Names the position encoding of a layer's keys."""
        key = call.key[0].float()
        if torch.allclose(key, key[:, :1].expand_as(key), rtol=0.0, atol=0.02 * float(key.abs().max())):
            return "none"
        embeddings = self._position_embeddings.get(call.module)
        if embeddings is not None:
            return f"rotary {_digest(embeddings)}"
        parameters = getattr(self._model.config, "rope_parameters", None)
        layer_types = getattr(self._model.config, "layer_types", None)
        if layer_types and isinstance(parameters, dict) and set(layer_types) <= set(parameters):
            return f"of {layer_types[self.calls.index(call)]} layers"
        return "of the model"

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, None]:
        self.calls.append(_Call(module, query, key, value, attention_mask, arguments))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def _see_positions(self, module: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **arguments).arguments
        embeddings = bound.get("position_embeddings")
        if isinstance(embeddings, torch.Tensor):
            self._position_embeddings[module] = (embeddings,)
        elif isinstance(embeddings, tuple):
            self._position_embeddings[module] = embeddings

    def _see_projection(self, module: nn.Module, _: tuple[Any, ...], output: torch.Tensor) -> None:
        self._first_rows[module] = output.flatten(0, -2)[0]


def _digest(tensors: tuple[torch.Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
