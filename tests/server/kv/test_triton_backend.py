"""What the triton backend promises beyond the tests that all backends share (`test_backends.py`).

Without a GPU the kernels run in Triton's interpreter (see `tests/conftest.py`).
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall, BackendUnavailableError
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.backends.triton import TritonBackend
from kvfold_server.kv.step_batch import StepBatch

LAYERS = 2


@dataclass(frozen=True)
class Setup:
    """Sequences of `lengths` tokens, the last `queries` of each computed in this step; all layers own their KV."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int = 3
    kv_heads: int = 1
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class Cache:
    """Filled pages in random order, the unwritten ones NaN; what a sequence holds depends on its length alone."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        kind = LayerKind(setup.window, "rope", setup.kv_heads, setup.dim, setup.dim)
        geometry = CacheGeometry((kind,) * LAYERS, torch.float32.itemsize)
        blocks = geometry.blocks_for(max(setup.lengths))
        size = len(setup.lengths)
        self.arena = Arena(geometry, size * LAYERS * blocks, torch.float32, device)
        self.arena.fill(math.nan)
        order = torch.randperm(self.arena.block_count, generator=torch.Generator().manual_seed(1))
        self.tables = (1 + order).int().view(size, LAYERS, blocks)
        starts = tuple(accumulate(setup.queries, initial=0))
        self.query = torch.empty(starts[-1], setup.heads, setup.dim, device=device)
        self.batch = StepBatch(
            token_count=starts[-1],
            positions=torch.cat([torch.arange(n - q, n) for n, q in zip(setup.lengths, setup.queries, strict=True)]).to(
                device
            ),
            rows=torch.arange(size),
            query_starts=starts,
            kv_lengths=setup.lengths,
            owner_tokens=(starts[-1],) * LAYERS,
            sources=torch.arange(LAYERS)[:, None].expand(LAYERS, size).contiguous(),
        )
        sinks = torch.linspace(-2, 3, setup.heads, device=device) if setup.sinks else None
        self.call = AttentionCall(1, setup.dim**-0.5, setup.window, setup.softcap, sinks)
        for index, length in enumerate(setup.lengths):
            generator = torch.Generator().manual_seed(length)
            for layer in range(LAYERS):
                content = torch.randn(length, self.arena.rows.shape[1], generator=generator)
                self.arena.rows[self.slot_rows(index, layer, length)] = content.to(device)
            span = slice(starts[index], starts[index + 1])
            self.query[span] = torch.randn(setup.queries[index], setup.heads, setup.dim, generator=generator).to(device)

    def slot_rows(self, index: int, layer: int, length: int) -> torch.Tensor:
        """The arena's rows that hold the first `length` tokens of a sequence."""
        per_block = self.arena.geometry.tokens_per_block
        slots = torch.arange(length)
        return self.tables[index, layer].long()[slots // per_block] * per_block + slots % per_block

    def backend(self) -> TritonBackend:
        backend = TritonBackend(self.arena, self.tables)
        backend.begin(self.batch)
        return backend

    def expected(self) -> torch.Tensor:
        backend = ReferenceBackend(self.arena, self.tables)
        backend.begin(self.batch)
        return backend.attend(self.call, self.query)


# Beyond one split of decode (256 slots) and one of prefill (4096), and within one.
LONG = Setup(lengths=(1, 700, 2100, 4200), queries=(1, 1, 1, 20))


@pytest.mark.parametrize(
    "setup",
    [LONG, replace(LONG, window=600), replace(LONG, softcap=2.0, sinks=True)],
    ids=["plain", "window", "softcap and sinks"],
)
def test_contexts_that_several_programs_share_equal_the_reference_backend(setup: Setup, device: torch.device) -> None:
    cache = Cache(setup, device)
    result = cache.backend().attend(cache.call, cache.query)
    torch.testing.assert_close(result, cache.expected(), atol=3e-6, rtol=3e-6)


def test_a_sequence_gets_the_same_bits_whatever_is_in_the_batch(device: torch.device) -> None:
    setup = Setup(lengths=(1, 300, 90, 40), queries=(1, 1, 75, 17))
    together = Cache(setup, device)
    results = together.backend().attend(together.call, together.query).split(setup.queries)
    for length, queries, result in zip(setup.lengths, setup.queries, results, strict=True):
        alone = Cache(replace(setup, lengths=(length,), queries=(queries,)), device)
        torch.testing.assert_close(alone.backend().attend(alone.call, alone.query), result, atol=0, rtol=0)


def test_what_has_left_the_window_is_not_read(device: torch.device) -> None:
    cache = Cache(Setup(lengths=(600, 90), queries=(1, 30), window=50), device)
    expected = cache.backend().attend(cache.call, cache.query)
    cache.arena.rows[cache.slot_rows(0, 1, 600 - 50)] = math.nan
    cache.arena.rows[cache.slot_rows(1, 1, 61 - 50)] = math.nan
    torch.testing.assert_close(cache.backend().attend(cache.call, cache.query), expected, atol=0, rtol=0)


def test_tables_are_read_when_the_step_begins_and_not_again(device: torch.device) -> None:
    cache = Cache(Setup(lengths=(70, 40), queries=(1, 9)), device)
    expected = cache.expected()
    backend = cache.backend()
    cache.tables.zero_()
    torch.testing.assert_close(backend.attend(cache.call, cache.query), expected, atol=3e-6, rtol=3e-6)


def test_a_query_of_any_strides_is_read(device: torch.device) -> None:
    cache = Cache(Setup(lengths=(70, 40), queries=(1, 9)), device)
    backend = cache.backend()
    expected = backend.attend(cache.call, cache.query)
    transposed = cache.query.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat((cache.query, cache.query), dim=1)[:, :3]
    apart = cache.query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for query in (transposed, wide, apart):
        torch.testing.assert_close(backend.attend(cache.call, query), expected, atol=0, rtol=0)


def test_rows_of_any_strides_are_written_where_the_table_says(device: torch.device) -> None:
    tokens, kv_heads, dim = 150, 2, 12
    setup = Setup(lengths=(tokens + 20, tokens), queries=(tokens, tokens), heads=2, kv_heads=kv_heads, dim=dim)
    cache = Cache(setup, device)
    fused = torch.randn(2 * tokens, 3, kv_heads, dim, device=device)
    transposed = torch.randn(dim, kv_heads, 2 * tokens, device=device).permute(2, 1, 0)
    cache.backend().write(0, fused[:, 1], transposed)
    for index, length in enumerate(setup.lengths):
        rows = cache.arena.rows[cache.slot_rows(index, 0, length)[-tokens:]]
        span = slice(index * tokens, (index + 1) * tokens)
        expected = torch.cat((fused[span, 1].flatten(1), transposed[span].flatten(1)), dim=1)
        torch.testing.assert_close(rows, expected, atol=0, rtol=0)


def test_a_window_that_is_not_the_layers_own_is_refused(device: torch.device) -> None:
    cache = Cache(Setup(lengths=(9,), queries=(1,), window=5), device)
    with pytest.raises(ValueError, match="window 4"):
        cache.backend().attend(replace(cache.call, window=4), cache.query)


def test_an_arena_on_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cache = Cache(Setup(lengths=(9,), queries=(1,)), torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match="runs on a CUDA device, the arena is on cpu"):
        TritonBackend(cache.arena, cache.tables)


def test_where_triton_is_not_installed_the_refusal_says_what_is(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    cache = Cache(Setup(lengths=(9,), queries=(1,)), device)
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in [name for name in sys.modules if name.startswith("kvfold_server.kv.triton.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("kvfold_server.kv.triton.attention", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"kvfold\[gpu\]"):
        TritonBackend(cache.arena, cache.tables)


def test_an_unknown_number_is_refused(device: torch.device) -> None:
    kind = LayerKind(None, "rope", 1, 16, 16)
    arena = Arena(CacheGeometry((kind,), 8), 1, torch.float64, device)
    with pytest.raises(BackendUnavailableError, match="float64"):
        TritonBackend(arena, torch.zeros(1, 1, 1, dtype=torch.int32))


def test_triton_is_imported_for_its_backend_alone() -> None:
    script = "import sys, kvfold_server.kv.backends.registry; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
