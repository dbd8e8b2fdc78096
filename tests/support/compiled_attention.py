"""Compiles the kernels of triton attention for a GPU that need not be there; prints what became of them as JSON.

    python -m support.compiled_attention CAPABILITY MODEL

Layers and steps of several sizes run through the backend with the launches left out; the rest is Triton's own doing,
from the specialisation of arguments to machine code. Not under Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.base import AttentionCall
from kvfold_server.kv.backends.triton import TritonBackend
from kvfold_server.kv.step_batch import StepBatch
from kvfold_server.kv.triton import attention, merge, write  # noqa: F401 - compiled from here on, not interpreted

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS = 18
"""Layers 1 and 16 among them: a compiler that specialises on numbers tells 1 and multiples of 16 from others."""


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


MODELS = {
    "gemma": Model(8, 4, 256, 256, window=1024, softcap=50.0),
    "gpt-oss": Model(64, 8, 64, 64, window=128, sinks=True),
    "smollm in fp32": Model(9, 3, 64, 64, dtype=torch.float32),
}


@dataclass
class Compiled:
    """One kernel: shared memory, and of each thread registers and the bytes of stack that it spills to."""

    name: str
    shared_bytes: int
    registers: int
    stack_bytes: int


@dataclass
class CompilingDriver:
    """What Triton asks of a driver, without a device. `compiled` grows when a kernel would be loaded."""

    capability: int
    compiled: list[Compiled] = field(default_factory=list)

    @property
    def utils(self) -> Any:
        return SimpleNamespace(load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": 227 << 10})

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def launcher_cls(self, source: object, metadata: object) -> Any:
        return lambda *arguments: None

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert usage is not None
        self.compiled.append(Compiled(name, shared, int(usage[1]), int(usage[2])))
        return object(), object(), int(usage[1]), 0, 1024


def run_step(
    backend: TritonBackend, model: Model, lengths: Sequence[int], queries: Sequence[int], layers: int = LAYERS
) -> None:
    starts = tuple(accumulate(queries, initial=0))
    tokens = starts[-1]
    backend.begin(
        StepBatch(
            token_count=tokens,
            positions=torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)]),
            rows=torch.arange(len(lengths)),
            query_starts=starts,
            kv_lengths=tuple(lengths),
            owner_tokens=(tokens,) * LAYERS,
            sources=torch.arange(LAYERS)[:, None].expand(LAYERS, len(lengths)),
        )
    )
    sinks = torch.zeros(model.heads, dtype=model.dtype) if model.sinks else None
    query = torch.zeros(tokens, model.heads, model.key_dim, dtype=model.dtype)
    key = torch.zeros(tokens, model.kv_heads, model.key_dim, dtype=model.dtype)
    value = torch.zeros(tokens, model.kv_heads, model.value_dim, dtype=model.dtype)
    for layer in range(layers):
        backend.write(layer, key, value)
        backend.attend(AttentionCall(layer, model.key_dim**-0.5, model.window, model.softcap, sinks), query)


def main(capability: int, name: str) -> None:
    model = MODELS[name]
    driver = CompilingDriver(capability)
    triton.runtime.driver.set_active(driver)
    # Too late for the kernels, which are imported; it only lets the backend take an arena on CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    kind = LayerKind(model.window, "rope", model.kv_heads, model.key_dim, model.value_dim)
    geometry = CacheGeometry((kind,) * LAYERS, model.dtype.itemsize)
    tables = torch.ones(8, LAYERS, 1024, dtype=torch.int32)
    backend = TritonBackend(Arena(geometry, 1, model.dtype, torch.device("cpu")), tables)
    run_step(backend, model, lengths=(300, 5000, 16), queries=(1, 20, 16), layers=1)
    first = len(driver.compiled)
    run_step(backend, model, lengths=(1,), queries=(1,))
    run_step(backend, model, lengths=(1, 4200, 301, 77, 6000), queries=(1, 1, 1, 50, 333))
    kernels = [asdict(kernel) for kernel in driver.compiled]
    sys.stdout.write(json.dumps({"first_layer": kernels[:first], "later": kernels[first:]}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
