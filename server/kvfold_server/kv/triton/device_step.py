"""A step as the kernels see it: what they are told beside queries, K and V, on the device.

One buffer goes there when the step begins:

    | tables of sequence 0: layer 0 | layer 1 | ... | tables of sequence 1: ... | bases | token sequences | slots |
                            ^ bases[0, 0]

Of the tables it holds the entries in use of the step's sequences, four bytes a block: a small part of the pool, however
many sequences there are. The lists of work follow in a second buffer when the first layer attends, since they depend on
the number of query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfold_server.kv.triton.layer_slots import layer_slots
from kvfold_server.kv.triton.upload import Upload
from kvfold_server.kv.triton.work import cut_tiles, make_work

if TYPE_CHECKING:
    import torch

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.kv.step_batch import StepBatch
    from kvfold_server.kv.triton.launch_shape import LaunchShape
    from kvfold_server.kv.triton.upload import IntArray


@dataclass(frozen=True, slots=True)
class DeviceSlots:
    """LayerSlots on the device."""

    own: torch.Tensor
    first: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the attention kernel: a WorkList on the device, and how many rows its lists have."""

    shape: LaunchShape
    items: torch.Tensor
    tiles: torch.Tensor
    item_count: int
    tile_count: int

    @property
    def is_split(self) -> bool:
        """Whether any tile has several items, so that their results must be merged."""
        return self.item_count > self.tile_count


class DeviceStep:
    """Where the tokens of a batch are written, and what they attend to. All tensors are int32.

    - `buffer`: the block tables begin in it at `bases` [L, B].
    - `token_sequences` [N]: the sequence of each token.
    - `slots` (L): where the tokens lie, and what they see.
    """

    def __init__(
        self,
        batch: StepBatch,
        geometry: CacheGeometry,
        tables: IntArray,
        slot_positions: IntArray | None,
        device: torch.device,
    ) -> None:
        self.batch = batch
        self._starts = np.array(batch.query_starts)
        self._layers = layer_slots(batch, [kind.window for kind in geometry.layers], slot_positions)
        self._launches: dict[tuple[LaunchShape, LaunchShape], list[list[Launch]]] = {}

        upload = Upload()
        slots_in_use = np.array(batch.kv_lengths) if batch.slot_counts is None else batch.slot_counts.numpy().max(0)
        widths = -(-slots_in_use // geometry.tokens_per_block)
        starts = [
            upload.add(tables[row, :, :width]).start
            for row, width in zip(batch.rows.tolist(), widths.tolist(), strict=True)
        ]
        bases = upload.add(np.array(starts) + batch.sources.numpy() * widths)
        sequences = upload.add(np.repeat(np.arange(batch.sequence_count), np.diff(self._starts)))
        parts = {
            slots: (upload.add(slots.own), None if slots.first is None else upload.add(slots.first))
            for slots in dict.fromkeys(self._layers)
        }
        self.buffer = upload.send(device)
        self.bases = self.buffer[bases]
        self.token_sequences = self.buffer[sequences]
        on_device = {
            slots: DeviceSlots(self.buffer[own], None if first is None else self.buffer[first])
            for slots, (own, first) in parts.items()
        }
        self.slots = [on_device[slots] for slots in self._layers]

    def launches(self, layer: int, decode: LaunchShape, prefill: LaunchShape) -> list[Launch]:
        """What attends at a layer: sequences with one query in the first shape, the others in the second."""
        shapes = (decode, prefill)
        if shapes not in self._launches:
            self._launches[shapes] = self._plan(shapes)
        return self._launches[shapes][layer]

    def _plan(self, shapes: tuple[LaunchShape, LaunchShape]) -> list[list[Launch]]:
        decodes = np.diff(self._starts) == 1
        members = [np.nonzero(decodes)[0], np.nonzero(~decodes)[0]]
        tiles = [cut_tiles(self._starts, those, shape.tokens) for those, shape in zip(members, shapes, strict=True)]
        upload = Upload()
        planned = {
            slots: [
                (shape, upload.add(work.items), upload.add(work.tiles), work)
                for shape, those in zip(shapes, tiles, strict=True)
                if len(those) > 0
                for work in [make_work(those, slots, shape.split)]
            ]
            for slots in dict.fromkeys(self._layers)
        }
        buffer = upload.send(self.buffer.device)
        launches = {
            slots: [
                Launch(shape, buffer[items], buffer[merges], len(work.items), len(work.tiles))
                for shape, items, merges, work in parts
            ]
            for slots, parts in planned.items()
        }
        return [launches[slots] for slots in self._layers]
