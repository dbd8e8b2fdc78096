"""What the measurements of attention work on: heads, data types, and batches of equal sequences."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING

import torch

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_server.kv.step_batch import StepBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Setting:
    """Heads and head dimension of a model, and the name of its data type."""

    heads: int
    kv_heads: int
    dim: int
    dtype_name: str

    @property
    def shape(self) -> str:
        """As on the command line."""
        return f"{self.heads}/{self.kv_heads}/{self.dim}"

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys, values and output."""
        return DTYPES[self.dtype_name]

    @property
    def token_bytes(self) -> int:
        """K and V of one token at one layer."""
        return self.kv_heads * 2 * self.dim * self.dtype.itemsize

    def geometry(self, layers: int) -> CacheGeometry:
        """That of so many equal layers without a window."""
        kind = LayerKind(None, "rope", self.kv_heads, self.dim, self.dim)
        return CacheGeometry((kind,) * layers, self.dtype.itemsize)


def make_settings(shapes: Sequence[str], dtypes: Sequence[str]) -> list[Setting]:
    """Each shape "heads/KV heads/head dimension" in each data type. Raises ValueError for any other shape."""
    settings = []
    for shape, dtype in product(shapes, dtypes):
        heads, kv_heads, dim = map(int, shape.split("/"))
        settings.append(Setting(heads, kv_heads, dim, dtype))
    return settings


def make_batch(batch: int, context: int, queries: int, layers: int) -> StepBatch:
    """`queries` tokens at the end of each sequence."""
    starts = tuple(accumulate([queries] * batch, initial=0))
    return StepBatch(
        token_count=starts[-1],
        positions=torch.arange(context - queries, context).repeat(batch),
        rows=torch.arange(batch),
        query_starts=starts,
        kv_lengths=(context,) * batch,
        owner_tokens=(starts[-1],) * layers,
        sources=torch.arange(layers)[:, None].expand(layers, batch).contiguous(),
    )
