"""What a layer computes between its matrix products, by native kernels: each one pass over memory.

`interface.h` describes the functions. Those that stand for a model's own code round where it rounds.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

from kvfold_server.kv.native.library import NO_NUMBER, NUMBERS, OK, load_library, torch_parallel_function

if TYPE_CHECKING:
    from collections.abc import Callable


class Activation(IntEnum):
    """Of a gated MLP."""

    SILU = 0
    GELU_TANH = 1


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows in 8 bits: (numbers [..., width] uint8 - 128) * steps [...] fp32."""

    numbers: torch.Tensor
    steps: torch.Tensor


class _Workers(ctypes.Structure):
    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_int32))


class _NormCall(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("addend", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
        ("round_first", ctypes.c_int32),
    )


class _GateCall(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("activation", ctypes.c_int32),
    )


class _RotatedHeads(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("heads", ctypes.c_int64),
    )


class _RotateCall(ctypes.Structure):
    _fields_ = (
        ("parts", _RotatedHeads * 2),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("dim", ctypes.c_int64),
    )


class _QuantizeCall(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("block", ctypes.c_int64),
    )


class _RestoreCall(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("width", ctypes.c_int64),
    )


class LayerOps:
    """The functions of the library on torch's own threads. Raises NativeUnavailableError if there is no library.

    All take and return tensors of one dtype, fp32, bf16 or fp16, on CPU.
    """

    def __init__(self) -> None:
        library = load_library()
        workers = ctypes.POINTER(_Workers)
        self._rms_norm = library.kvfold_rms_norm
        self._rms_norm.argtypes = [workers, ctypes.c_int32, ctypes.POINTER(_NormCall), ctypes.c_int64]
        self._gate = library.kvfold_gate
        self._gate.argtypes = [workers, ctypes.c_int32, ctypes.POINTER(_GateCall), ctypes.c_int64]
        self._rotate = library.kvfold_rotate
        self._rotate.argtypes = [workers, ctypes.c_int32, ctypes.POINTER(_RotateCall), ctypes.c_int64]
        self._quantize = library.kvfold_quantize
        self._quantize.argtypes = [workers, ctypes.c_int32, ctypes.POINTER(_QuantizeCall), ctypes.c_int64]
        self._restore = library.kvfold_restore
        self._restore.argtypes = [workers, ctypes.c_int32, ctypes.POINTER(_RestoreCall), ctypes.c_int64]
        self._workers = _Workers(torch_parallel_function(), 1)

    def rms_norm(
        self, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, *, weight_offset: float, round_first: bool
    ) -> torch.Tensor:
        """hidden [..., width] / rms(hidden) * (weight [width] + weight_offset).

        `round_first` rounds to the dtype before the weight comes in.
        """
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        constants = (hidden.shape[-1], epsilon, weight_offset, round_first)
        call = _NormCall(hidden.data_ptr(), None, None, weight.data_ptr(), out.data_ptr(), *constants)
        self._run(self._rms_norm, hidden.dtype, call, hidden.numel() // hidden.shape[-1])
        return out

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        addend: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        *,
        weight_offset: float,
        round_first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of hidden and addend, both [..., width], and its norm as of `rms_norm`."""
        hidden, addend = hidden.contiguous(), addend.contiguous()
        total, out = torch.empty_like(hidden), torch.empty_like(hidden)
        width = hidden.shape[-1]
        call = _NormCall(
            hidden.data_ptr(),
            addend.data_ptr(),
            total.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            width,
            epsilon,
            weight_offset,
            round_first,
        )
        self._run(self._rms_norm, hidden.dtype, call, hidden.numel() // width)
        return total, out

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(gate) * up of gate_up [..., 2 * width], which holds both side by side: [..., width]."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        self._run(
            self._gate,
            gate_up.dtype,
            _GateCall(gate_up.data_ptr(), out.data_ptr(), width, activation),
            out.numel() // width,
        )
        return out

    def rotate(self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Rotates query [heads, N, dim] and key [kv_heads, N, dim] in place by cosine and sine [N, dim], contiguous.

        Pairs are (i, i + dim / 2). Any strides of heads and tokens; dimensions lie side by side.
        """
        call = _RotateCall((_heads(query), _heads(key)), cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1])
        self._run(self._rotate, query.dtype, call, query.shape[1])

    def quantize(self, hidden: torch.Tensor, block: int) -> Int8Rows:
        """Spreads each `block` values of hidden [..., width] over each other and rounds each row to 8 bits.

        `block` is a power of two of at most 64 that divides the width.
        """
        hidden = hidden.contiguous()
        width = hidden.shape[-1]
        numbers = torch.empty_like(hidden, dtype=torch.uint8)
        steps = torch.empty(hidden.shape[:-1])
        call = _QuantizeCall(hidden.data_ptr(), numbers.data_ptr(), steps.data_ptr(), width, block)
        self._run(self._quantize, hidden.dtype, call, steps.numel())
        return Int8Rows(numbers, steps)

    def restore(
        self, products: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """products [..., width] in fp32, contiguous, times steps [...], plus bias [width] of `dtype`: [..., width]."""
        out = torch.empty_like(products, dtype=dtype)
        addend = None if bias is None else bias.data_ptr()
        call = _RestoreCall(products.data_ptr(), steps.data_ptr(), addend, out.data_ptr(), products.shape[-1])
        self._run(self._restore, dtype, call, steps.numel())
        return out

    def _run(self, function: Callable[..., int], dtype: torch.dtype, call: ctypes.Structure, rows: int) -> None:
        self._workers.threads = torch.get_num_threads()
        if function(self._workers, NUMBERS.get(dtype, NO_NUMBER), call, rows) != OK:
            raise TypeError(f"native kernels do not take {dtype}")


def _heads(states: torch.Tensor) -> _RotatedHeads:
    head, token, _ = states.stride()
    return _RotatedHeads(states.data_ptr(), token, head, states.shape[0])
