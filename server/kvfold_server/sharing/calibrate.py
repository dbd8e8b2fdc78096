"""From a model and a text to a plan file: search on one part of the text, measure on the other."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvfold_scheduler.sharing import SharingPlan
from kvfold_server.sharing.fingerprint import HASH_METHOD
from kvfold_server.sharing.measurement import measure_depths
from kvfold_server.sharing.plan_file import (
    MeasuredDepth,
    Measurement,
    PlanFile,
    PlannedEntry,
    PlannedModel,
    Search,
    TextDescription,
)
from kvfold_server.sharing.strategies.base import SearchError, SearchSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from kvfold_server.sharing.dense import DenseModel
    from kvfold_server.sharing.fingerprint import ModelFingerprint
    from kvfold_server.sharing.strategies.base import Strategy

WINDOW_TOKENS = 512
"""Length of the sequences: long enough for attention to reach back, short enough for a search in minutes."""

SEARCH_WINDOWS = 4
HELD_OUT_WINDOWS = 8
PREFIX_TOKENS = 256
"""Of each held-out window; the predictions of the rest are scored: 2,048 tokens."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Tokens [windows, tokens]: the first `SEARCH_WINDOWS` are for searches, the others for measurement only."""

    tokens: torch.Tensor
    source: Literal["generated", "file"]
    name: str | None = None
    seed: int | None = None

    def for_search(self, strategy: Strategy) -> torch.Tensor:
        """The strategy's samples [samples, tokens]. Raises SearchError if there are too few tokens."""
        available = self.tokens[:SEARCH_WINDOWS].flatten()
        needed = strategy.samples * strategy.tokens
        if len(available) < needed:
            raise SearchError(f"the {strategy.name} strategy needs {needed} tokens; the text has {len(available)}")
        return available[:needed].view(strategy.samples, strategy.tokens)

    @property
    def held_out(self) -> torch.Tensor:
        """What no search sees."""
        return self.tokens[SEARCH_WINDOWS:]

    def describe(self, part: torch.Tensor) -> TextDescription:
        """A description of a part of the text."""
        return TextDescription(
            source=self.source,
            name=self.name,
            sequences=part.shape[0],
            tokens_per_sequence=part.shape[1],
            seed=self.seed,
            sha256=hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What to find: the number of layers to share, the depths to measure, the seed of whatever is drawn."""

    depth: int
    measured_depths: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """What a plan is for: a model, its fingerprint, its name for people, and its calibration text."""

    dense: DenseModel
    fingerprint: ModelFingerprint
    name: str
    text: CalibrationText


def calibrate(subject: Subject, strategy: Strategy, task: Task, report: Callable[[str, float, str], None]) -> PlanFile:
    """Searches a plan and measures it. `report` is told the phase, the share of it that is done, and a few words.

    Raises SearchError if the strategy finds no plan of the wanted depth.
    """
    dense, text = subject.dense, subject.text
    calibration = text.for_search(strategy)
    setting = SearchSetting(
        dense, calibration, task.depth, task.seed, lambda done, words: report("search", done, words)
    )
    found = strategy.search(setting)
    plan = SharingPlan(dense.geometry.layer_count, tuple(one.entry for one in found))
    plan.check_kinds(dense.geometry)
    perplexity_exact, depths = measure_depths(
        dense,
        text.held_out,
        prefix=PREFIX_TOKENS,
        plan=plan,
        depths=task.measured_depths,
        progress=lambda done: report("measure", done, ""),
    )
    return PlanFile(
        model=PlannedModel(name=subject.name, hash_method=HASH_METHOD, **dataclasses.asdict(subject.fingerprint)),
        search=Search(
            strategy=strategy.name,
            formula=strategy.formula,
            seed=task.seed,
            dtype=dense.dtype_name,
            calibration=text.describe(calibration),
        ),
        entries=tuple(
            PlannedEntry(sharer=one.entry.sharer, owner=one.entry.owner, score=round(one.score, 6)) for one in found
        ),
        measurement=Measurement(
            text=text.describe(text.held_out),
            prefix=PREFIX_TOKENS,
            dtype=dense.dtype_name,
            perplexity_exact=perplexity_exact,
            depths=tuple(MeasuredDepth(**dataclasses.asdict(depth)) for depth in depths),
        ),
    )


def best_of(plans: Sequence[PlanFile]) -> PlanFile:
    """The plan with the least geometric mean of KL over the measured depths, which weighs all depths alike."""
    return min(plans, key=lambda plan: sum(math.log(max(depth.kl, 1e-9)) for depth in plan.measurement.depths))
