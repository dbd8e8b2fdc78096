"""Which slots the tokens of a step are written to, and which they see; worked out on the host, once a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.kv.step_batch import StepBatch
    from kvfold_server.kv.triton.upload import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class LayerSlots:
    """Slots of the N tokens at one layer, in the table that each of them reads. Compared by identity.

    - `own` [N]: where the token itself lies; it sees nothing behind.
    - `first` [N]: the first slot inside its window. None if the layer has none.
    """

    own: IntArray
    first: IntArray | None


def layer_slots(batch: StepBatch, windows: Sequence[int | None], slot_positions: IntArray | None) -> list[LayerSlots]:
    """For each layer; layers that agree get the same object. `windows` [L]; `slot_positions`: see AttentionBackend."""
    starts, lengths = np.array(batch.query_starts), np.array(batch.kv_lengths)
    sequences = np.repeat(np.arange(batch.sequence_count), np.diff(starts))
    behind = starts[sequences + 1] - 1 - np.arange(batch.token_count)
    positions = lengths[sequences] - 1 - behind
    found: dict[tuple[bytes, bytes | None], LayerSlots] = {}
    layers = []
    for layer, window in enumerate(windows):
        own = positions
        first = None if window is None else np.maximum(0, positions - window + 1)
        if batch.slot_counts is not None:
            counts = batch.slot_counts[layer].numpy()
            own = counts[sequences] - 1 - behind
            lost = (counts < lengths)[sequences]  # tokens of tables from which some were evicted
            if window is not None and first is not None and slot_positions is not None and lost.any():
                tables = (batch.rows.numpy()[sequences[lost]], batch.sources[layer].numpy()[sequences[lost]])
                first[lost] = _first_above(slot_positions, tables, own[lost], positions[lost] - window)
        key = (own.tobytes(), None if first is None else first.tobytes())
        layers.append(found.setdefault(key, LayerSlots(own, first)))
    return layers


def _first_above(
    slot_positions: IntArray, tables: tuple[IntArray, IntArray], last: IntArray, bounds: IntArray
) -> IntArray:
    """The first slot of each table whose position is above its bound; the one in slot `last` is."""
    low, high = np.zeros_like(last), last
    while (low < high).any():
        middle = (low + high) // 2
        is_above = slot_positions[(*tables, middle)] > bounds
        low, high = np.where(is_above, low, middle + 1), np.where(is_above, middle, high)
    return low
