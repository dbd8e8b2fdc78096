from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvfold_scheduler.scheduler import Admission, Scheduler, SchedulerLimits
from kvfold_scheduler.sequence import SequenceId, SequenceRequest
from kvfold_scheduler.step_plan import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable

NOTHING_STOPPED = StepResult(frozenset())


def planned(driver: object) -> list[int]:
    """The sequences that take part in the next step."""
    return [chunk.sequence_id for chunk in driver.step().chunks]


def test_the_largest_request_that_fits_alone_runs_to_its_end(driver_of: Callable) -> None:
    # 33 tokens and 16 new ones, of which the last is never computed: 48 tokens, 3 blocks in each of 4 layers.
    driver = driver_of(12)
    assert driver.add(1, prompt=33, new=17) is Admission.TOO_LARGE
    assert driver.add(1, prompt=33, new=16) is Admission.WAITING
    driver.run(16)
    assert not driver.scheduler.has_work


def test_sharing_lets_a_larger_request_in(driver_of: Callable) -> None:
    driver = driver_of(12)
    assert driver.add(1, prompt=80, new=17, depth=1) is Admission.TOO_LARGE
    assert driver.add(1, prompt=80, new=17, depth=2) is Admission.WAITING


def test_a_sliding_model_serves_requests_larger_than_its_pool_could_hold_whole(
    geometry_of: Callable, plan_of: Callable
) -> None:
    limits = SchedulerLimits(max_running=1, max_waiting=1, step_tokens=16)
    # A window of 20 and a chunk of 16: 35 tokens, at most 4 blocks in each layer; 200 tokens whole would be 13.
    for blocks, admission in ((7, Admission.TOO_LARGE), (8, Admission.WAITING)):
        scheduler = Scheduler(geometry_of(20, 20), plan_of(2), blocks, 256, limits)
        assert scheduler.add(SequenceRequest(SequenceId(1), 150, 50, 0)) is admission
    steps = 0
    while scheduler.has_work:
        scheduler.commit(scheduler.step(), NOTHING_STOPPED)
        scheduler.check_integrity()
        steps += 1
    assert steps == 10 + 49


def test_the_queue_is_bounded_and_running_sequences_do_not_count(driver_of: Callable) -> None:
    driver = driver_of(100, max_running=2, max_waiting=3)
    assert [driver.add(number, 4, 4) for number in range(4)] == [Admission.WAITING] * 3 + [Admission.QUEUE_FULL]
    driver.step()
    assert [driver.add(number, 4, 4) for number in range(10, 13)] == [Admission.WAITING] * 2 + [Admission.QUEUE_FULL]


def test_a_refused_sequence_leaves_nothing_behind(driver_of: Callable) -> None:
    driver = driver_of(12, max_waiting=1)
    assert driver.add(1, prompt=100, new=17) is Admission.TOO_LARGE
    assert not driver.scheduler.has_work
    driver.add(2, 4, 4)
    assert driver.add(3, 4, 4) is Admission.QUEUE_FULL
    assert driver.scheduler.cancel(SequenceId(3)) is None


@pytest.mark.parametrize(
    ("prompt", "new", "depth", "reason"),
    [
        (0, 1, 0, "at least one prompt token"),
        (1, 0, 0, "generates at least one"),
        (200, 57, 0, "context of 256"),
        (1, 1, 3, "depths 0 to 2"),
        (1, 1, -1, "depths 0 to 2"),
    ],
)
def test_numbers_out_of_range_are_refused(driver_of: Callable, prompt: int, new: int, depth: int, reason: str) -> None:
    driver = driver_of(100)
    with pytest.raises(ValueError, match=reason):
        driver.add(1, prompt, new, depth)
    assert not driver.scheduler.has_work


def test_an_id_in_use_is_refused_and_free_again_after_the_end(driver_of: Callable) -> None:
    driver = driver_of(100)
    driver.add(1, 4, 4)
    with pytest.raises(ValueError, match="exists already"):
        driver.add(1, 4, 4)
    driver.run(4)
    assert driver.add(1, 4, 4) is Admission.WAITING


def test_a_batch_without_room_for_a_token_each_is_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens"):
        SchedulerLimits(max_running=8, step_tokens=7)
    with pytest.raises(ValueError, match="at least one sequence"):
        SchedulerLimits(max_waiting=0)


def test_first_come_first_served_even_if_a_later_one_would_fit(driver_of: Callable) -> None:
    driver = driver_of(20)
    driver.add(1, prompt=16, new=33)  # holds 4 blocks, may soon hold 8
    driver.add(2, prompt=64, new=1)  # needs 16
    driver.add(3, prompt=4, new=4)  # needs 4
    assert planned(driver) == [1]
    assert planned(driver) == [1]
    driver.scheduler.cancel(SequenceId(2))
    assert planned(driver) == [1, 3]


def test_rows_bound_the_running_sequences(driver_of: Callable) -> None:
    driver = driver_of(100, max_running=2)
    for number in range(4):
        driver.add(number, prompt=4, new=2)
    assert [planned(driver) for _ in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_nobody_is_admitted_on_blocks_that_a_running_prompt_still_needs(driver_of: Callable) -> None:
    driver = driver_of(48)
    driver.add(1, prompt=160, new=1)  # 40 blocks in 3 steps; the first takes 16
    driver.add(2, prompt=40, new=1)  # 12 blocks: free for now, but promised
    assert [planned(driver) for _ in range(4)] == [[1], [1], [1], [2]]


def test_nobody_is_admitted_on_blocks_that_running_answers_need_next(driver_of: Callable) -> None:
    driver = driver_of(16)
    driver.add(1, prompt=16, new=17)  # 4 blocks, 8 as soon as it decodes
    driver.add(2, prompt=16, new=17)  # the same
    driver.add(3, prompt=1, new=1)  # 4 blocks; 8 are free now
    assert planned(driver) == [1, 2]
    assert driver.scheduler.pool.free_count == 8
    assert [planned(driver) for _ in range(16)] == [[1, 2]] * 16
    assert planned(driver) == [3]
