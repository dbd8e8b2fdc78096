"""The shape of a model's KV cache, and the page size that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

OS_PAGE_BYTES = 4096
"""Layer-blocks are multiples of the operating system's page, so that free ones can be given back to it."""

MIN_TOKENS_PER_BLOCK = 16
"""Fewer tokens a block make the tables longer than they need to be; more waste bytes in each sequence's last block."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What layers must have in common to share KV.

    `window` is the width of a sliding window in tokens (a token at position p sees p-window+1..p), None for full
    attention. `rope` names the position encoding of the layer's keys; layers with different bases or none have
    different names.
    """

    window: int | None
    rope: str
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token(self) -> int:
        """Numbers that one token takes at one layer, K and V together."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class CacheGeometry:
    """The layers of a model from the embedding upward, and the bytes of one value of the model's own data type.

    All layers take the same number of bytes a token, so that one arena of constant-byte layer-blocks serves them all.
    Raises ValueError otherwise, and for a window narrower than one token.
    """

    layers: tuple[LayerKind, ...]
    value_bytes: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        if len({(kind.kv_heads, kind.key_dim, kind.value_dim) for kind in self.layers}) > 1:
            raise ValueError("the layers differ in KV heads or head dimensions; one arena serves one geometry")
        if any(kind.window is not None and kind.window < 1 for kind in self.layers):
            raise ValueError("a sliding window is at least one token wide: a token sees itself")

    @property
    def layer_count(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V at one layer, in the model's own data type."""
        return self.layers[0].values_per_token * self.value_bytes

    @cached_property
    def tokens_per_block(self) -> int:
        """Tokens of the model's own data type in a layer-block: the fewest, from 16 up, that fill whole OS pages."""
        aligned = math.lcm(self.token_bytes, OS_PAGE_BYTES) // self.token_bytes
        return math.lcm(aligned, MIN_TOKENS_PER_BLOCK)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a layer-block."""
        return self.tokens_per_block * self.token_bytes

    @property
    def bytes_per_token(self) -> int:
        """KV bytes that one token takes at depth 0, over all layers."""
        return self.token_bytes * self.layer_count

    def blocks_for(self, tokens: int) -> int:
        """Layer-blocks of one layer that hold `tokens` tokens."""
        return -(-tokens // self.tokens_per_block)
