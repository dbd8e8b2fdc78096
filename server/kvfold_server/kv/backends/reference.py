"""The reference backend: plain torch. The oracle of the other backends, and what runs where none of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from kvfold_server.kv.backends.base import AttentionBackend, AttentionCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.kv.arena import Arena
    from kvfold_server.kv.step_batch import StepBatch


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of one step that attend together: all with `queries` tokens, padded to the most slots in use.

    - `members` [B]: which sequences of the batch.
    - `tokens` [B * queries]: where their tokens lie in the packed batch; None if they are the whole batch in order.
    - `slots` [S]: 0, 1, ...; the slot of each gathered row.
    - `query_positions` [B, queries]; `behind` [queries]: how many tokens of the sequence follow each of them.
    """

    members: torch.Tensor
    queries: int
    tokens: torch.Tensor | None
    slots: torch.Tensor
    query_positions: torch.Tensor
    behind: torch.Tensor


class ReferenceBackend(AttentionBackend):
    """Gathers the rows of each sequence into one padded buffer and attends densely, softmax in fp32."""

    name: ClassVar[str] = "reference"

    def __init__(self, arena: Arena, tables: torch.Tensor, slot_positions: torch.Tensor | None = None) -> None:
        super().__init__(arena, tables, slot_positions)
        self._buffer = torch.empty(0, arena.rows.shape[1], dtype=arena.rows.dtype, device=arena.rows.device)
        self._batch: StepBatch | None = None
        self._groups: list[_Group] = []

    def begin(self, batch: StepBatch) -> None:
        """Groups the sequences: all that decode together, every longer chunk alone."""
        self.require_slot_positions(batch)
        self._batch = batch
        device = batch.positions.device
        geometry = self.arena.geometry
        lengths = torch.tensor(batch.kv_lengths)
        slot_counts = batch.slot_counts
        if slot_counts is None:
            slot_counts = lengths.expand(geometry.layer_count, -1)
        most = int(slot_counts.max())
        self._slot_counts = slot_counts.to(device)
        self._sources = batch.sources.to(device)
        # The parts of the tables that this step reads, on the device. The first token row of each block [B, L, blocks]:
        used = geometry.blocks_for(most)
        self._block_rows = self.tables[batch.rows, :, :used].long().to(device) * geometry.tokens_per_block
        # The position of each slot [B, L, S]; None if all are their own.
        self._positions: torch.Tensor | None = None
        if batch.slot_counts is not None and self.slot_positions is not None:
            evicted = (slot_counts < lengths).T[:, :, None]
            kept = self.slot_positions[batch.rows, :, :most]
            self._positions = torch.where(evicted, kept, torch.arange(most)).to(device)

        counts = [stop - start for start, stop in zip(batch.query_starts, batch.query_starts[1:], strict=False)]
        decoding = [member for member, count in enumerate(counts) if count == 1]
        groups = [decoding] if decoding else []
        groups.extend([member] for member, count in enumerate(counts) if count > 1)
        self._groups = [
            self._group(batch, members, counts[members[0]], int(slot_counts[:, members].max())) for members in groups
        ]

        # Where each token of the batch is written: its sequence, and at each layer its block and offset there [L, N].
        sequences = torch.repeat_interleave(torch.tensor(counts))
        self._token_sequences = sequences.to(device)
        slots = batch.positions[None]
        if batch.slot_counts is not None:
            slots = slots - (lengths - slot_counts)[:, sequences].to(device)
        self._token_blocks = (slots // geometry.tokens_per_block).expand(geometry.layer_count, -1)
        self._token_offsets = (slots % geometry.tokens_per_block).expand(geometry.layer_count, -1)

    def _group(self, batch: StepBatch, members: Sequence[int], queries: int, slots: int) -> _Group:
        device = batch.positions.device
        whole = len(members) == batch.sequence_count
        starts = torch.tensor([batch.query_starts[member] for member in members], device=device)
        tokens = (starts[:, None] + torch.arange(queries, device=device)).flatten()
        return _Group(
            members=torch.tensor(members, device=device),
            queries=queries,
            tokens=None if whole else tokens,
            slots=torch.arange(slots, device=device),
            query_positions=batch.positions[tokens].view(len(members), queries),
            behind=torch.arange(queries - 1, -1, -1, device=device),
        )

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Scatters the owners' token rows into their blocks."""
        batch = self._require_batch()
        count = batch.owner_tokens[layer]
        if count == 0:
            return
        blocks = self._block_rows[self._token_sequences[:count], layer, self._token_blocks[layer, :count]]
        self.arena.rows[blocks + self._token_offsets[layer, :count]] = torch.cat(
            (key[:count].flatten(1), value[:count].flatten(1)), dim=1
        )

    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        """Attends group by group."""
        self._require_batch()
        kind = self.arena.geometry.layers[call.layer]
        out = torch.empty(*query.shape[:2], kind.value_dim, dtype=query.dtype, device=query.device)
        for group in self._groups:
            key, value = self._gather(group, call.layer)
            selected = query if group.tokens is None else query[group.tokens]
            result = dense_attention(
                selected.reshape(len(group.members), group.queries, *query.shape[1:]),
                key,
                value,
                self._visible(group, call),
                call,
            ).flatten(0, 1)
            if group.tokens is None:
                out = result.contiguous()  # that of a single sequence still lies head by head
            else:
                out[group.tokens] = result
        return out

    def _visible(self, group: _Group, call: AttentionCall) -> torch.Tensor:
        """Which gathered rows each query sees: [B, queries, S]."""
        own_slots = self._slot_counts[call.layer][group.members][:, None] - 1 - group.behind
        visible = group.slots <= own_slots[:, :, None]
        if call.window is not None:
            positions = group.slots
            if self._positions is not None:
                sources = self._sources[call.layer][group.members]
                positions = self._positions[group.members, sources, : len(group.slots)][:, None, :]
            visible &= positions > group.query_positions[:, :, None] - call.window
        return visible

    def _gather(self, group: _Group, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, S, kv_heads, dim] of a group, from the tables of each sequence's source layer; zeros where none
        is."""
        geometry = self.arena.geometry
        kind = geometry.layers[layer]
        size, length = len(group.members), len(group.slots)
        blocks = self._block_rows[group.members, self._sources[layer][group.members], : geometry.blocks_for(length)]
        offsets = torch.arange(geometry.tokens_per_block, device=blocks.device)
        in_use = group.slots < self._slot_counts[layer][group.members][:, None]
        rows = (blocks[:, :, None] + offsets).flatten(1)[:, :length] * in_use
        if self._buffer.shape[0] < size * length:
            # Reused by every layer and step: a fresh buffer of this size would be page-faulted in anew each time.
            self._buffer = torch.empty(
                2 * size * length, self._buffer.shape[1], dtype=self._buffer.dtype, device=self._buffer.device
            )
        gathered = self._buffer[: size * length]
        torch.index_select(self.arena.rows, 0, rows.flatten(), out=gathered)
        gathered = gathered.view(size, length, -1)
        return (
            gathered[..., : self.arena.key_values].view(size, length, kind.kv_heads, kind.key_dim),
            gathered[..., self.arena.key_values :].view(size, length, kind.kv_heads, kind.value_dim),
        )

    def _require_batch(self) -> StepBatch:
        if self._batch is None:
            raise RuntimeError("begin() must come before the layers of a step")
        return self._batch


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """Softmax attention over padded keys.

    query [B, T, heads, key_dim], key [B, S, kv_heads, key_dim], value [B, S, kv_heads, value_dim], visible [B, T, S]
    -> [B, T, heads, value_dim]. Each query must see at least one key. Softmax runs in fp32.
    """
    size, queries, heads, _ = query.shape
    kv_heads = key.shape[2]
    # The query heads of one KV head are more rows of one product: [B, kv_heads, group * T, dim].
    grouped = query.reshape(size, queries, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.matmul(grouped, key.permute(0, 2, 3, 1)).float() * call.scaling
    scores = scores.view(size, kv_heads, heads // kv_heads, queries, -1)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if call.sinks is not None:
        sink = call.sinks.float().view(1, kv_heads, heads // kv_heads, 1, 1).expand(size, -1, -1, queries, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    mixed = torch.matmul(weights.to(value.dtype).flatten(2, 3), value.transpose(1, 2))
    return mixed.view(size, kv_heads, heads // kv_heads, queries, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)
