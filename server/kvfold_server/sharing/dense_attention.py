"""Attention over whole sequences with K and V given: plain torch, for the search; the engine has its own backends."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of query [samples, heads, tokens, dim] over key and value [samples, kv_heads, tokens, dim].

    A token sees itself and the `window - 1` tokens before it. `softcap` bounds the scores (gemma 2), `s_aux` [heads]
    are sink logits (gpt-oss). Returns [samples, tokens, heads, value dim].
    """
    tokens = query.shape[2]
    windowed = window is not None and window < tokens
    if softcap is None and s_aux is None:
        mask = _visible(tokens, window, query.device) if windowed else None
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_visible(tokens, window, query.device), float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, tokens, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., :tokens].to(value.dtype)
    return (weights @ value).transpose(1, 2)


def _visible(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[tokens, tokens], True where the row's token sees the column's."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
