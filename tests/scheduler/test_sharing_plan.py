from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold_scheduler.sharing import InvalidPlanError, SharingEntry, SharingPlan

if TYPE_CHECKING:
    from kvfold_scheduler.geometry import CacheGeometry

PlanOf = Callable[..., SharingPlan]


@st.composite
def plans(draw: st.DrawFn) -> SharingPlan:
    """Valid plans: the layers are split in owners and others, and the others share in any order."""
    layer_count = draw(st.integers(2, 12))
    others = draw(st.sets(st.integers(1, layer_count - 1)))
    sharers = draw(st.permutations(sorted(others)))
    entries = []
    for sharer in sharers:
        owners = [layer for layer in range(sharer) if layer not in others]
        entries.append(SharingEntry(sharer, draw(st.sampled_from(owners))))
    return SharingPlan(layer_count, tuple(entries))


@given(plans())
def test_each_depth_stores_one_layer_less_than_the_one_before(plan: SharingPlan) -> None:
    owners = [set(plan.owners(depth)) for depth in range(plan.max_depth + 1)]
    assert owners[0] == set(range(plan.layer_count))
    for depth, entry in enumerate(plan.entries):
        assert owners[depth] - owners[depth + 1] == {entry.sharer}


@given(plans())
def test_every_layer_reads_an_owner_below_or_itself(plan: SharingPlan) -> None:
    for depth in range(plan.max_depth + 1):
        for layer, source in enumerate(plan.sources(depth)):
            assert source <= layer
            assert source in plan.owners(depth)
            assert (source == layer) == (layer in plan.owners(depth))


@given(plans())
def test_a_sharer_reads_the_owner_of_its_entry_from_its_depth_on(plan: SharingPlan) -> None:
    for index, entry in enumerate(plan.entries):
        assert [plan.sources(depth)[entry.sharer] for depth in range(plan.max_depth + 1)] == [entry.sharer] * (
            index + 1
        ) + [entry.owner] * (plan.max_depth - index)


@given(plans())
def test_first_shared_depth_is_where_a_layer_stops_storing(plan: SharingPlan) -> None:
    for layer, first in enumerate(plan.first_shared_depth):
        stored = [layer in plan.owners(depth) for depth in range(plan.max_depth + 1)]
        assert stored == [depth < first for depth in range(plan.max_depth + 1)]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (((2, 0), (2, 1)), "two entries"),
        (((1, 2),), "below"),
        (((2, 2),), "below"),
        (((4, 0),), "below"),
        (((2, -1),), "below"),
        (((1, 0), (2, 1)), "a sharer itself"),
        (((2, 1), (1, 0)), "a sharer itself"),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(plan_of: PlanOf, pairs: tuple[tuple[int, int], ...], reason: str) -> None:
    with pytest.raises(InvalidPlanError, match=reason):
        plan_of(4, *pairs)


def test_layers_of_different_kinds_never_share(plan_of: PlanOf, geometry_of: Callable[..., CacheGeometry]) -> None:
    with pytest.raises(InvalidPlanError, match="different kinds"):
        plan_of(2, (1, 0)).check_kinds(geometry_of(None, 32))
    plan_of(2, (1, 0)).check_kinds(geometry_of(32, 32))


def test_a_plan_for_another_number_of_layers_is_refused(
    plan_of: PlanOf, geometry_of: Callable[..., CacheGeometry]
) -> None:
    with pytest.raises(InvalidPlanError, match="4 layers"):
        plan_of(4).check_kinds(geometry_of(None, None))
