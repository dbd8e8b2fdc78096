"""What cannot be served is refused when it is loaded, with the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from support.tiny_models import ARCHITECTURES, LAYERS, _config, tiny_model

from kvfold_server.models.errors import ModelSourceError, UnsupportedModelError
from kvfold_server.models.loading import load_model
from kvfold_server.models.patching import patch_model
from kvfold_server.models.support import check_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

BY_CONFIGURATION = {
    "an encoder-decoder": (transformers.BartConfig, {}, "encoder-decoder"),
    "MLA": (transformers.DeepseekV2Config, {}, "latent attention"),
    "MLA with an indexer": (transformers.DeepseekV3Config, {}, "latent attention"),
    "natively shared KV": (transformers.Gemma3nTextConfig, {}, "share KV by design"),
    "a state-space hybrid": (transformers.JambaConfig, {}, "linear_attention"),
    "a linear hybrid": (transformers.Qwen3NextConfig, {}, "linear_attention"),
    "chunked attention": (transformers.Llama4TextConfig, {}, "chunked_attention"),
    "a mask of its own": (transformers.DogeConfig, {}, "mask"),
    "pictures": (transformers.Gemma3Config, {}, "other inputs than text"),
    "no head": (transformers.CLIPTextConfig, {}, "no language-model head"),
    "no context length": (transformers.BloomConfig, {}, "context length"),
    "quantised weights": (transformers.LlamaConfig, {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    "dynamic RoPE": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
    "longrope": (
        transformers.Phi3Config,
        {
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            },
        },
        "longrope",
    ),
}


@pytest.mark.parametrize(("kind", "options", "reason"), BY_CONFIGURATION.values(), ids=BY_CONFIGURATION.keys())
def test_a_configuration_is_refused(kind: type[PreTrainedConfig], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(kind(**options))


BY_PROBE = {
    "falcon": (_config("FalconConfig"), "attention registry"),
    "gptj": (_config("GPTJConfig", n_embd=64, rotary_dim=8), "attention registry"),
    "two calls a layer": (_config("DiffLlamaConfig"), "several times in one layer"),
    "an encoder": (_config("BertConfig", pad_token_id=0), "not causal"),
    "layers of other dims": (
        _config(
            "MiMoV2FlashConfig",
            head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            sliding_window=12,
        ),
        "differ in KV heads or head dimensions",
    ),
}


@pytest.mark.parametrize(("config", "reason"), BY_PROBE.values(), ids=BY_PROBE.keys())
def test_a_model_is_refused_by_the_probe(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        patch_model(tiny_model(config()))


def test_attention_arguments_that_no_backend_computes_are_refused() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    attention = model.model.layers[3].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, options: (args, options | {"position_bias": torch.zeros(1)}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        patch_model(model)


def test_a_layer_that_looks_at_the_place_in_the_batch_fails_the_self_check() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    model.model.layers[2].register_forward_hook(
        lambda module, args, output: output * (1 + torch.arange(output.shape[1])[:, None] / 50)
    )
    with pytest.raises(UnsupportedModelError, match="differs from the model's own forward"):
        patch_model(model)


def test_state_that_leaks_from_token_to_token_fails_the_self_check() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    model.model.layers[4].mlp.register_forward_hook(lambda module, args, output: output.cumsum(1))
    with pytest.raises(UnsupportedModelError, match="differs from the model's own forward"):
        patch_model(model)


def test_a_layer_that_uses_its_own_values_beside_attention_fails_the_self_check() -> None:
    model = tiny_model(ARCHITECTURES["llama"]())
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_forward_hook(
            lambda module, args, options, output: (
                output[0] + module.v_proj(options["hidden_states"]).repeat(1, 1, 2),
                output[1],
            ),
            with_kwargs=True,
        )
    with pytest.raises(UnsupportedModelError, match="own K and V elsewhere"):
        patch_model(model)


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_remote_code_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="shiny", auto_map={"AutoConfig": "shiny.ShinyConfig"})
    (folder / "shiny.py").write_text("raise SystemExit('this ran')", "utf-8")
    with pytest.raises(UnsupportedModelError, match="runs no remote code"):
        load_model(folder, torch.float32, torch.device("cpu"))


def test_an_unknown_type_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'shiny'"):
        load_model(write_config(tmp_path, model_type="shiny"), torch.float32, torch.device("cpu"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama"]()
    model = tiny_model(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match="cannot be read"):
        load_model(tmp_path, torch.float32, torch.device("cpu"))


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"no readable config\.json"):
        load_model(tmp_path, torch.float32, torch.device("cpu"))


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    model = tiny_model(ARCHITECTURES["qwen3"]())
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert patch_model(loaded).geometry.layer_count == LAYERS
    tokens = torch.arange(5)[None]
    loaded = load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
