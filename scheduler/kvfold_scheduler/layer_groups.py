"""Owner layers grouped by window: those of a group hold equally many blocks at any time and are counted together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.sharing import SharingPlan


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Owner layers that see the same `window` of tokens (None: all of them)."""

    window: int | None
    layers: tuple[int, ...]

    def first_visible(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


def layer_groups(geometry: CacheGeometry, plan: SharingPlan, depth: int) -> tuple[LayerGroup, ...]:
    """The groups of the owner layers at `depth`."""
    groups: dict[int | None, list[int]] = {}
    for layer in plan.owners(depth):
        groups.setdefault(geometry.layers[layer].window, []).append(layer)
    return tuple(LayerGroup(window, tuple(layers)) for window, layers in groups.items())


def blocks_at_most(geometry: CacheGeometry, groups: Iterable[LayerGroup], tokens: int, chunk_tokens: int) -> int:
    """The most blocks that a sequence holds at any time up to `tokens` tokens, computed `chunk_tokens` at a time.

    While a chunk is computed, a sliding layer holds the chunk and the `window - 1` tokens before it, which begin
    anywhere in a block:

        window - 1 = 5, chunk = 4, blocks of 4      |. . . w|w w w w|c c c c|     9 tokens in 3 blocks
    """
    total = 0
    for group in groups:
        blocks = geometry.blocks_for(tokens)
        if group.window is not None:
            blocks = min(blocks, geometry.blocks_for(group.window - 1 + chunk_tokens - 1) + 1)
        total += blocks * len(group.layers)
    return total
