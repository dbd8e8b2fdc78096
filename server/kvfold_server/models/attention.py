"""The attention function that transformers calls in each layer of a patched model.

No mask function is registered beside it: transformers then builds no mask, and windows and causality are the backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface

from kvfold_server.kv.backends.base import AttentionCall

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kvfold_server.models.step_context import StepContext

ATTENTION_NAME = "kvfold"
"""The name under which transformers knows the function."""

BINDING = "kvfold_binding"
"""The attribute of an attention module that holds its LayerBinding."""

HARMLESS_ARGUMENTS = frozenset(
    {
        "dropout",  # not in evaluation
        "is_causal",  # the probe has seen the mask
        "position_ids",  # the batch holds them
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    }
)
"""Keyword arguments that change nothing that a backend computes. Any other, unless None, means something that it
lacks."""


@dataclass(frozen=True, slots=True)
class LayerBinding:
    """Which layer an attention module is, the window that the probe saw in its mask, and the model's step."""

    layer: int
    window: int | None
    context: StepContext


def unknown_arguments(arguments: dict[str, Any]) -> list[str]:
    """Names of the keyword arguments that mean something the backends do not compute."""
    return sorted(name for name, value in arguments.items() if value is not None and name not in HARMLESS_ARGUMENTS)


def folded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the signature is that of transformers
    *,
    scaling: float,
    sliding_window: int | None = None,  # noqa: ARG001 - the probe has checked it against the mask
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **arguments: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    """Writes the owners' new K and V and attends over the block tables of the step in progress.

    query [1, heads, N, key_dim], key [1, kv_heads, N, key_dim], value [1, kv_heads, N, value_dim]
    -> [1, N, heads, value_dim].
    Raises TypeError for an argument whose meaning no backend knows.
    """
    if unknown := unknown_arguments(arguments):
        raise TypeError(f"the attention of the model uses {', '.join(unknown)}, which no backend computes")
    binding: LayerBinding = getattr(module, BINDING)
    step = binding.context.active
    if step.batch.owner_tokens[binding.layer] > 0:
        step.backend.write(binding.layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    call = AttentionCall(binding.layer, scaling, binding.window, softcap, s_aux)
    return step.backend.attend(call, query[0].transpose(0, 1)).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, folded_attention)
