"""What is known about KV cache memory; mirrors kvfold/v1/memory.proto. All sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What was done with the KV cache of one request.

    `kv_bytes_held` is counted from the pages that were really allocated at the request's end, `kv_bytes_full` is what
    the same tokens take at depth 0, and `kv_bytes_saved` is the difference (a little below zero at depth 0, because the
    last page of a layer is rarely full).
    """

    shared_layers: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_saved: int
    kv_bytes_held_peak: int
    preemptions: int


class BlockState(Enum):
    """What a layer-block is used for."""

    UNSPECIFIED = "unspecified"
    FREE = "free"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """The state of one model's pool. While `ready` is false its engine restarts, and the other fields are zero."""

    model: str
    ready: bool
    pool_bytes: int
    block_bytes: int
    tokens_per_block: int
    state_bytes: Mapping[BlockState, int]
    running_requests: int
    waiting_requests: int
    kv_bytes_held: int
    kv_bytes_full: int
    kv_bytes_saved: int
