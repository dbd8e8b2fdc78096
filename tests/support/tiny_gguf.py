"""Writes a tiny llama model as a GGUF file, the way llama.cpp lays it out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(model: PreTrainedModel, file: Path) -> Path:
    """Writes a Llama model, fp32, with a tokenizer of single bytes (its vocabulary must be smaller than 256)."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[: config.vocab_size - 3]
    symbols.append(symbols[0] + symbols[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", *symbols])
    writer.add_token_types([3, 3] + [1] * len(symbols))
    writer.add_token_merges([f"{symbols[0]} {symbols[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_name(name), _layout(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, *inner = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(inner[:-1])]}.{inner[-1]}"


def _layout(name: str, tensor: torch.Tensor, config: object) -> torch.Tensor:
    """llama.cpp rotates neighbouring dimensions where transformers rotates halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name:
            return tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor
