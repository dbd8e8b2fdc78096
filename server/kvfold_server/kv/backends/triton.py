"""Attention on GPUs by the project's kernels in Triton (`kvfold_server/kv/triton`).

Decode splits long contexts over many programs and merges what they found; chunks of prompts are blocked flash
attention. Nothing waits for the device: tables and lists of work are sent once a step.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import torch

from kvfold_server.kv.backends.base import AttentionBackend, AttentionCall, BackendUnavailableError
from kvfold_server.kv.triton.device_step import DeviceStep
from kvfold_server.kv.triton.launch_shape import decode_shape, padded, prefill_shape

if TYPE_CHECKING:
    from kvfold_server.kv.arena import Arena
    from kvfold_server.kv.step_batch import StepBatch
    from kvfold_server.kv.triton.device_step import Launch

LOG2_E = 1.4426950408889634

WRITTEN_VALUES = 2048
"""Keys that one program of the write kernel copies: 16 a thread."""

MERGED_AT_ONCE = 16
"""Items of a tile that the merge kernel reads at a time."""


class TritonBackend(AttentionBackend):
    """Runs on the arena's CUDA device; on CPU only under Triton's interpreter (TRITON_INTERPRET=1), for tests.

    Raises BackendUnavailableError where neither is at hand, or triton is not installed. Nothing else imports triton.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, arena: Arena, tables: torch.Tensor, slot_positions: torch.Tensor | None = None) -> None:
        super().__init__(arena, tables, slot_positions)
        device = arena.rows.device
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailableError(f"triton attention runs on a CUDA device, the arena is on {device}")
        if arena.rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BackendUnavailableError(f"triton attention does not read {arena.rows.dtype}")
        try:
            from kvfold_server.kv.triton import attention, merge, write  # noqa: PLC0415 - they import triton
        except ImportError as error:
            raise BackendUnavailableError(f"triton attention needs kvfold[gpu] installed: {error}") from error
        self._attend_kernel = attention.attend_kernel
        self._merge_kernel = merge.merge_kernel
        self._write_kernel = write.write_kernel
        self._widens = attention.IS_INTERPRETED and arena.rows.dtype == torch.bfloat16
        self._device_index = arena.rows.get_device()  # -1: none
        self._kind = arena.geometry.layers[0]
        self._step: DeviceStep | None = None

    def begin(self, batch: StepBatch) -> None:
        """Sends the tables' part that the step reads, and where its tokens lie."""
        self.require_slot_positions(batch)
        self._step = DeviceStep(
            batch,
            self.arena.geometry,
            self.tables.numpy(),
            None if self.slot_positions is None else self.slot_positions.numpy(),
            self.arena.rows.device,
        )

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """One launch for the rows of all owners."""
        step, kind = self._require_step(), self._kind
        count = step.batch.owner_tokens[layer]
        if count == 0:
            return
        key_block, value_block = padded(kind.kv_heads * kind.key_dim), padded(kind.kv_heads * kind.value_dim)
        tokens = max(1, WRITTEN_VALUES // max(key_block, value_block))
        with torch.cuda.device(self._device_index):
            self._write_kernel[(-(-count // tokens),)](
                key,
                *key.stride(),
                value,
                *value.stride(),
                self.arena.rows,
                step.buffer,
                step.bases,
                layer * step.batch.sequence_count,
                step.slots[layer].own,
                step.token_sequences,
                count,
                kv_heads=kind.kv_heads,
                key_dim=kind.key_dim,
                value_dim=kind.value_dim,
                key_block=key_block,
                value_block=value_block,
                tokens_per_block=self.arena.geometry.tokens_per_block,
                tokens=tokens,
            )

    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        """One launch for all sequences that decode and one for all chunks; a merge after each that is split.

        Raises ValueError if the window is not that of the layer's kind, by which the step was laid out.
        """
        step, kind = self._require_step(), self._kind
        if call.window != self.arena.geometry.layers[call.layer].window:
            raise ValueError(f"layer {call.layer} is called with the window {call.window}, its kind has another")
        if query.stride(-1) != 1:
            query = query.contiguous()
        tokens, heads, _ = query.shape
        sizes = (heads // kind.kv_heads, kind.key_dim, kind.value_dim, query.dtype.itemsize)
        out = torch.empty((tokens, heads, kind.value_dim), dtype=query.dtype, device=query.device)
        with torch.cuda.device(self._device_index):
            for launch in step.launches(call.layer, decode_shape(*sizes), prefill_shape(*sizes)):
                self._launch(step, launch, call, query, out)
        return out

    def _launch(
        self, step: DeviceStep, launch: Launch, call: AttentionCall, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        kind, shape, heads = self._kind, launch.shape, query.shape[1]
        places = (launch.item_count if launch.is_split else 0, shape.tokens, heads)
        values = torch.empty((*places, kind.value_dim), dtype=torch.float32, device=query.device)
        logsums = torch.empty(places, dtype=torch.float32, device=query.device)
        logit_scale, cap_scale = call.scaling * LOG2_E, 0.0
        if call.softcap is not None:
            logit_scale, cap_scale = 2 * logit_scale / call.softcap, call.softcap * LOG2_E
        self._attend_kernel[(launch.item_count * kind.kv_heads,)](
            query,
            query.stride(0),
            query.stride(1),
            self.arena.rows,
            step.buffer,
            step.bases,
            call.layer * step.batch.sequence_count,
            step.slots[call.layer].own,
            step.slots[call.layer].first,
            launch.items,
            call.sinks,
            out,
            values,
            logsums,
            int(launch.is_split),
            logit_scale,
            cap_scale,
            is_softcapped=call.softcap is not None,
            kv_heads=kind.kv_heads,
            group=heads // kind.kv_heads,
            key_dim=kind.key_dim,
            value_dim=kind.value_dim,
            key_block=padded(kind.key_dim),
            value_block=padded(kind.value_dim),
            tokens_per_block=self.arena.geometry.tokens_per_block,
            row_count=shape.rows,
            tokens=shape.tokens,
            tile=shape.tile,
            split=shape.split,
            widens=self._widens,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        if launch.is_split:
            self._merge_kernel[(launch.tile_count * shape.tokens * heads,)](
                launch.tiles,
                values,
                logsums,
                out,
                tokens=shape.tokens,
                heads=heads,
                value_dim=kind.value_dim,
                value_block=padded(kind.value_dim),
                at_once=MERGED_AT_ONCE,
            )

    def _require_step(self) -> DeviceStep:
        if self._step is None:
            raise RuntimeError("begin() must come before the layers of a step")
        return self._step
