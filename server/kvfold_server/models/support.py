"""What a model's configuration already says about whether kvfold can serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvfold_server.models.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
"""RoPE whose angles depend on a token's position alone, not on how long the sequences of its batch are."""

REASONS_BY_MODEL_TYPE = {
    "doge": "it makes its own attention mask",
    "llama4_text": "it scales queries by their place in the batch instead of their position",
}
"""Models whose forward passes would run, and be wrong in ways that two short prompts do not show."""


def check_config_file(config: dict[str, Any]) -> None:
    """Refuses a model by its config.json alone. Raises UnsupportedModelError, which says why."""
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"the model ({model_type}) needs Python code from its own repository, and kvfold runs no remote code"
        )
    raise UnsupportedModelError(f"this version of transformers knows no model of the type {model_type!r}")


def check_config(config: PreTrainedConfig) -> None:
    """Refuses a model by its configuration. Raises UnsupportedModelError, which says why."""
    reason = _reason(config)
    if reason is not None:
        raise UnsupportedModelError(f"{config.model_type} is not supported: {reason}")


def _reason(config: PreTrainedConfig) -> str | None:
    layer_types = set(getattr(config, "layer_types", None) or ())
    checks: tuple[tuple[bool, str], ...] = (
        (bool(config.is_encoder_decoder), "it is an encoder-decoder; kvfold serves decoders"),
        (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING, "it has no language-model head in transformers"),
        (config.get_text_config(decoder=True) is not config, "it has parts for other inputs than text"),
        (
            getattr(config, "kv_lora_rank", None) is not None,
            "multi-head latent attention (MLA) has no K and V per head to share or store in pages",
        ),
        (
            bool(getattr(config, "num_kv_shared_layers", 0)),
            "its layers share KV by design, which a sharing plan would contradict",
        ),
        (
            not layer_types <= SERVED_LAYER_TYPES,
            f"it has layers of other kinds than full and sliding attention "
            f"({', '.join(sorted(layer_types - SERVED_LAYER_TYPES))})",
        ),
        (getattr(config, "quantization_config", None) is not None, "its weights are quantised"),
        (_context_length(config) is None, "its configuration has no context length"),
    )
    for failed, reason in checks:
        if failed:
            return reason
    for rope_type in sorted(_rope_types(config) - STATIC_ROPE_TYPES):
        return (
            f"its RoPE ({rope_type}) depends on the longest sequence of a batch, so batch mates would change each other"
        )
    return REASONS_BY_MODEL_TYPE.get(config.model_type)


def _context_length(config: PreTrainedConfig) -> int | None:
    try:
        length: int | None = getattr(config, "max_position_embeddings", None)
    except NotImplementedError:  # what a model without a limit says
        return None
    return length


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in nested if entry.get("rope_type") is not None}
