"""What the native backend promises beyond the tests that all backends share (`test_backends.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall
from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.native.library import NativeUnavailableError, SimdPath, available_paths
from kvfold_server.kv.step_batch import StepBatch

try:
    PATHS = available_paths()
except NativeUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

LAYERS = 2


@dataclass(frozen=True)
class Setup:
    """Sequences of `lengths` tokens, the last `queries` of each computed in this step; all layers own their KV.

    `kept`: about which part of the older tokens each layer still has; None if nothing was evicted.
    """

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int = 6
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kept: tuple[float, ...] | None = None
    path: SimdPath | None = None

    def call(self) -> AttentionCall:
        sinks = torch.linspace(-2, 3, self.heads, dtype=self.dtype) if self.sinks else None
        return AttentionCall(1, self.key_dim**-0.5, self.window, self.softcap, sinks)


class Cache:
    """Filled pages in random order, the unwritten ones NaN; a sequence's content depends only on its `seeds` entry."""

    def __init__(self, setup: Setup, seeds: tuple[int, ...] | None = None) -> None:
        kind = LayerKind(setup.window, "rope", setup.kv_heads, setup.key_dim, setup.value_dim)
        geometry = CacheGeometry((kind,) * LAYERS, setup.dtype.itemsize)
        blocks = geometry.blocks_for(max(setup.lengths))
        size = len(setup.lengths)
        self.setup = setup
        self.arena = Arena(geometry, size * LAYERS * blocks, setup.dtype, torch.device("cpu"))
        self.arena.fill(math.nan)
        order = torch.randperm(self.arena.block_count, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
        self.tables = (1 + order).view(size, LAYERS, blocks)
        starts = tuple(accumulate(setup.queries, initial=0))
        self.query = torch.empty(starts[-1], setup.heads, setup.key_dim, dtype=setup.dtype)
        self.slot_positions = torch.full((size, LAYERS, max(setup.lengths)), -1, dtype=torch.int32)
        self.slot_counts = torch.tensor(setup.lengths).repeat(LAYERS, 1)
        self.batch = StepBatch(
            token_count=starts[-1],
            positions=torch.cat([torch.arange(n - q, n) for n, q in zip(setup.lengths, setup.queries, strict=True)]),
            rows=torch.arange(size),
            query_starts=starts,
            kv_lengths=setup.lengths,
            owner_tokens=(starts[-1],) * LAYERS,
            sources=torch.arange(LAYERS)[:, None].expand(LAYERS, size).contiguous(),
            slot_counts=None if setup.kept is None else self.slot_counts,
        )
        for index, seed in enumerate(seeds or range(size)):
            self._fill(index, torch.Generator().manual_seed(seed))

    def _fill(self, index: int, generator: torch.Generator) -> None:
        tokens_per_block = self.arena.geometry.tokens_per_block
        length = self.setup.lengths[index]
        for layer in range(LAYERS):
            if self.setup.kept is not None:
                keep = torch.rand(length, generator=generator) < self.setup.kept[layer]
                keep[length - self.setup.queries[index] :] = True
                positions = keep.nonzero()[:, 0]
                self.slot_positions[index, layer, : len(positions)] = positions
                self.slot_counts[layer, index] = len(positions)
            slots = torch.arange(int(self.slot_counts[layer, index]))
            rows = self.tables[index, layer].long()[slots // tokens_per_block] * tokens_per_block
            content = torch.randn(len(slots), self.arena.rows.shape[1], generator=generator)
            self.arena.rows[rows + slots % tokens_per_block] = content.to(self.setup.dtype)
        # A query belongs to a position, whatever the chunk that it is computed in.
        queries = torch.randn(length, *self.query.shape[1:], generator=generator)[length - self.setup.queries[index] :]
        self.query[self.batch.query_starts[index] : self.batch.query_starts[index + 1]] = queries.to(self.setup.dtype)

    def native(self) -> NativeBackend:
        return NativeBackend(self.arena, self.tables, self.slot_positions, path=self.setup.path)

    def attend(self) -> list[torch.Tensor]:
        """The result of each sequence."""
        backend = self.native()
        backend.begin(self.batch)
        out = backend.attend(self.setup.call(), self.query)
        return list(out.split(self.setup.queries))

    def reference(self) -> list[torch.Tensor]:
        """The reference backend's result on fp32 copies of the same numbers."""
        setup = self.setup
        geometry = CacheGeometry(self.arena.geometry.layers, 4)
        arena = Arena(geometry, self.arena.block_count, torch.float32, torch.device("cpu"))
        per_block, tokens = geometry.tokens_per_block, self.arena.geometry.tokens_per_block
        blocks = geometry.blocks_for(max(setup.lengths))
        arena_needed = len(setup.lengths) * LAYERS * blocks
        arena = Arena(geometry, arena_needed, torch.float32, torch.device("cpu"))
        tables = (1 + torch.arange(arena_needed, dtype=torch.int32)).view(len(setup.lengths), LAYERS, blocks)
        for index in range(len(setup.lengths)):
            for layer in range(LAYERS):
                slots = torch.arange(int(self.slot_counts[layer, index]))
                old = self.tables[index, layer].long()[slots // tokens] * tokens + slots % tokens
                new = tables[index, layer].long()[slots // per_block] * per_block + slots % per_block
                arena.rows[new] = self.arena.rows[old].float()
        backend = ReferenceBackend(arena, tables, self.slot_positions)
        backend.begin(self.batch)
        return list(backend.attend(setup.call(), self.query.float()).split(setup.queries))


MIXED = Setup(lengths=(1, 700, 65, 130, 2100, 300, 16), queries=(1, 1, 65, 70, 1, 2, 1))
VARIANTS = {
    "plain": MIXED,
    "bf16": replace(MIXED, dtype=torch.bfloat16),
    "fp16": replace(MIXED, dtype=torch.float16),
    "every head its own KV": replace(MIXED, kv_heads=6, dtype=torch.bfloat16),
    "one KV head": replace(MIXED, kv_heads=1, dtype=torch.bfloat16),
    "five heads a group": replace(MIXED, heads=10),
    "nine heads a group, bf16": replace(MIXED, heads=18, dtype=torch.bfloat16),
    "wide values": replace(MIXED, value_dim=96),
    "wide keys, bf16": replace(MIXED, key_dim=192, value_dim=128, dtype=torch.bfloat16),
    "window": replace(MIXED, window=600),
    "narrow window, bf16": replace(MIXED, window=7, dtype=torch.bfloat16),
    "softcap": replace(MIXED, softcap=2.0),
    "sinks": replace(MIXED, sinks=True),
    "all, bf16": replace(MIXED, window=100, softcap=4.0, sinks=True, dtype=torch.bfloat16),
    "evicted": replace(MIXED, kept=(0.3, 0.8)),
    "evicted, window, bf16": replace(MIXED, kept=(0.3, 0.8), window=900, dtype=torch.bfloat16),
}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("setup", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_instruction_set_equals_the_reference_backend(setup: Setup, path: SimdPath) -> None:
    cache = Cache(replace(setup, path=path))
    tolerance = TOLERANCES[setup.dtype]
    for ours, expected in zip(cache.attend(), cache.reference(), strict=True):
        torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [None, (0.3, 0.8)], ids=["all kept", "evicted"])
def test_a_sequence_gets_the_same_bits_whatever_is_in_the_batch(
    kept: tuple[float, ...] | None, dtype: torch.dtype, path: SimdPath
) -> None:
    together = replace(MIXED, dtype=dtype, kept=kept, window=None if kept is None else 900, path=path)
    results = Cache(together).attend()
    for index, result in enumerate(results):
        alone = replace(together, lengths=(together.lengths[index],), queries=(together.queries[index],))
        torch.testing.assert_close(Cache(alone, seeds=(index,)).attend()[0], result, atol=0, rtol=0)


def test_the_number_of_threads_changes_no_bit() -> None:
    cache = Cache(replace(MIXED, dtype=torch.bfloat16))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat(cache.attend()))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)
    torch.testing.assert_close(results[2], results[0], atol=0, rtol=0)


PROJECTED = {name: VARIANTS[name] for name in ("plain", "bf16", "fp16", "wide values", "all, bf16", "evicted")}


def projected(setup: Setup, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V side by side, as a fused projection gives them."""
    widths = [setup.heads * setup.key_dim, setup.kv_heads * setup.key_dim, setup.kv_heads * setup.value_dim]
    packed = torch.randn(1, tokens, sum(widths), generator=torch.Generator().manual_seed(5)).to(setup.dtype)
    query, key, value = packed.split(widths, dim=-1)
    return query, key, value


def rotation(setup: Setup, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = (
        torch.randn(1, tokens, setup.key_dim, generator=torch.Generator().manual_seed(seed)).to(setup.dtype)
        for seed in (6, 7)
    )
    return cosine, sine


@pytest.mark.parametrize("owned", ["all", "some", "none"])
@pytest.mark.parametrize("setup", PROJECTED.values(), ids=PROJECTED.keys())
def test_one_call_after_a_projection_does_what_its_parts_do_to_the_bit(setup: Setup, owned: str) -> None:
    tokens = sum(setup.queries)
    owner_tokens = {"all": tokens, "some": setup.queries[0] + setup.queries[1], "none": 0}[owned]
    caches = [Cache(setup), Cache(setup)]
    backends = [cache.native() for cache in caches]
    for cache, backend in zip(caches, backends, strict=True):
        backend.begin(replace(cache.batch, owner_tokens=(owner_tokens,) * LAYERS))
    cosine, sine = rotation(setup, tokens)
    found = backends[0].attend_projected(setup.call(), projected(setup, tokens), (cosine, sine))
    query, key, value = projected(setup, tokens)
    rotated = [
        states.view(1, tokens, -1, setup.key_dim).transpose(1, 2) for states in (query.contiguous(), key.contiguous())
    ]
    query, key = (states[0].transpose(0, 1) for states in apply_rotary_pos_emb(*rotated, cosine, sine))
    if owner_tokens:
        backends[1].write(1, key, value.view(tokens, setup.kv_heads, setup.value_dim))
    assert found is not None
    assert torch.equal(found, backends[1].attend(setup.call(), query))
    assert torch.equal(caches[0].arena.rows.nan_to_num(0), caches[1].arena.rows.nan_to_num(0))


def test_positions_that_the_kernel_cannot_read_are_left_to_others_with_nothing_done() -> None:
    setup = VARIANTS["bf16"]
    tokens = sum(setup.queries)
    cache = Cache(setup)
    backend = cache.native()
    backend.begin(cache.batch)
    before = cache.arena.rows.clone()
    wide = tuple(states.float() for states in rotation(setup, tokens))
    states = projected(setup, tokens)
    assert backend.attend_projected(setup.call(), states, (wide[0], wide[1])) is None
    assert torch.equal(states[0], projected(setup, tokens)[0])
    assert torch.equal(cache.arena.rows.nan_to_num(0), before.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_gives_the_same_bits_however_the_prompt_is_cut(dtype: torch.dtype) -> None:
    setup = Setup(lengths=(301,), queries=(301,), window=90, dtype=dtype)
    whole = Cache(setup).attend()[0]
    for last in (2, 33, 150):
        chunk = Cache(replace(setup, queries=(last,))).attend()[0]
        torch.testing.assert_close(chunk, whole[-last:], atol=0, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_reads_no_slot_outside_the_window(dtype: torch.dtype, path: SimdPath) -> None:
    setup = Setup(lengths=(700, 41), queries=(1, 1), window=37, dtype=dtype, path=path)
    cache = Cache(setup)
    expected = cache.attend()
    per_block = cache.arena.geometry.tokens_per_block
    for index, length in enumerate(setup.lengths):
        slots = torch.arange(length - 37)
        rows = cache.tables[index, 1].long()[slots // per_block] * per_block + slots % per_block
        cache.arena.rows[rows] = math.nan
    for result, before in zip(cache.attend(), expected, strict=True):
        torch.testing.assert_close(result, before, atol=0, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
def test_softmax_is_exact_to_fp32(path: SimdPath) -> None:
    """Uniform values 1 and logits of a wide range: the result is the sum of weights over itself, 1 to the last bits."""
    setup = Setup(lengths=(1500, 400), queries=(1, 3), path=path)
    cache = Cache(setup)
    cache.arena.rows[:, cache.arena.key_values :] = 1.0
    cache.query *= 20
    for result in cache.attend():
        torch.testing.assert_close(result, torch.ones_like(result), atol=5e-7, rtol=0)


@pytest.mark.parametrize("tokens", [5, 3000])
def test_rows_of_any_strides_are_written_where_the_table_says(tokens: int) -> None:
    setup = Setup(lengths=(tokens + 20, tokens), queries=(tokens, tokens))
    cache = Cache(setup)
    backend = cache.native()
    backend.begin(cache.batch)
    fused = torch.randn(2 * tokens, 3, setup.kv_heads, setup.key_dim)
    transposed = torch.randn(setup.value_dim, setup.kv_heads, 2 * tokens).permute(2, 1, 0)
    backend.write(0, fused[:, 1], transposed)
    per_block = cache.arena.geometry.tokens_per_block
    for index in range(2):
        slots = torch.arange(setup.lengths[index] - tokens, setup.lengths[index])
        rows = cache.arena.rows[cache.tables[index, 0].long()[slots // per_block] * per_block + slots % per_block]
        span = slice(index * tokens, (index + 1) * tokens)
        expected = torch.cat((fused[span, 1].flatten(1), transposed[span].flatten(1)), dim=1)
        torch.testing.assert_close(rows, expected, atol=0, rtol=0)


def test_a_query_of_any_strides_is_read() -> None:
    cache = Cache(MIXED)
    expected = torch.cat(cache.attend())
    backend = cache.native()
    backend.begin(cache.batch)
    transposed = cache.query.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat((cache.query, cache.query), dim=1)[:, : MIXED.heads]
    apart = cache.query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for query in (transposed, wide, apart):
        torch.testing.assert_close(backend.attend(MIXED.call(), query), expected, atol=0, rtol=0)


def test_head_dimensions_that_a_path_cannot_take_are_refused_by_name_and_served_by_another() -> None:
    setup = Setup(lengths=(40,), queries=(3,), key_dim=18, value_dim=10)
    assert Cache(setup).native().path is SimdPath.PLAIN
    for path in PATHS[1:]:
        with pytest.raises(NativeUnavailableError, match=f"{path.name} cannot run here with key dimension 18"):
            Cache(replace(setup, path=path)).native()


def test_an_unknown_number_is_refused() -> None:
    kind = LayerKind(None, "rope", 1, 16, 16)
    arena = Arena(CacheGeometry((kind,), 8), 1, torch.float64, torch.device("cpu"))
    with pytest.raises(NativeUnavailableError, match="float64"):
        NativeBackend(arena, torch.zeros(1, 1, 1, dtype=torch.int32))
