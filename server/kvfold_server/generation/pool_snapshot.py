"""The state of an engine's pool at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """Bytes by state (they add up to `pool_bytes`), requests, and what folding saves right now."""

    pool_bytes: int
    free_bytes: int
    prefill_bytes: int
    decode_bytes: int
    running_requests: int
    waiting_requests: int
    kv_bytes_full: int

    @property
    def kv_bytes_held(self) -> int:
        """Bytes of all pages that sequences hold."""
        return self.prefill_bytes + self.decode_bytes
