"""KVSharer's walk (arXiv:2410.18517): rank layer pairs by the distance of their KV, accept in that order what keeps the
output.

Where the paper leaves a choice: K and V are averaged over samples in 32-bit floats, and their distance is half the sum
of both Euclidean distances; the cosine is that of a sample's whole final hidden state, averaged over samples. Unlike
the authors' code, owners never become sharers, samples of another length are an error, and so is a walk that ends
early.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from kvfold_server.sharing.candidates import candidates, sources_of
from kvfold_server.sharing.strategies.base import FoundEntry, SearchSetting, check_calibration, too_few

if TYPE_CHECKING:
    from kvfold_scheduler.sharing import SharingEntry
    from kvfold_server.sharing.dense import Trace

COSINE_THRESHOLD = 0.5
"""The paper's; outputs of accepted pairs are usually above 0.8, so it guards against collapse only."""


class Order(Enum):
    """Which pairs come first."""

    DISSIMILAR_FIRST = "largest first"
    SIMILAR_FIRST = "smallest first"
    RANDOM = "in random order"


@dataclass(frozen=True, slots=True)
class RankedWalk:
    """One pass over all pairs in one order; 30 samples of 64 tokens, as in the paper."""

    name: str
    order: Order
    samples: int = 30
    tokens: int = 64
    threshold: float = COSINE_THRESHOLD

    @property
    def formula(self) -> str:
        """What is ranked, and what is accepted."""
        return (
            "score = (||mean K_i - mean K_j|| + ||mean V_i - mean V_j||) / 2 over sample means after RoPE, "
            f"{self.order.value}; accepted if the cosine of the final hidden states, averaged over samples, "
            f"stays above {self.threshold}"
        )

    def search(self, setting: SearchSetting) -> list[FoundEntry]:
        """Walks the ranking until `setting.depth` entries are accepted. Raises SearchError if too few are."""
        check_calibration(self, setting)
        dense = setting.dense
        exact, trace = dense.hidden(setting.tokens, dense.unshared)
        distances = kv_distances(trace, candidates(dense.geometry))
        ranking = self._ranking(distances, setting.seed)
        found: list[FoundEntry] = []
        for tried, entry in enumerate(ranking):
            if len(found) == setting.depth:
                break
            accepted = [one.entry for one in found]
            if entry not in candidates(dense.geometry, accepted):
                continue
            setting.report(len(found) / setting.depth, f"pair {tried + 1} of {len(ranking)}")
            sources = sources_of(dense.geometry.layer_count, [*accepted, entry])
            folded, folded_trace = dense.hidden(setting.tokens, sources, base=trace)
            if output_cosine(exact, folded) > self.threshold:
                found.append(FoundEntry(entry, distances[entry]))
                trace = folded_trace
        if len(found) < setting.depth:
            raise too_few(len(found), setting)
        setting.report(1.0, f"{len(found)} entries")
        return found

    def _ranking(self, distances: dict[SharingEntry, float], seed: int) -> list[SharingEntry]:
        if self.order is Order.RANDOM:
            return random.Random(seed).sample(list(distances), len(distances))  # noqa: S311 - no secret depends on it
        return sorted(distances, key=lambda entry: distances[entry], reverse=self.order is Order.DISSIMILAR_FIRST)


def kv_distances(trace: Trace, pairs: list[SharingEntry]) -> dict[SharingEntry, float]:
    """For each pair, half the sum of the Euclidean distances of the layers' K and V, each averaged over the samples."""
    keys = {layer: key.float().mean(dim=0) for layer, key in trace.keys.items()}
    values = {layer: value.float().mean(dim=0) for layer, value in trace.values.items()}
    return {
        pair: float(
            torch.linalg.vector_norm(keys[pair.sharer] - keys[pair.owner])
            + torch.linalg.vector_norm(values[pair.sharer] - values[pair.owner])
        )
        / 2
        for pair in pairs
    }


def output_cosine(exact: torch.Tensor, folded: torch.Tensor) -> float:
    """The cosine of two final hidden states [samples, tokens, hidden], each sample as one vector, averaged over
    samples."""
    return float(torch.cosine_similarity(exact.flatten(1).double(), folded.flatten(1).double(), dim=1).mean())
