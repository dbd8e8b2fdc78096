"""What every strategy promises, and what each of them ranks by."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.naive_sharing import NaiveSharing

from kvfold_scheduler.geometry import CacheGeometry, LayerKind
from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_server.sharing.candidates import candidates, sources_of
from kvfold_server.sharing.strategies.base import SearchError
from kvfold_server.sharing.strategies.output_aware import OutputAware
from kvfold_server.sharing.strategies.ranked import Order, RankedWalk
from kvfold_server.sharing.strategies.registry import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from kvfold_server.sharing.dense import DenseModel
    from kvfold_server.sharing.strategies.base import FoundEntry, SearchSetting, Strategy

    Dense = Callable[[str], tuple[PreTrainedModel, DenseModel]]
    Setting = Callable[..., SearchSetting]

NO_THRESHOLD = -1.0
"""Random tiny models change much with every pair; most tests want the ranking alone."""

SMALL: dict[str, Strategy] = {
    "paper": RankedWalk("paper", Order.DISSIMILAR_FIRST, samples=3, tokens=16, threshold=NO_THRESHOLD),
    "similar": RankedWalk("similar", Order.SIMILAR_FIRST, samples=3, tokens=16, threshold=NO_THRESHOLD),
    "random": RankedWalk("random", Order.RANDOM, samples=3, tokens=16, threshold=NO_THRESHOLD),
    "output-aware": OutputAware(samples=3, tokens=16, beam=2, tries=4, first_tries=6),
}
"""The registry's strategies with samples small enough for tests."""


def pairs_of(found: list[FoundEntry]) -> list[tuple[int, int]]:
    return [(one.entry.sharer, one.entry.owner) for one in found]


def untouched(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, outside the dense form."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def averaged_kv(model: PreTrainedModel, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's K and V averaged over the samples, from the cache of transformers."""
    layers = untouched(model)(input_ids=tokens, use_cache=True).past_key_values.layers
    return [(layer.keys.mean(dim=0), layer.values.mean(dim=0)) for layer in layers]


def mean_kl(model: PreTrainedModel, tokens: torch.Tensor, sources: tuple[int, ...]) -> float:
    naive = NaiveSharing(untouched(model))
    unshared = tuple(range(len(sources)))
    total = torch.zeros(())
    for row in tokens.tolist():
        exact, folded = (naive.logits(row, one).log_softmax(-1)[1::2] for one in (unshared, sources))
        total += torch.nn.functional.kl_div(folded, exact, log_target=True, reduction="batchmean") / len(tokens)
    return float(total)


def test_the_registry_holds_the_strategies_under_their_names() -> None:
    assert set(STRATEGIES) == set(SMALL)
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


@given(st.lists(st.sampled_from([None, 8, 16]), min_size=2, max_size=9), st.data())
def test_entries_taken_from_the_candidates_are_always_a_plan(windows: list[int | None], data: st.DataObject) -> None:
    kinds = tuple(LayerKind(window, "rope", kv_heads=1, key_dim=8, value_dim=8) for window in windows)
    geometry = CacheGeometry(kinds, value_bytes=2)
    entries: list[SharingEntry] = []
    while allowed := candidates(geometry, entries):
        entries.append(data.draw(st.sampled_from(allowed)))
    plan = SharingPlan(len(windows), tuple(entries))
    plan.check_kinds(geometry)
    for depth in range(plan.max_depth + 1):
        sources = sources_of(len(windows), entries[:depth])
        assert sources == plan.sources(depth)
        assert all(sources[source] == source for source in sources)
    # Nothing that would have been allowed is left out.
    for sharer in range(len(windows)):
        for owner in range(sharer):
            with pytest.raises(ValueError, match="layer"):
                SharingPlan(len(windows), (*entries, SharingEntry(sharer, owner))).check_kinds(geometry)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_owner_never_becomes_a_sharer(name: str, architecture: str, dense_of: Dense, setting_of: Setting) -> None:
    _, dense = dense_of(architecture)
    found = SMALL[name].search(setting_of(dense, 3, 16, depth=2))
    plan = SharingPlan(dense.geometry.layer_count, tuple(one.entry for one in found))
    plan.check_kinds(dense.geometry)
    assert plan.max_depth == 2
    assert all(plan.sources(2)[source] == source for source in plan.sources(2))


@pytest.mark.parametrize("name", SMALL)
def test_too_few_candidates_are_an_error_that_says_how_many_were_found(
    name: str, dense_of: Dense, setting_of: Setting
) -> None:
    _, dense = dense_of("gemma2")  # six layers of two kinds: one owner of each kind remains
    with pytest.raises(SearchError, match=r"5 shared layers asked for, but only [1-4] acceptable entries found"):
        SMALL[name].search(setting_of(dense, 3, 16, depth=5))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("samples", "tokens"), [(2, 16), (3, 15), (4, 16)])
def test_samples_of_another_number_or_length_are_an_error(
    name: str, samples: int, tokens: int, dense_of: Dense, setting_of: Setting
) -> None:
    _, dense = dense_of("llama")
    with pytest.raises(SearchError, match="needs 3 samples of 16 tokens"):
        SMALL[name].search(setting_of(dense, samples, tokens, depth=1))


@pytest.mark.parametrize("name", SMALL)
def test_a_search_repeats_itself_and_its_shallower_plans_are_prefixes(
    name: str, dense_of: Dense, setting_of: Setting
) -> None:
    _, dense = dense_of("llama")
    deep = SMALL[name].search(setting_of(dense, 3, 16, depth=3))
    assert SMALL[name].search(setting_of(dense, 3, 16, depth=3)) == deep
    if name != "output-aware":  # whose shallow entries may be chosen for the sake of deeper ones
        assert SMALL[name].search(setting_of(dense, 3, 16, depth=2)) == deep[:2]


@pytest.mark.parametrize(("name", "last"), [("paper", True), ("similar", False)])
def test_ranked_walks_start_at_the_most_and_the_least_distant_averages(
    name: str, last: bool, dense_of: Dense, setting_of: Setting
) -> None:
    model, dense = dense_of("qwen3")
    setting = setting_of(dense, 3, 16, depth=1)
    found = SMALL[name].search(setting)
    averages = averaged_kv(model, setting.tokens)
    distance = {
        (sharer, owner): float(
            (averages[sharer][0] - averages[owner][0]).norm() / 2
            + (averages[sharer][1] - averages[owner][1]).norm() / 2
        )
        for sharer in range(dense.geometry.layer_count)
        for owner in range(sharer)
    }
    ranking = sorted(distance, key=lambda pair: distance[pair])
    assert pairs_of(found) == [ranking[-1 if last else 0]]
    assert found[0].score == pytest.approx(distance[ranking[-1 if last else 0]], rel=1e-4)


def test_the_random_walk_follows_its_seed(dense_of: Dense, setting_of: Setting) -> None:
    _, dense = dense_of("llama")
    plans = [pairs_of(SMALL["random"].search(setting_of(dense, 3, 16, depth=3, seed=seed))) for seed in range(8)]
    assert len({tuple(plan) for plan in plans}) > 4


def test_a_pair_that_turns_the_output_is_passed_over(dense_of: Dense, setting_of: Setting) -> None:
    model, dense = dense_of("llama")
    setting = setting_of(dense, 3, 16, depth=1)
    # An orthogonal head turns hidden states into logits of the same cosines.
    head = torch.linalg.qr(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))).Q
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    tokens, naive = setting.tokens, NaiveSharing(untouched(model))

    def cosine(pair: SharingEntry) -> float:
        sources = sources_of(6, [pair])
        exact, folded = (
            torch.stack([naive.logits(row, one) for row in tokens.tolist()]).flatten(1) for one in (range(6), sources)
        )
        return float(torch.cosine_similarity(exact, folded, dim=1).mean())

    walk = RankedWalk("paper", Order.DISSIMILAR_FIRST, samples=3, tokens=16, threshold=NO_THRESHOLD)
    cosines = {pair: cosine(pair) for pair in candidates(dense.geometry)}
    first = walk.search(setting)[0].entry
    threshold = cosines[first] + 1e-4
    assert threshold < max(cosines.values())
    stricter = dataclasses.replace(walk, threshold=threshold).search(setting)[0].entry
    assert stricter != first
    assert cosines[stricter] > threshold
    with pytest.raises(SearchError, match="only 0 acceptable"):
        dataclasses.replace(walk, threshold=1.0).search(setting)


def test_output_aware_takes_what_changes_the_distributions_least(dense_of: Dense, setting_of: Setting) -> None:
    model, dense = dense_of("llama")
    setting = setting_of(dense, 3, 16, depth=2)
    greedy = OutputAware(samples=3, tokens=16, beam=1, tries=100, first_tries=100, owners_per_sharer=100)
    found = greedy.search(setting)
    entries: list[SharingEntry] = []
    for one in found:
        tried = {
            entry: mean_kl(model, setting.tokens, sources_of(6, [*entries, entry]))
            for entry in candidates(dense.geometry, entries)
        }
        best = min(tried, key=lambda entry: tried[entry])
        assert one.entry == best
        assert one.score == pytest.approx(tried[best], rel=1e-3)
        entries.append(best)


def test_a_wide_beam_is_never_worse_than_greedy(dense_of: Dense, setting_of: Setting) -> None:
    _, dense = dense_of("qwen3")
    setting = setting_of(dense, 3, 16, depth=3)
    every = {"tries": 100, "first_tries": 100, "owners_per_sharer": 100}
    greedy, wide = (
        OutputAware(samples=3, tokens=16, beam=beam, **every).search(setting)[-1].score for beam in (1, 200)
    )
    assert wide <= greedy


@pytest.mark.parametrize("name", SMALL)
def test_a_search_says_how_far_it_is(name: str, dense_of: Dense, setting_of: Setting) -> None:
    _, dense = dense_of("llama")
    shares: list[float] = []
    setting = dataclasses.replace(setting_of(dense, 3, 16, depth=3), report=lambda done, _words: shares.append(done))
    SMALL[name].search(setting)
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < shares[-1] == 1.0
