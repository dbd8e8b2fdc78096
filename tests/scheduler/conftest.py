"""Small models for the scheduler's tests, and two settings of hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.scheduler import Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import SequenceId, SequenceRequest
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_scheduler.step_plan import StepPlan, StepResult

# Quick: the same examples in every run. Thorough: new ones each time, for many minutes:
#   HYPOTHESIS_PROFILE=thorough SIMULATED_REQUESTS=100000 pytest tests/scheduler --timeout=0
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=100, stateful_step_count=40)
settings.register_profile("thorough", deadline=None, max_examples=2000, stateful_step_count=100, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

GeometryOf = Callable[..., CacheGeometry]
PlanOf = Callable[..., SharingPlan]


@pytest.fixture(scope="session")
def geometry_of() -> GeometryOf:
    """A geometry of 16 tokens a block and 4,096 bytes a block, with one layer for each window given."""

    def build(*windows: int | None) -> CacheGeometry:
        kinds = (LayerKind(window=window, rope="default", kv_heads=1, key_dim=64, value_dim=64) for window in windows)
        return CacheGeometry(tuple(kinds), value_bytes=2)

    return build


@pytest.fixture(scope="session")
def plan_of() -> PlanOf:
    """A plan for `layer_count` layers with the given (sharer, owner) pairs."""

    def build(layer_count: int, *pairs: tuple[int, int]) -> SharingPlan:
        return SharingPlan(layer_count, tuple(SharingEntry(sharer, owner) for sharer, owner in pairs))

    return build


class Driver:
    """A scheduler of four full layers of 16 tokens a block, of which two can be shared, whose steps always succeed."""

    def __init__(self, geometry: CacheGeometry, plan: SharingPlan, blocks: int, **limits: int) -> None:
        self.scheduler = Scheduler(geometry, plan, blocks, 256, SchedulerLimits(**limits))

    def add(self, number: int, prompt: int, new: int, depth: int = 0) -> object:
        """Adds sequence `number` and returns what became of it."""
        return self.scheduler.add(SequenceRequest(SequenceId(number), prompt, new, depth))

    def step(self) -> StepPlan:
        """One committed step; the ledger is whole after it."""
        plan = self.scheduler.step()
        self.scheduler.check_integrity()
        self.scheduler.commit(plan, StepResult(frozenset()))
        self.scheduler.check_integrity()
        return plan

    def run(self, steps: int) -> None:
        """Some committed steps."""
        for _ in range(steps):
            self.step()


@pytest.fixture(scope="session")
def driver_of(geometry_of: GeometryOf, plan_of: PlanOf) -> Callable[..., Driver]:
    """Builds a `Driver` with so many blocks and the given limits."""

    def build(blocks: int, **limits: int) -> Driver:
        limits = {"max_running": 8, "max_waiting": 8, "step_tokens": 64} | limits
        return Driver(geometry_of(*[None] * 4), plan_of(4, (3, 0), (2, 0)), blocks, **limits)

    return build
