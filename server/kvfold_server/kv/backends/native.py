"""Attention on CPU by the project's own C++ kernels (`kvfold_server/kv/native`).

Decode reads each row of the arena once and is bound by memory; prefill is blocked flash attention. What a sequence's
tokens get does not depend, to the last bit, on what else is in the batch or on the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from typing import TYPE_CHECKING, ClassVar

import torch

from kvfold_server.kv.backends.base import AttentionBackend, AttentionCall
from kvfold_server.kv.native.library import (
    BEST_PATH,
    NUMBERS,
    OK,
    CacheConfig,
    NativeUnavailableError,
    ProjectedCall,
    SimdPath,
    load_library,
    torch_parallel_function,
)

if TYPE_CHECKING:
    from kvfold_server.kv.arena import Arena
    from kvfold_server.kv.step_batch import StepBatch


class NativeBackend(AttentionBackend):
    """Runs on torch's own threads, as many as `torch.get_num_threads()` says at `begin`.

    `path` forces an instruction set; by default the fastest that the machine and the head dimensions allow is taken.
    Raises NativeUnavailableError if the library is missing or cannot serve this arena.
    """

    name: ClassVar[str] = "native"

    def __init__(
        self,
        arena: Arena,
        tables: torch.Tensor,
        slot_positions: torch.Tensor | None = None,
        *,
        path: SimdPath | None = None,
    ) -> None:
        super().__init__(arena, tables, slot_positions)
        if arena.rows.device.type != "cpu":
            raise NativeUnavailableError(f"native attention runs on cpu, the arena is on {arena.rows.device}")
        if arena.rows.dtype not in NUMBERS:
            raise NativeUnavailableError(f"native attention does not read {arena.rows.dtype}")
        for tensor in (tables,) if slot_positions is None else (tables, slot_positions):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous() or tensor.shape[:2] != tables.shape[:2]:
                raise ValueError("block tables and slot positions are contiguous int32 tensors of the same rows")
        self._library = load_library()
        kind = arena.geometry.layers[0]
        self._kv_heads, self._key_dim, self._value_dim = kind.kv_heads, kind.key_dim, kind.value_dim
        self._layer_count = tables.shape[1]
        self._dtype = arena.rows.dtype
        config = CacheConfig(
            arena=arena.rows.data_ptr(),
            tables=tables.data_ptr(),
            slot_positions=None if slot_positions is None else slot_positions.data_ptr(),
            parallel=torch_parallel_function(),
            layers=tables.shape[1],
            blocks_per_layer=tables.shape[2],
            slots_per_layer=0 if slot_positions is None else slot_positions.shape[2],
            tokens_per_block=arena.geometry.tokens_per_block,
            kv_heads=kind.kv_heads,
            key_dim=kind.key_dim,
            value_dim=kind.value_dim,
            number=NUMBERS[self._dtype],
            path=BEST_PATH if path is None else path,
        )
        context = ctypes.c_void_p()
        if self._library.kvfold_create(ctypes.byref(config), ctypes.byref(context)) != OK:
            wanted = "any path" if path is None else path.name
            raise NativeUnavailableError(
                f"{wanted} cannot run here with key dimension {kind.key_dim} and value dimension {kind.value_dim}"
            )
        self._context = context
        weakref.finalize(self, self._library.kvfold_destroy, context)
        self.path = SimdPath(self._library.kvfold_path(context))
        self._batch: StepBatch | None = None
        self._rotating: torch.Tensor | None = None

    def begin(self, batch: StepBatch) -> None:
        """Hands the step's layout over, once for all layers."""
        rows, sources = batch.rows.contiguous(), batch.sources.contiguous()
        self.require_slot_positions(batch)
        slot_counts = None if batch.slot_counts is None else batch.slot_counts.contiguous()
        starts, lengths = array("q", batch.query_starts), array("q", batch.kv_lengths)
        self._check(
            self._library.kvfold_begin(
                self._context,
                torch.get_num_threads(),
                batch.sequence_count,
                rows.data_ptr(),
                starts.buffer_info()[0],
                lengths.buffer_info()[0],
                sources.data_ptr(),
                None if slot_counts is None else slot_counts.data_ptr(),
            )
        )
        self._batch = batch

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copies the rows; large steps on several threads."""
        self._check(
            self._library.kvfold_write(
                self._context,
                layer,
                self._step().owner_tokens[layer],
                key.data_ptr(),
                *key.stride(),
                value.data_ptr(),
                *value.stride(),
            )
        )

    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        """One call for the whole batch; the result is a new tensor."""
        if query.stride(-1) != 1:
            query = query.contiguous()
        tokens, heads, _ = query.shape
        sinks = _sinks(call)
        out = torch.empty((tokens, heads, self._value_dim), dtype=self._dtype)
        self._check(
            self._library.kvfold_attend(
                self._context,
                call.layer,
                heads,
                call.window or 0,
                call.scaling,
                call.softcap or 0.0,
                None if sinks is None else sinks.data_ptr(),
                query.data_ptr(),
                query.stride(0),
                query.stride(1),
                out.data_ptr(),
            )
        )
        return out

    def attend_projected(
        self,
        call: AttentionCall,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        positions: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor | None:
        """What lies between two products takes as long as one where sequences are few, so it is one call."""
        query, key, value = projected
        cosine, sine = positions
        if cosine is not self._rotating:
            if not self._rotates(query, cosine, sine):
                return None
            self._rotating = cosine
        tokens = query.shape[1]
        heads = query.shape[2] // self._key_dim
        sinks = _sinks(call)
        out = query.new_empty((tokens, heads, self._value_dim))
        arguments = ProjectedCall(
            call.layer,
            tokens,
            self._step().owner_tokens[call.layer],
            heads,
            call.window or 0,
            call.scaling,
            call.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            query.data_ptr(),
            query.stride(1),
            key.data_ptr(),
            key.stride(1),
            value.data_ptr(),
            value.stride(1),
            cosine.data_ptr(),
            sine.data_ptr(),
            out.data_ptr(),
        )
        self._check(self._library.kvfold_attend_projected(self._context, arguments))
        return out

    def _rotates(self, query: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
        """Whether the kernel takes these positions; those of a step are the same in all layers."""
        shape = (1, query.shape[1], self._key_dim)
        return all(
            states.dtype is self._dtype and states.shape == shape and states.is_contiguous()
            for states in (cosine, sine)
        )

    def _step(self) -> StepBatch:
        if self._batch is None:
            raise RuntimeError("begin comes before write")
        return self._batch

    def _check(self, error: int) -> None:
        if error != OK:
            raise MemoryError("native attention found no memory for its intermediate results")


def _sinks(call: AttentionCall) -> torch.Tensor | None:
    """The sinks as the library reads them. The caller keeps the tensor alive while it does."""
    return None if call.sinks is None else call.sinks.to(torch.float32).contiguous()
