from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold_scheduler.geometry import MIN_TOKENS_PER_BLOCK, OS_PAGE_BYTES, CacheGeometry, LayerKind

if TYPE_CHECKING:
    from collections.abc import Callable


@given(
    kv_heads=st.integers(1, 64),
    key_dim=st.sampled_from((32, 48, 64, 80, 96, 128, 256)),
    value_dim=st.sampled_from((32, 64, 80, 128)),
    value_bytes=st.sampled_from((1, 2, 4)),
)
def test_a_block_is_whole_os_pages_and_whole_tokens(
    kv_heads: int, key_dim: int, value_dim: int, value_bytes: int
) -> None:
    geometry = CacheGeometry((LayerKind(None, "default", kv_heads, key_dim, value_dim),), value_bytes)
    assert geometry.block_bytes % OS_PAGE_BYTES == 0
    assert geometry.tokens_per_block >= MIN_TOKENS_PER_BLOCK
    assert geometry.block_bytes == geometry.tokens_per_block * kv_heads * (key_dim + value_dim) * value_bytes


def test_a_token_costs_its_keys_and_values_in_every_layer() -> None:
    geometry = CacheGeometry((LayerKind(None, "default", kv_heads=3, key_dim=64, value_dim=64),) * 30, value_bytes=2)
    assert geometry.token_bytes == 768
    assert geometry.bytes_per_token == 23_040
    assert geometry.tokens_per_block == 16


def test_a_started_block_is_a_whole_block(geometry_of: Callable[..., CacheGeometry]) -> None:
    assert [geometry_of(None).blocks_for(tokens) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_layers_of_different_shapes_are_refused() -> None:
    kinds = (LayerKind(None, "default", 2, 64, 64), LayerKind(None, "default", 1, 64, 64))
    with pytest.raises(ValueError, match="one geometry"):
        CacheGeometry(kinds, 2)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        CacheGeometry((), 2)


def test_a_window_without_a_token_is_refused(geometry_of: Callable[..., CacheGeometry]) -> None:
    with pytest.raises(ValueError, match="window"):
        geometry_of(None, 0)
