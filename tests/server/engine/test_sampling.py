"""Oracle: transformers' own logits processors, and the distribution itself."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvfold_server.engine.logit_changes import change_logits
from kvfold_server.engine.random_stream import uniform
from kvfold_server.engine.sampling import SamplingRow, choose_tokens
from kvfold_server.generation.request import SamplingParameters

VOCABULARY = 3000


def make_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def row(answer: list[int] | None = None, **parameters: float) -> SamplingRow:
    return SamplingRow(SamplingParameters(**parameters), prompt=[1, 2, 3], answer=answer or [])  # type: ignore[arg-type]


def test_temperature_zero_chooses_the_most_probable_token() -> None:
    logits = make_logits(4)
    assert choose_tokens(logits, [row(temperature=0.0)] * 4) == logits.argmax(-1).tolist()


def test_the_same_seed_and_position_choose_the_same_token_whatever_the_batch() -> None:
    logits = make_logits(8)
    rows = [row(seed=index, answer=list(range(index))) for index in range(8)]
    together = choose_tokens(logits, rows)
    alone = [choose_tokens(logits[index : index + 1], rows[index : index + 1])[0] for index in range(8)]
    assert together == alone


def test_another_position_draws_another_number() -> None:
    assert len({uniform(7, position) for position in range(1000)}) == 1000
    assert sum(uniform(7, position) for position in range(1000)) / 1000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("parameters", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_filters_leave_the_distribution_of_transformers(
    parameters: dict[str, float], warpers: list[object], spread: float
) -> None:
    logits = make_logits(1, spread=spread)
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]
    draws = 4000
    rows = [row(seed=seed, **parameters) for seed in range(draws)]
    counts = torch.bincount(torch.tensor(choose_tokens(logits.expand(draws, -1), rows)), minlength=VOCABULARY)
    assert not counts[expected == 0].any(), "a filtered token was chosen"
    # Total variation distance of an empirical distribution: about sqrt(support / draws) for a wide one.
    support = int((expected > 1e-4).sum())
    assert (counts / draws - expected).abs().sum() / 2 < 0.6 * (support / draws) ** 0.5 + 0.02


def test_a_flat_distribution_under_top_p_still_reaches_past_the_first_candidates() -> None:
    logits = torch.zeros(1, VOCABULARY)
    rows = [row(seed=seed, top_p=0.99) for seed in range(300)]
    tokens = choose_tokens(logits.expand(300, -1), rows)
    assert len(set(tokens)) > 250


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = make_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 9, 9]]), logits.clone())
    changed = logits[0].clone()
    change_logits(changed, SamplingParameters(repetition_penalty=1.7), [1, 2, 3], [9, 9])
    assert torch.equal(changed, expected[0])


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    logits = make_logits(1)[0]
    changed = logits.clone()
    change_logits(changed, SamplingParameters(presence_penalty=0.5, frequency_penalty=0.25), [1, 2], [7, 7, 8])
    expected = logits.clone()
    expected[7] -= 0.5 + 0.25 * 2
    expected[8] -= 0.5 + 0.25
    assert torch.equal(changed, expected)


def test_a_logit_bias_can_force_a_token() -> None:
    logits = make_logits(1)
    assert choose_tokens(logits, [row(temperature=0.0, logit_bias={17: 100.0})]) == [17]


def test_the_given_logits_are_not_changed() -> None:
    logits = make_logits(2)
    before = logits.clone()
    choose_tokens(logits, [row(temperature=0.5, logit_bias={17: 100.0}, top_k=3), row(repetition_penalty=2.0)])
    assert torch.equal(logits, before)


def test_a_row_of_nan_has_no_token_and_its_neighbours_keep_theirs() -> None:
    logits = make_logits(3)
    logits[1, 5] = float("nan")
    tokens = choose_tokens(logits, [row(temperature=0.0)] * 3)
    assert tokens == [int(logits[0].argmax()), None, int(logits[2].argmax())]
