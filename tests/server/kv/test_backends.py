"""Every attention backend against dense attention over plain tensors that the test keeps itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.scheduler import Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import SequenceId, SequenceRequest
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_scheduler.step_plan import StepResult
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionBackend, AttentionCall
from kvfold_server.kv.backends.registry import BACKENDS
from kvfold_server.kv.native.library import NativeUnavailableError
from kvfold_server.kv.step_batch import make_step_batch

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


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, call: AttentionCall) -> torch.Tensor:
    """One query and one head at a time. query [T, H, D] at positions start.., key and value [S, KV, D]."""
    out = torch.empty(query.shape[0], query.shape[1], value.shape[2])
    for token in range(query.shape[0]):
        position = start + token
        first = 0 if call.window is None else max(0, position - call.window + 1)
        for head in range(query.shape[1]):
            kv_head = head * key.shape[1] // query.shape[1]
            scores = (key[first : position + 1, kv_head].double() @ query[token, head].double()) * call.scaling
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            if call.sinks is not None:
                scores = torch.cat((scores, call.sinks[head].double()[None]))
            weights = scores.softmax(0)[: position + 1 - first]
            out[token, head] = (weights @ value[first : position + 1, kv_head].double()).float()
    return out


def make_backend(name: str, case: Case) -> tuple[AttentionBackend, Scheduler]:
    kind = LayerKind(case.window, "default", case.kv_heads, case.key_dim, case.value_dim)
    geometry = CacheGeometry((kind,) * LAYERS, case.dtype.itemsize)
    limits = SchedulerLimits(max_running=8, max_waiting=8, step_tokens=case.step_tokens)
    scheduler = Scheduler(geometry, PLAN, block_count=200, context_length=256, limits=limits)
    arena = Arena(geometry, 200, case.dtype, torch.device("cpu"))
    arena.fill(float("nan"))
    tables = torch.frombuffer(scheduler.tables.entries, dtype=torch.int32).view(
        limits.max_running, LAYERS, scheduler.tables.blocks_per_layer
    )
    try:
        return BACKENDS[name](arena, tables), scheduler
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_over_blocks_equals_dense_attention(name: str, case: Case) -> None:
    backend, scheduler = make_backend(name, case)
    for index, (length, depth) in enumerate(zip(case.lengths, case.depths, strict=True)):
        scheduler.add(SequenceRequest(SequenceId(index), length, 20, depth))
    history: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    sinks = torch.randn(HEADS, generator=case.generator) if case.sinks else None

    def random(count: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(count, heads, dim, generator=case.generator).to(case.dtype)

    while scheduler.has_work:
        plan = scheduler.step()
        batch = make_step_batch(plan, PLAN, torch.device("cpu"))
        backend.begin(batch)
        for layer in range(LAYERS):
            call = AttentionCall(layer, case.key_dim**-0.5, case.window, case.softcap, sinks)
            query = random(plan.token_count, HEADS, case.key_dim)
            key = random(plan.token_count, case.kv_heads, case.key_dim)
            value = random(plan.token_count, case.kv_heads, case.value_dim)
            for chunk, start in zip(plan.chunks, batch.query_starts, strict=False):
                if PLAN.sources(chunk.depth)[layer] == layer:
                    rows = slice(start, start + chunk.count)
                    old = history.get((chunk.sequence_id, layer))
                    new = (key[rows].float(), value[rows].float())
                    both = new if old is None else (torch.cat((old[0], new[0])), torch.cat((old[1], new[1])))
                    history[chunk.sequence_id, layer] = both
                else:
                    # Rows of sharers are never written; what stands there must not matter.
                    key[start:] = float("nan")
                    value[start:] = float("nan")
            backend.write(layer, key, value)
            result = backend.attend(call, query)
            assert result.is_contiguous()
            assert result.dtype == case.dtype
            for chunk, start in zip(plan.chunks, batch.query_starts, strict=False):
                dense = history[chunk.sequence_id, PLAN.sources(chunk.depth)[layer]]
                expected = naive(query[start : start + chunk.count].float(), *dense, chunk.start, call)
                tolerance = 2e-6 if case.dtype == torch.float32 else 2e-2
                torch.testing.assert_close(
                    result[start : start + chunk.count].float(), expected, atol=tolerance, rtol=tolerance
                )
        scheduler.commit(plan, StepResult(frozenset()))
        scheduler.check_integrity()
    assert scheduler.pool.held_count == 0
