"""Tiny random models of many architectures, built from their configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvfold_scheduler.sharing import SharingEntry, SharingPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfold_scheduler.geometry import CacheGeometry, LayerKind

LAYERS = 6
VOCABULARY = 199
WINDOW = 12
"""Less than a layer-block of these models holds, so that prompts of a few blocks leave it."""

ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def _config(name: str, **options: Any) -> Callable[[], PreTrainedConfig]:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,  # tied, random models repeat their last token
    }
    settings |= options
    return lambda: getattr(transformers, name)(**settings)


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("LlamaConfig"),
    "llama with biases": _config("LlamaConfig", attention_bias=True, num_key_value_heads=1),
    "llama with yarn": _config(
        "LlamaConfig",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": _config("MistralConfig", sliding_window=None),
    "mistral with a window": _config("MistralConfig", sliding_window=WINDOW),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    "qwen2": _config("Qwen2Config"),
    "qwen2 with windows": _config(
        "Qwen2Config", use_sliding_window=True, sliding_window=WINDOW, layer_types=ALTERNATING
    ),
    "qwen3": _config("Qwen3Config", head_dim=32),
    "qwen3_moe": _config("Qwen3MoeConfig", head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "gemma": _config("GemmaConfig", head_dim=32, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2": _config(
        "Gemma2Config",
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3_text": _config("Gemma3TextConfig", head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING),
    "phi3": _config("Phi3Config"),
    "phi3 with a window": _config("Phi3Config", sliding_window=WINDOW),
    "phi": _config("PhiConfig"),
    "gpt_neox": _config("GPTNeoXConfig"),
    "phimoe with a window": _config("PhimoeConfig", num_local_experts=4, sliding_window=WINDOW),
    "olmo2": _config("Olmo2Config"),
    "olmo3": _config("Olmo3Config", sliding_window=WINDOW, layer_types=ALTERNATING),
    "granite": _config(
        "GraniteConfig", attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=2.0
    ),
    "starcoder2": _config("Starcoder2Config", sliding_window=WINDOW),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 1, 0, 1, 1, 0]),
    "cohere2": _config("Cohere2Config", sliding_window=WINDOW, layer_types=ALTERNATING),
    "glm4": _config("Glm4Config", head_dim=16),
    "stablelm": _config("StableLmConfig"),
    "seed_oss": _config("SeedOssConfig", head_dim=16),
    "ernie4_5": _config("Ernie4_5Config", head_dim=16),
    "gpt_oss": _config(
        "GptOssConfig",
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=ALTERNATING,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt2": _config("GPT2Config", n_inner=96),
    "gpt_bigcode": _config("GPTBigCodeConfig", n_inner=96),
    "opt": _config("OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
}
"""Configurations by a name for test reports."""


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in evaluation mode, eager attention, whose logits depend strongly on all that attention
    sees."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data += 0.2 * noise  # norms, biases, sinks
        else:
            parameter.data = 1.5 * noise / parameter.shape[-1] ** 0.5
    model.tie_weights()
    model.requires_grad_(False)
    model.train(mode=False)
    return model


def tiny_plan(geometry: CacheGeometry) -> SharingPlan:
    """Shares the upper half of each kind's layers, kinds in turn; each sharer reads one of the lower half."""
    by_kind: dict[LayerKind, list[int]] = {}
    for layer, kind in enumerate(geometry.layers):
        by_kind.setdefault(kind, []).append(layer)
    pairs: list[list[SharingEntry]] = []
    for layers in by_kind.values():
        owners, sharers = layers[: -(-len(layers) // 2)], layers[-(-len(layers) // 2) :]
        pairs.append([SharingEntry(sharer, owners[(2 * n) % len(owners)]) for n, sharer in enumerate(sharers)])
    entries = [kind[n] for n in range(geometry.layer_count) for kind in pairs if n < len(kind)]
    return SharingPlan(geometry.layer_count, tuple(entries))


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()
