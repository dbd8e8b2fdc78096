"""Shares what changes the model's predictions least: a beam search over nested plans, scored by the output itself.

The score of a plan is the mean KL divergence of the exact next-token distributions to the folded ones over calibration
tokens. Depth by depth, each plan in the beam is extended by its most promising entries, and the best plans go on. What
is promising is guessed first from each pair's local error (how much the sharer's own layer changes; its rank
correlation with the KL of the pair alone was 0.93 on a 30-layer model, and the best owner was always among the first
two), then from the KL that the entry added the last time it was tried. Trying an entry costs the layers from its sharer
upward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold_server.sharing.candidates import candidates, sources_of
from kvfold_server.sharing.exact_distributions import ExactDistributions
from kvfold_server.sharing.strategies.base import FoundEntry, SearchSetting, check_calibration, too_few

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvfold_scheduler.sharing import SharingEntry
    from kvfold_server.sharing.dense import Trace

SCORED_STRIDE = 2
"""Every second position is scored: neighbours say much the same, and the output head is a third of a small model's
work."""

LOCAL_ERROR_TOKENS = 512
"""Tokens of the first look at all pairs: enough for means over tokens."""


@dataclass(frozen=True, slots=True)
class _State:
    """A plan in the beam. `kl` holds that of each of its depths, from 1."""

    entries: tuple[SharingEntry, ...]
    kl: tuple[float, ...]
    trace: Trace

    @property
    def last_kl(self) -> float:
        return self.kl[-1] if self.kl else 0.0


class _Estimates:
    """What an entry is expected to add to the KL: what it added when it was last tried, else in proportion to its local
    error."""

    def __init__(self, local_errors: dict[SharingEntry, float]) -> None:
        self.local_errors = local_errors
        self._added: dict[SharingEntry, float] = {}

    def learn(self, entry: SharingEntry, added: float) -> None:
        self._added[entry] = added

    def added(self, entry: SharingEntry) -> float:
        if entry in self._added:
            return self._added[entry]
        if not self._added:
            return self.local_errors[entry]
        known = sum(self.local_errors[one] for one in self._added)
        return self.local_errors[entry] * sum(self._added.values()) / known if known else math.inf

    def promising(self, allowed: Iterable[SharingEntry], owners: int, count: int) -> list[SharingEntry]:
        """The `count` best entries, among the best `owners` of each sharer."""
        by_sharer: dict[int, list[SharingEntry]] = {}
        for entry in allowed:
            by_sharer.setdefault(entry.sharer, []).append(entry)
        pool = [
            entry
            for entries in by_sharer.values()
            for entry in sorted(entries, key=lambda one: self.local_errors[one])[:owners]
        ]
        return sorted(pool, key=self.added)[:count]


class _Work:
    """Reports progress in tries, of which there are at most `total`."""

    def __init__(self, setting: SearchSetting, total: int) -> None:
        self._report = setting.report
        self._total = total
        self._done = 0

    def tried(self, words: str) -> None:
        self._done += 1
        self._report(self._done / self._total, words)

    def reached(self, done: int) -> None:
        """A depth is done, perhaps with fewer tries than it could have taken."""
        self._done = max(self._done, done)


@dataclass(frozen=True, slots=True)
class OutputAware:
    """The beam search. `first_tries` entries are tried at depth 1, then `tries` for each of `beam` plans.

    Of each sharer's entries only the best `owners_per_sharer` are considered.
    """

    name: str = "output-aware"
    samples: int = 4
    tokens: int = 512
    beam: int = 3
    tries: int = 6
    first_tries: int = 24
    owners_per_sharer: int = 2

    @property
    def formula(self) -> str:
        """What is ranked, and what is accepted."""
        return (
            "score = mean KL(exact || folded) in nats per token of the plan up to and with the entry; "
            f"beam search of width {self.beam}, the path with the least sum of log KL over its depths"
        )

    def search(self, setting: SearchSetting) -> list[FoundEntry]:
        """Finds `setting.depth` entries. Raises SearchError if the model has fewer layers that can share."""
        check_calibration(self, setting)
        dense, tokens = setting.dense, setting.tokens
        positions = torch.arange(SCORED_STRIDE - 1, self.tokens, SCORED_STRIDE, device=tokens.device)
        setting.report(0.0, "looking at all pairs")
        rows = max(1, LOCAL_ERROR_TOKENS // self.tokens)
        estimates = _Estimates(dense.local_errors(tokens[:rows], candidates(dense.geometry)))
        logits, trace = dense.logits(tokens, dense.unshared, positions=positions)
        exact = ExactDistributions(logits)
        beam = [_State((), (), trace)]
        work = _Work(setting, self.first_tries + (setting.depth - 1) * self.tries * self.beam)
        for depth in range(1, setting.depth + 1):
            extended: list[_State] = []
            seen: set[frozenset[SharingEntry]] = set()
            for state in beam:
                tries = self.first_tries if depth == 1 else self.tries
                allowed = candidates(dense.geometry, state.entries)
                for entry in estimates.promising(allowed, self.owners_per_sharer, tries):
                    entries = (*state.entries, entry)
                    if frozenset(entries) in seen:
                        continue
                    seen.add(frozenset(entries))
                    sources = sources_of(dense.geometry.layer_count, entries)
                    logits, folded = dense.logits(tokens, sources, positions=positions, base=state.trace)
                    kl = float(exact.kl(logits).mean())
                    estimates.learn(entry, kl - state.last_kl)
                    extended.append(_State(entries, (*state.kl, kl), folded))
                    # Only the best are kept at any time: a trace holds all hidden states of the calibration text.
                    extended = sorted(extended, key=lambda one: one.last_kl)[: self.beam]
                    work.tried(f"depth {depth}: KL {extended[0].last_kl:.3f}")
            if not extended:
                raise too_few(depth - 1, setting)
            beam = extended
            work.reached(self.first_tries + (depth - 1) * self.tries * self.beam)
        setting.report(1.0, f"KL {beam[0].last_kl:.3f}")
        best = min(beam, key=lambda state: sum(math.log(max(kl, 1e-9)) for kl in state.kl))
        return [FoundEntry(entry, kl) for entry, kl in zip(best.entries, best.kl, strict=True)]
