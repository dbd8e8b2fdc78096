from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvfold_scheduler.sequence import FinishReason, Sequence, SequenceId, SequenceRequest, SequenceState
from kvfold_scheduler.step_plan import StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING_STOPPED = StepResult(frozenset())


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """(sequence, start, count, samples) of each chunk."""
    return [(chunk.sequence_id, chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]


def test_a_prompt_is_computed_in_chunks_and_the_last_one_samples(driver_of: Callable) -> None:
    driver = driver_of(100)
    driver.add(1, prompt=150, new=3)
    assert [shape(driver.step()) for _ in range(5)] == [
        [(1, 0, 64, False)],
        [(1, 64, 64, False)],
        [(1, 128, 22, True)],
        [(1, 150, 1, True)],
        [(1, 151, 1, True)],
    ]
    assert not driver.scheduler.has_work


def test_decoding_sequences_get_their_token_before_prompts_share_the_rest(driver_of: Callable) -> None:
    driver = driver_of(200)
    driver.add(1, prompt=10, new=9)
    driver.add(2, prompt=10, new=9)
    driver.step()
    driver.add(3, prompt=100, new=9)
    driver.add(4, prompt=100, new=9)
    assert shape(driver.step()) == [(1, 10, 1, True), (2, 10, 1, True), (3, 0, 62, False)]
    assert shape(driver.step()) == [(1, 11, 1, True), (2, 11, 1, True), (3, 62, 38, True), (4, 0, 24, False)]


def test_a_prompt_advances_however_many_decode(driver_of: Callable) -> None:
    driver = driver_of(200, max_running=8, step_tokens=8)
    for number in range(7):
        driver.add(number, prompt=1, new=50)
    driver.step()
    driver.add(7, prompt=5, new=1)
    assert [shape(driver.step())[-1] for _ in range(5)] == [(7, start, 1, start == 4) for start in range(5)]


def test_chunks_are_ordered_by_depth(driver_of: Callable) -> None:
    driver = driver_of(100)
    for number, depth in enumerate((2, 0, 1, 0, 2)):
        driver.add(number, prompt=4, new=4, depth=depth)
    for plan in (driver.step(), driver.step()):
        assert [(chunk.depth, chunk.sequence_id) for chunk in plan.chunks] == [(0, 1), (0, 3), (1, 2), (2, 0), (2, 4)]


def test_an_answer_ends_at_its_length(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    scheduler.add(SequenceRequest(SequenceId(1), 4, 2, 0))
    assert scheduler.commit(scheduler.step(), NOTHING_STOPPED) == ()
    (end,) = scheduler.commit(scheduler.step(), NOTHING_STOPPED)
    assert (end.sequence_id, end.reason) == (1, FinishReason.LENGTH)
    assert scheduler.pool.held_count == 0


def test_an_answer_ends_at_a_stop_token_even_with_the_last_token_allowed(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    scheduler.add(SequenceRequest(SequenceId(1), 4, 1, 0))
    (end,) = scheduler.commit(scheduler.step(), StepResult(frozenset({SequenceId(1)})))
    assert end.reason is FinishReason.STOPPED


def test_a_report_counts_blocks_held_and_bytes_at_depth_0(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    scheduler.add(SequenceRequest(SequenceId(1), 20, 2, 2))
    scheduler.commit(scheduler.step(), NOTHING_STOPPED)
    for report in (scheduler.report(SequenceId(1)), scheduler.commit(scheduler.step(), NOTHING_STOPPED)[0].report):
        assert report.shared_layers == 2
        assert report.kv_bytes_held == report.kv_bytes_held_peak == 2 * 2 * 4096
    assert report.kv_bytes_full == 21 * 4 * 256


@pytest.mark.parametrize("computed", [0, 64, 150, 151])
def test_a_cancelled_sequence_frees_its_blocks_at_once(driver_of: Callable, computed: int) -> None:
    driver = driver_of(100)
    driver.add(1, prompt=150, new=9)
    steps = {0: 0, 64: 1, 150: 3, 151: 4}[computed]
    driver.run(steps)
    assert driver.scheduler.report(SequenceId(1)).kv_bytes_full == computed * 1024
    end = driver.scheduler.cancel(SequenceId(1))
    assert end is not None
    assert end.reason is FinishReason.CANCELLED
    driver.scheduler.check_integrity()
    assert driver.scheduler.pool.held_count == 0
    assert not driver.scheduler.has_work
    assert driver.scheduler.cancel(SequenceId(1)) is None


def test_a_sequence_may_end_between_a_plan_and_its_commit(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    for number in range(3):
        scheduler.add(SequenceRequest(SequenceId(number), 4, 1, 0))
    plan = scheduler.step()
    assert scheduler.fail(SequenceId(0)) is not None
    assert scheduler.cancel(SequenceId(1)) is not None
    assert [end.sequence_id for end in scheduler.commit(plan, NOTHING_STOPPED)] == [2]
    assert not scheduler.has_work


def test_a_plan_that_is_not_committed_is_made_again(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    scheduler.add(SequenceRequest(SequenceId(1), 30, 5, 0))
    scheduler.add(SequenceRequest(SequenceId(2), 30, 5, 1))
    plan = scheduler.step()
    held = scheduler.pool.held_count
    assert scheduler.step() == plan
    scheduler.commit(plan.subset({SequenceId(2)}), NOTHING_STOPPED)
    assert shape(scheduler.step()) == [(1, 0, 30, True), (2, 30, 1, True)]
    assert scheduler.pool.held_count == held
    scheduler.check_integrity()


def test_a_plan_cannot_be_committed_twice(driver_of: Callable) -> None:
    scheduler = driver_of(100).scheduler
    for number in (1, 2):
        scheduler.add(SequenceRequest(SequenceId(number), 30, 5, 0))
    plan = scheduler.step()
    scheduler.commit(plan.subset({SequenceId(2)}), NOTHING_STOPPED)
    with pytest.raises(ValueError, match="sequence 2 is out of date"):
        scheduler.commit(plan, NOTHING_STOPPED)
    assert scheduler.report(SequenceId(1)).kv_bytes_full == 0, "a refused commit changes nothing"
    scheduler.check_integrity()


def test_use_adds_up_to_the_pool(driver_of: Callable) -> None:
    driver = driver_of(100)
    driver.add(1, prompt=10, new=9)
    driver.step()
    driver.add(2, prompt=100, new=9, depth=1)
    for number in range(3, 10):
        driver.add(number, prompt=10, new=9)
    driver.step()
    use = driver.scheduler.use()
    assert (use.decode_blocks, use.prefill_blocks) == (4, 4 * 3)
    assert use.free_blocks + use.decode_blocks + use.prefill_blocks == 100
    assert (use.running, use.waiting) == (2, 7)
    assert use.kv_bytes_full == (11 + 63) * 1024


def test_a_sequence_that_ended_cannot_run_again() -> None:
    sequence = Sequence(SequenceRequest(SequenceId(1), 1, 1, 0))
    sequence.finish()
    assert sequence.state is SequenceState.FINISHED
    for change in (sequence.give_way, sequence.finish):
        with pytest.raises(ValueError, match="cannot go from finished"):
            change()
