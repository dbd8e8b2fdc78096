"""Every attention backend against dense attention over plain tensors that the test keeps itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import torch

from kvfold_scheduler.block_tables import Row
from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.scheduler import Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import SequenceId, SequenceRequest
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_scheduler.step_plan import Chunk, StepPlan, StepResult
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionBackend, AttentionCall
from kvfold_server.kv.backends.registry import BACKENDS
from kvfold_server.kv.native.library import NativeUnavailableError
from kvfold_server.kv.step_batch import StepBatch, make_step_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADS = 6
LAYERS = 3
PLAN = SharingPlan(LAYERS, (SharingEntry(2, 0), SharingEntry(1, 0)))


@dataclass
class Case:
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 40, 70, 1)
    depths: tuple[int, ...] = (0, 1, 2, 0)
    step_tokens: int = 37
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))


CASES = {
    "plain": Case(),
    "one chunk": Case(step_tokens=512),
    "window": Case(window=9),
    "softcap": Case(softcap=5.0),
    "sinks": Case(sinks=True),
    "window, softcap, sinks": Case(window=20, softcap=3.0, sinks=True),
    "one KV head": Case(kv_heads=1),
    "every head its own KV": Case(kv_heads=6),
    "wide values": Case(key_dim=16, value_dim=32),
    "odd dims": Case(key_dim=20, value_dim=12),
    "dim 64": Case(key_dim=64, value_dim=64, kv_heads=3),
    "bf16": Case(dtype=torch.bfloat16, key_dim=64, value_dim=64, kv_heads=3),
    "fp16": Case(dtype=torch.float16, key_dim=32, value_dim=32),
}


@dataclass
class Tokens:
    """The tokens of one sequence that a layer keeps: positions [S], key [S, KV, key_dim], value [S, KV, value_dim]."""

    positions: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __add__(self, more: Tokens) -> Tokens:
        return Tokens(
            torch.cat((self.positions, more.positions)),
            torch.cat((self.key, more.key)),
            torch.cat((self.value, more.value)),
        )

    def __getitem__(self, chosen: torch.Tensor) -> Tokens:
        return Tokens(self.positions[chosen], self.key[chosen], self.value[chosen])


def naive(query: torch.Tensor, kept: Tokens, start: int, call: AttentionCall) -> torch.Tensor:
    """One query and one head at a time. query [T, H, D] at positions start.. -> [T, H, value_dim]."""
    out = torch.empty(query.shape[0], query.shape[1], kept.value.shape[2])
    for token in range(query.shape[0]):
        position = start + token
        visible = kept.positions <= position
        if call.window is not None:
            visible &= kept.positions > position - call.window
        key, value = kept.key[visible].double(), kept.value[visible].double()
        for head in range(query.shape[1]):
            kv_head = head * key.shape[1] // query.shape[1]
            scores = (key[:, kv_head] @ query[token, head].double()) * call.scaling
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            if call.sinks is not None:
                scores = torch.cat((scores, call.sinks[head].double()[None]))
            weights = scores.softmax(0)[: len(key)]
            out[token, head] = (weights @ value[:, kv_head]).float()
    return out


def make_geometry(case: Case) -> CacheGeometry:
    kind = LayerKind(case.window, "default", case.kv_heads, case.key_dim, case.value_dim)
    return CacheGeometry((kind,) * LAYERS, case.dtype.itemsize)


def make_backend(
    name: str, arena: Arena, tables: torch.Tensor, slot_positions: torch.Tensor | None = None
) -> AttentionBackend:
    try:
        return BACKENDS[name](arena, tables, slot_positions)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def check_step(
    backend: AttentionBackend, case: Case, plan: StepPlan, batch: StepBatch, kept: dict[tuple[int, int], Tokens]
) -> None:
    """Computes a step on random numbers, adds its tokens to `kept` [sequence, owner layer], and compares with that."""

    def random(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(plan.token_count, heads, dim, generator=case.generator).to(case.dtype)

    device = backend.arena.rows.device
    sinks = torch.linspace(-1, 2, HEADS) if case.sinks else None
    chunks = list(zip(plan.chunks, batch.query_starts, strict=False))
    backend.begin(batch)
    for layer in range(LAYERS):
        call = AttentionCall(
            layer, case.key_dim**-0.5, case.window, case.softcap, None if sinks is None else sinks.to(device)
        )
        query = random(HEADS, case.key_dim)
        key, value = random(case.kv_heads, case.key_dim), random(case.kv_heads, case.value_dim)
        for chunk, start in chunks:
            rows = slice(start, start + chunk.count)
            if PLAN.sources(chunk.depth)[layer] == layer:
                new = Tokens(batch.positions[rows].cpu(), key[rows].float(), value[rows].float())
                old = kept.get((chunk.sequence_id, layer))
                kept[chunk.sequence_id, layer] = new if old is None else old + new
            else:
                # Rows of sharers are never written; what stands there must not matter.
                key[rows] = float("nan")
                value[rows] = float("nan")
        backend.write(layer, key.to(device), value.to(device))
        result = backend.attend(call, query.to(device))
        assert result.is_contiguous()
        assert result.dtype == case.dtype
        for chunk, start in chunks:
            rows = slice(start, start + chunk.count)
            dense = kept[chunk.sequence_id, PLAN.sources(chunk.depth)[layer]]
            expected = naive(query[rows].float(), dense, chunk.start, replace(call, sinks=sinks))
            tolerance = 2e-6 if case.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(result[rows].float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_blocks_equals_dense_attention(name: str, case: Case, device: torch.device) -> None:
    geometry = make_geometry(case)
    limits = SchedulerLimits(max_running=8, max_waiting=8, step_tokens=case.step_tokens)
    scheduler = Scheduler(geometry, PLAN, block_count=200, context_length=256, limits=limits)
    arena = Arena(geometry, 200, case.dtype, device)
    arena.fill(float("nan"))
    tables = torch.frombuffer(scheduler.tables.entries, dtype=torch.int32).view(
        limits.max_running, LAYERS, scheduler.tables.blocks_per_layer
    )
    backend = make_backend(name, arena, tables)
    # Triton's interpreter takes longer for a program than a GPU for a model.
    answer = 4 if name == "triton" and device.type == "cpu" else 20
    for index, (length, depth) in enumerate(zip(case.lengths, case.depths, strict=True)):
        scheduler.add(SequenceRequest(SequenceId(index), length, answer, depth))
    kept: dict[tuple[int, int], Tokens] = {}
    while scheduler.has_work:
        plan = scheduler.step()
        check_step(backend, case, plan, make_step_batch(plan, PLAN, device), kept)
        scheduler.commit(plan, StepResult(frozenset()))
        scheduler.check_integrity()
    assert scheduler.pool.held_count == 0


class EvictingCache:
    """Block tables of some sequences, one row each, from which tokens are evicted; what is not in use is NaN."""

    def __init__(
        self, geometry: CacheGeometry, dtype: torch.dtype, depths: Sequence[int], length: int, device: torch.device
    ) -> None:
        size, blocks = len(depths), geometry.blocks_for(length)
        self.depths = depths
        self.lengths = [0] * size
        self.kept: dict[tuple[int, int], Tokens] = {}
        self.arena = Arena(geometry, size * LAYERS * blocks, dtype, device)
        self.arena.fill(float("nan"))
        order = torch.randperm(self.arena.block_count, generator=torch.Generator().manual_seed(5))
        self.tables = (1 + order).int().view(size, LAYERS, blocks)
        # No position: those of tables from which nothing was evicted are not looked at.
        self.slot_positions = torch.full((size, LAYERS, length), 1 << 30, dtype=torch.int32)

    def evict(self, sequence: int, layer: int, chosen: torch.Tensor) -> None:
        """Keeps the `chosen` slots (ascending), moved to the front."""
        per_block = self.arena.geometry.tokens_per_block
        slots = torch.arange(len(self.kept[sequence, layer].positions))
        rows = self.tables[sequence, layer].long()[slots // per_block] * per_block + slots % per_block
        moved = self.arena.rows[rows[chosen]]
        self.arena.rows[rows] = float("nan")
        self.arena.rows[rows[: len(chosen)]] = moved
        self.kept[sequence, layer] = self.kept[sequence, layer][chosen]

    def next_step(self, counts: dict[int, int]) -> tuple[StepPlan, StepBatch]:
        """`counts` tokens more of each sequence, by depth."""
        members = sorted(counts, key=lambda sequence: self.depths[sequence])
        plan = StepPlan(
            tuple(
                Chunk(SequenceId(member), Row(member), self.depths[member], self.lengths[member], counts[member], False)
                for member in members
            )
        )
        batch = make_step_batch(plan, PLAN, self.arena.rows.device)
        slot_counts = torch.zeros(LAYERS, len(members), dtype=torch.int64)
        for index, member in enumerate(members):
            start, stop = self.lengths[member], self.lengths[member] + counts[member]
            self.lengths[member] = stop
            for layer, source in enumerate(PLAN.sources(self.depths[member])):
                old = self.kept[member, source].positions if start else torch.arange(0)
                slot_counts[layer, index] = len(old) + counts[member]
                if len(old) < start:
                    positions = torch.cat((old, torch.arange(start, stop)))
                    self.slot_positions[member, source, : len(positions)] = positions
        return plan, replace(batch, slot_counts=slot_counts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_evicted_tables_equals_dense_attention_over_the_kept_tokens(
    name: str, case: Case, device: torch.device
) -> None:
    cache = EvictingCache(make_geometry(case), case.dtype, depths=(0, 1, 2, 0), length=160, device=device)
    backend = make_backend(name, cache.arena, cache.tables, cache.slot_positions)
    for counts in (
        {0: 60, 1: 37, 3: 45},  # prompts in chunks
        {0: 1, 1: 30, 2: 70},  # decode beside prompts
        {0: 1, 1: 1, 2: 1, 3: 1},
        {0: 25, 1: 1, 2: 1, 3: 13},
        {0: 1, 1: 1, 2: 1, 3: 1},
    ):
        check_step(backend, case, *cache.next_step(counts), cache.kept)
        for sequence in set(counts) - {3}:  # one keeps all of its tokens
            for layer in PLAN.owners(cache.depths[sequence]):
                slots = len(cache.kept[sequence, layer].positions)
                share = torch.rand((), generator=case.generator)
                cache.evict(sequence, layer, (torch.rand(slots, generator=case.generator) < share).nonzero()[:, 0])


@pytest.mark.parametrize("name", BACKENDS)
def test_slot_counts_without_slot_positions_are_refused(name: str, device: torch.device) -> None:
    cache = EvictingCache(make_geometry(Case()), torch.float32, depths=(0,), length=16, device=device)
    backend = make_backend(name, cache.arena, cache.tables)
    with pytest.raises(ValueError, match="needs slot positions"):
        backend.begin(cache.next_step({0: 3})[1])
