"""The packed batch of one step: the tokens of all its sequences side by side, and where their KV lies.

Sequences are ordered by depth, ascending. Because plans are nested, at each layer the sequences that own it are the
first ones,
and their tokens the first tokens:

    tokens    | seq 0, depth 0 | seq 1, depth 0 | seq 2, depth 4 | seq 3, depth 8 |
    layer l, shared from depth 3 up:
              |<---- owner_tokens[l]: write K, V here ----->|     (seq 2 and 3 read the table of sources[l])
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What attention, projections and the backend need to know of a step. Index tensors are int64 unless noted.

    B sequences, N tokens, L layers. Python tuples hold what decides shapes and control flow; tensors hold what is
    indexed with.

    - `positions` [N]: the position of each token in its sequence.
    - `rows` [B]: each sequence's row in the block tables; on the host, where the tables are.
    - `query_starts` (B + 1 ints): sequence b's tokens are [query_starts[b], query_starts[b + 1]).
    - `kv_lengths` (B ints): tokens of the sequence once this step has written its own, evicted ones among them.
    - `owner_tokens` (L ints): how many of the first tokens belong to sequences that own the layer.
    - `sources` [L, B], on the host: the layer whose table a sequence reads at each layer.
    - `slot_counts` [L, B], on the host: the slots in use of that table, once this step has written its own tokens to
      the last of them. None if nothing was evicted: then `kv_lengths` slots are in use, and slot i holds position i.
    """

    token_count: int
    positions: torch.Tensor
    rows: torch.Tensor
    query_starts: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    owner_tokens: tuple[int, ...]
    sources: torch.Tensor
    slot_counts: torch.Tensor | None = None

    @property
    def sequence_count(self) -> int:
        """B."""
        return len(self.kv_lengths)


def make_step_batch(plan: StepPlan, sharing: SharingPlan, device: torch.device) -> StepBatch:
    """Lays out the chunks of a plan, which are ordered by depth. Positions are on `device`."""
    chunks = plan.chunks
    depths = [chunk.depth for chunk in chunks]
    starts = tuple(accumulate((chunk.count for chunk in chunks), initial=0))
    positions = [position for chunk in chunks for position in range(chunk.start, chunk.start + chunk.count)]
    owner_tokens = tuple(starts[bisect_left(depths, first)] for first in sharing.first_shared_depth)
    sources = _sources_by_depth(sharing).index_select(1, torch.tensor(depths))
    return StepBatch(
        token_count=starts[-1],
        positions=torch.tensor(positions, device=device),
        rows=torch.tensor([chunk.row for chunk in chunks]),
        query_starts=starts,
        kv_lengths=tuple(chunk.start + chunk.count for chunk in chunks),
        owner_tokens=owner_tokens,
        sources=sources,
    )


@lru_cache(maxsize=16)
def _sources_by_depth(sharing: SharingPlan) -> torch.Tensor:
    """[L, depths]: the layer whose table each layer reads."""
    return torch.tensor([sharing.sources(depth) for depth in range(sharing.max_depth + 1)]).T.contiguous()
