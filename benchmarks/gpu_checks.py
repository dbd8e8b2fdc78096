"""Whether triton attention computes what the reference does, on the device at hand, and never waits for it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.backends.triton import TritonBackend
from kvfold_server.kv.step_batch import StepBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvfold_server.kv.backends.base import AttentionBackend

LAYERS = 3

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Both sides round to the data type on the way. fp32 products are three of tf32 here, and one of fp32 there."""


@dataclass(frozen=True, slots=True)
class Check:
    """Heads, and sequences of `lengths` tokens, the last `queries` of which are computed.

    `name`: what it is about, in the table. `evicts`: of the tokens before, some are gone.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    evicts: bool = False


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The largest difference of any result, absolute or relative, whichever is smaller; and whether it may be."""

    name: str
    shape: str
    dtype: str
    error: float
    tolerance: float
    passed: bool


def variants(base: Check) -> list[Check]:
    """What a check can be about, on the same heads and sequences."""
    longest = max(base.lengths)
    return [
        base,
        replace(base, name="window", window=longest // 7),
        replace(base, name="softcap, sinks", softcap=3.0, sinks=True),
        replace(base, name="evicted", evicts=True),
        replace(base, name="evicted, all", evicts=True, window=longest // 7, softcap=3.0, sinks=True),
    ]


def run_check(check: Check, device: torch.device) -> CheckResult:
    """One step on both backends, each on an arena of its own, the rows that are not in use full of NaN.

    Raises RuntimeError if triton attention makes the host wait for a CUDA device.
    """
    generator = torch.Generator().manual_seed(11)
    kind = LayerKind(check.window, "rope", check.kv_heads, check.dim, check.dim)
    geometry = CacheGeometry((kind,) * LAYERS, check.dtype.itemsize)
    blocks, size = geometry.blocks_for(max(check.lengths)), len(check.lengths)
    arenas = [Arena(geometry, size * LAYERS * blocks, check.dtype, device) for _ in range(2)]
    tables = 1 + torch.randperm(arenas[0].block_count, generator=generator).int().view(size, LAYERS, blocks)
    slot_positions = torch.zeros(size, LAYERS, max(check.lengths), dtype=torch.int32)
    batch = make_batch(check, slot_positions, generator, device)
    _fill(arenas, tables, batch, generator)

    backends: list[AttentionBackend] = [
        TritonBackend(arenas[0], tables, slot_positions),
        ReferenceBackend(arenas[1], tables, slot_positions),
    ]

    def random(heads: int) -> torch.Tensor:
        return torch.randn(batch.token_count, heads, check.dim, generator=generator).to(device, check.dtype)

    sinks = torch.linspace(-1, 2, check.heads).to(device, check.dtype) if check.sinks else None
    inputs = [(random(check.heads), random(check.kv_heads), random(check.kv_heads)) for _ in range(LAYERS)]
    results: list[list[torch.Tensor]] = []
    for backend in backends:
        with _no_waiting(device, forbidden=isinstance(backend, TritonBackend)):
            backend.begin(batch)
            outputs = []
            for layer, (query, key, value) in enumerate(inputs):
                backend.write(layer, key, value)
                call = AttentionCall(layer, check.dim**-0.5, check.window, check.softcap, sinks)
                outputs.append(backend.attend(call, query).float())
        results.append(outputs)
    ours, expected = (torch.stack(outputs) for outputs in results)
    error = float(((ours - expected).abs() / expected.abs().clamp(min=1)).max())
    same_rows = torch.equal(arenas[0].rows.nan_to_num(), arenas[1].rows.nan_to_num())
    tolerance = TOLERANCES[check.dtype]
    return CheckResult(
        name=check.name,
        shape=f"{check.heads}/{check.kv_heads}/{check.dim}",
        dtype=str(check.dtype).removeprefix("torch."),
        error=error if same_rows else math.inf,
        tolerance=tolerance,
        passed=same_rows and error <= tolerance,  # not so if the error is NaN
    )


def make_batch(
    check: Check, slot_positions: torch.Tensor, generator: torch.Generator, device: torch.device
) -> StepBatch:
    """The step; if tokens were evicted, writes the positions of those that are left."""
    starts = tuple(accumulate(check.queries, initial=0))
    size = len(check.lengths)
    slot_counts = None
    if check.evicts:
        slot_counts = torch.tensor(check.lengths).expand(LAYERS, size).clone()
        for index, (length, queries) in enumerate(zip(check.lengths, check.queries, strict=True)):
            for layer in range(LAYERS):
                left = (torch.rand(length - queries, generator=generator) < 0.6).nonzero()[:, 0]
                positions = torch.cat((left, torch.arange(length - queries, length)))
                slot_counts[layer, index] = len(positions)
                slot_positions[index, layer, : len(positions)] = positions
    spans = zip(check.lengths, check.queries, strict=True)
    return StepBatch(
        token_count=starts[-1],
        positions=torch.cat([torch.arange(length - queries, length) for length, queries in spans]).to(device),
        rows=torch.arange(size),
        query_starts=starts,
        kv_lengths=check.lengths,
        owner_tokens=(starts[-1],) * LAYERS,
        sources=torch.arange(LAYERS)[:, None].expand(LAYERS, size).contiguous(),
        slot_counts=slot_counts,
    )


def _fill(arenas: Sequence[Arena], tables: torch.Tensor, batch: StepBatch, generator: torch.Generator) -> None:
    """The same rows in both arenas where slots are in use; the step's own are among them, to be overwritten."""
    per_block = arenas[0].geometry.tokens_per_block
    for arena in arenas:
        arena.fill(math.nan)
    for index, length in enumerate(batch.kv_lengths):
        for layer in range(LAYERS):
            count = length if batch.slot_counts is None else int(batch.slot_counts[layer, index])
            slots = torch.arange(count)
            rows = tables[index, layer].long()[slots // per_block] * per_block + slots % per_block
            content = torch.randn(count, arenas[0].rows.shape[1], generator=generator)
            for arena in arenas:
                arena.rows[rows.to(arena.rows.device)] = content.to(arena.rows)


@contextmanager
def _no_waiting(device: torch.device, *, forbidden: bool) -> Iterator[None]:
    """Makes every operation of torch that waits for a CUDA device an error."""
    if device.type != "cuda" or not forbidden:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
