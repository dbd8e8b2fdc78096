"""A dense forward over calibration sequences in which layers read other layers' K and V.

The model's own forward runs untouched; a registered attention function keeps the K and V (after RoPE) of each layer and
hands sharers those of their owners. A forward may start from an earlier one: layers below the first change return what
they returned then, so that trying another owner for layer j costs the layers from j upward.

    layer      0   1   2   3   4   5          sources of the base   0 1 2 3 4 5
    replayed   r   r   r                      sources asked for     0 1 2 0 4 5
    computed               c   c   c          layer 3 attends to the K and V of layer 0, as the base kept them
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import nn
from transformers import AttentionInterface

from kvfold_server.models.attention import unknown_arguments
from kvfold_server.models.errors import UnsupportedModelError
from kvfold_server.sharing.dense_attention import dense_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.sharing import SharingEntry
    from kvfold_server.models.probe import Probe


@dataclass(frozen=True, slots=True)
class Trace:
    """What one forward left behind, for later ones to start from.

    `keys` and `values` are [samples, kv_heads, tokens, dim] by owner layer; `layer_outputs` is what each decoder layer
    returned.
    """

    sources: tuple[int, ...]
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    layer_outputs: tuple[Any, ...]


@dataclass(slots=True)
class _Run:
    """The forward in progress."""

    sources: tuple[int, ...]
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    layer_outputs: list[Any] = field(default_factory=list)


class DenseModel:
    """A transformers model whose layers can read each other's K and V, for whole sequences; use it as a context
    manager.

    The model is the caller's, unpatched. While the context lasts nothing else may run it; afterwards it is as before.
    Raises UnsupportedModelError if the model's decoder layers are not found.
    """

    def __init__(self, model: PreTrainedModel, probe: Probe) -> None:
        self._model = model
        self._probe = probe
        self._layers = _decoder_layers(model, probe)
        self._layer_of = {layer.attention: index for index, layer in enumerate(probe.layers)}
        self._name = f"kvfold_dense_{uuid4().hex}"
        self._implementation = ""
        self._run = _Run(())

    def __enter__(self) -> DenseModel:
        AttentionInterface.register(self._name, self._attention)
        self._implementation = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._implementation)
        AttentionInterface._global_mapping.pop(self._name)

    @property
    def geometry(self) -> CacheGeometry:
        """The layers' kinds."""
        return self._probe.geometry

    @property
    def dtype_name(self) -> str:
        """The data type that the model computes in, such as "bfloat16"."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def unshared(self) -> tuple[int, ...]:
        """The sources of the unmodified model: each layer reads its own K and V."""
        return tuple(range(len(self._layers)))

    def logits(
        self,
        tokens: torch.Tensor,
        sources: Sequence[int],
        *,
        positions: torch.Tensor | None = None,
        base: Trace | None = None,
    ) -> tuple[torch.Tensor, Trace]:
        """Next-token logits of tokens [samples, tokens] at `positions` (all if None): [samples, positions, vocabulary].

        `sources` names for each layer the layer whose K and V it reads. `base` is a trace of the same tokens.
        """
        keep: Any = 0 if positions is None else positions
        with self._running(sources, base) as run:
            output = self._model(input_ids=tokens, use_cache=False, logits_to_keep=keep)
        return output.logits, _trace(run)

    def hidden(
        self, tokens: torch.Tensor, sources: Sequence[int], *, base: Trace | None = None
    ) -> tuple[torch.Tensor, Trace]:
        """The final hidden states of tokens [samples, tokens], before the output head: [samples, tokens, hidden]."""
        with self._running(sources, base) as run:
            output = self._model.base_model(input_ids=tokens, use_cache=False)
        return output.last_hidden_state, _trace(run)

    def local_errors(self, tokens: torch.Tensor, pairs: Sequence[SharingEntry]) -> dict[SharingEntry, float]:
        """How much each pair alone changes what the sharer's layer returns, in one forward of tokens [samples, tokens].

        The mean over tokens of |folded - exact|^2 / |exact|^2, all layers below being exact. Costs one layer per pair.
        """
        errors: dict[SharingEntry, float] = {}
        hooks = []
        try:
            with self._running(self.unshared, None) as run:
                for index, layer in enumerate(self._layers):
                    mine = [pair for pair in pairs if pair.sharer == index]
                    hooks.append(layer.register_forward_hook(_measuring(run, mine, errors), with_kwargs=True))
                self._model.base_model(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return errors

    @contextmanager
    def _running(self, sources: Sequence[int], base: Trace | None) -> Iterator[_Run]:
        wanted = tuple(sources)
        if any(wanted[source] != source or source > layer for layer, source in enumerate(wanted)):
            raise ValueError(f"sources {wanted}: a source is an owner, and not above its layer")
        first = 0 if base is None else _first_difference(wanted, base.sources)
        run = _Run(wanted)
        hooks = []
        try:
            for index, layer in enumerate(self._layers):
                if base is not None and index < first:
                    # On the instance, so that attributes which the model's forward reads from a layer stay in place.
                    layer.forward = _returning(base.layer_outputs[index])
                    if index in base.keys:
                        run.keys[index], run.values[index] = base.keys[index], base.values[index]
                hooks.append(layer.register_forward_hook(_appending(run.layer_outputs)))
            self._run = run
            with torch.inference_mode():
                yield run
        finally:
            self._run = _Run(())
            for hook in hooks:
                hook.remove()
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - the signature is that of transformers
        *,
        scaling: float,
        sliding_window: int | None = None,  # noqa: ARG002 - the probe has read it from the mask
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **arguments: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, None]:
        if unknown := unknown_arguments(arguments):
            raise UnsupportedModelError(
                f"the attention of the model uses {', '.join(unknown)}, which sharing does not know"
            )
        run, layer = self._run, self._layer_of[module]
        owner = run.sources[layer]
        if owner == layer:
            run.keys[layer], run.values[layer] = key, value
        window = self._probe.layers[layer].kind.window
        out = dense_attention(
            query, run.keys[owner], run.values[owner], scaling=scaling, window=window, softcap=softcap, s_aux=s_aux
        )
        return out, None


def _decoder_layers(model: PreTrainedModel, probe: Probe) -> nn.ModuleList:
    attentions = [layer.attention for layer in probe.layers]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attentions):
            pairs = zip(attentions, module, strict=True)
            if all(any(part is attention for part in layer.modules()) for attention, layer in pairs):
                return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of its {len(attentions)} decoder layers")


def _measuring(
    run: _Run, pairs: Sequence[SharingEntry], errors: dict[SharingEntry, float]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """A forward hook that runs its layer once more for each pair with the owner's K and V, and writes to `errors`."""

    def measure(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
        exact = _hidden_states(output).float()
        unshared = run.sources
        for pair in pairs:
            run.sources = (*unshared[: pair.sharer], pair.owner, *unshared[pair.sharer + 1 :])
            folded = _hidden_states(layer.forward(*arguments, **keywords)).float()
            change = (folded - exact).square().sum(dim=-1) / exact.square().sum(dim=-1)
            errors[pair] = float(change.mean())
        run.sources = unshared

    return measure


def _hidden_states(output: object) -> torch.Tensor:
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, torch.Tensor):
        raise UnsupportedModelError(f"a decoder layer returns {type(states).__name__} instead of hidden states")
    return states


def _first_difference(sources: tuple[int, ...], others: tuple[int, ...]) -> int:
    pairs = enumerate(zip(sources, others, strict=True))
    return next((layer for layer, (source, other) in pairs if source != other), len(sources))


def _returning(output: Any) -> Callable[..., Any]:  # noqa: ANN401 - a tensor, or what a model's layer returns beside it
    return lambda *_arguments, **_keywords: output


def _appending(outputs: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _module, _inputs, output: outputs.append(output)


def _trace(run: _Run) -> Trace:
    return Trace(run.sources, run.keys, run.values, tuple(run.layer_outputs))
