"""The evaluation: what the engine's own path finds is what a naive model computes."""

from __future__ import annotations

import math

import pytest
import torch
from support.engines import EnginePair, tiny_engine
from support.naive_sharing import NaiveSharing
from support.tiny_models import random_prompt, tiny_plan

from kvfold_server.calibration.evaluation import Evaluation, Protocol, cut_windows, evaluate

PROTOCOL = Protocol(prefix=45, continuation=30, windows=3)
DEPTH = 2


@pytest.fixture(scope="module")
def pair() -> EnginePair:
    """An engine whose steps cut every window into several chunks."""
    return tiny_engine()


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    return [list(window) for window in cut_windows(random_prompt(300, seed=5), PROTOCOL)]


@pytest.fixture(scope="module")
def evaluation(pair: EnginePair, windows: list[list[int]]) -> Evaluation:
    return evaluate(pair.engine, windows, PROTOCOL, DEPTH)


@pytest.fixture(scope="module")
def dense(pair: EnginePair, windows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact and folded log-probabilities [tokens, vocabulary] of all scored positions, and the tokens there."""
    plan = tiny_plan(pair.engine.info.geometry)
    oracle = NaiveSharing(pair.original)
    scored = slice(PROTOCOL.prefix - 1, -1)
    exact, folded = (
        torch.cat([oracle.logits(window, plan.sources(depth))[scored] for window in windows]).log_softmax(-1)
        for depth in (0, DEPTH)
    )
    targets = torch.tensor([token for window in windows for token in window[PROTOCOL.prefix :]])
    return exact, folded, targets


def test_perplexities_are_those_of_a_naive_model(
    evaluation: Evaluation, dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    exact, folded, targets = dense
    rows = torch.arange(len(targets))
    expected = [math.exp(-float(log[rows, targets].mean())) for log in (exact, folded)]
    found = [evaluation.quality.perplexity_exact, evaluation.quality.perplexity]
    assert found == pytest.approx(expected, rel=1e-4)


def test_kl_and_cost_are_those_of_a_naive_model(
    evaluation: Evaluation, dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    exact, folded, _ = dense
    kl = float((exact.exp() * (exact - folded)).sum(-1).mean())
    assert evaluation.quality.kl == pytest.approx(kl, rel=1e-4)
    assert evaluation.quality.quality_cost == pytest.approx(math.exp(kl) - 1, rel=1e-4)
    assert (
        evaluation.quality.quality_cost_low <= evaluation.quality.quality_cost <= evaluation.quality.quality_cost_high
    )


def test_agreement_is_the_share_of_equal_choices(
    evaluation: Evaluation, dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    exact, folded, _ = dense
    expected = float((exact.argmax(-1) == folded.argmax(-1)).float().mean())
    assert evaluation.quality.top1_agreement == pytest.approx(expected)


def test_bytes_are_those_of_whole_blocks(evaluation: Evaluation, pair: EnginePair) -> None:
    geometry = pair.engine.info.geometry
    tokens = PROTOCOL.window_tokens - 1
    a_layer = geometry.blocks_for(tokens) * geometry.block_bytes / tokens
    assert evaluation.kv_bytes_per_token_exact == pytest.approx(a_layer * geometry.layer_count)
    assert evaluation.kv_bytes_per_token == pytest.approx(a_layer * (geometry.layer_count - DEPTH))


def test_depth_0_costs_nothing(pair: EnginePair, windows: list[list[int]]) -> None:
    quality = evaluate(pair.engine, windows, PROTOCOL, 0).quality
    assert (quality.kl, quality.quality_cost, quality.top1_agreement) == (0.0, 0.0, 1.0)
    assert quality.perplexity == quality.perplexity_exact


def test_windows_are_spread_over_the_whole_text_and_do_not_overlap() -> None:
    found = cut_windows(range(1000), Protocol(prefix=60, continuation=40, windows=4))
    assert [(window[0], window[-1]) for window in found] == [(0, 99), (250, 349), (500, 599), (750, 849)]


def test_a_text_too_short_for_its_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="3 windows of 75 tokens need 225 tokens, the text has 224"):
        cut_windows(range(224), PROTOCOL)
