from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_scheduler.sequence import SequenceId

if TYPE_CHECKING:
    from collections.abc import Callable


def two_that_outgrow_the_pool(driver_of: Callable) -> object:
    """Two sequences of 4 blocks for every 16 tokens in a pool of 20 blocks; after 17 steps both need a third."""
    driver = driver_of(20)
    driver.add(1, prompt=16, new=49)
    driver.add(2, prompt=16, new=33)
    driver.run(17)
    assert driver.scheduler.use().running == 2
    assert driver.scheduler.pool.free_count == 4
    return driver


def test_the_last_arrival_gives_way_and_keeps_its_answer(driver_of: Callable) -> None:
    driver = two_that_outgrow_the_pool(driver_of)
    plan = driver.step()
    assert [(chunk.sequence_id, chunk.start) for chunk in plan.chunks] == [(1, 32)]
    report = driver.scheduler.report(SequenceId(2))
    assert (report.preemptions, report.kv_bytes_held, report.kv_bytes_full) == (1, 0, 0)
    assert report.kv_bytes_held_peak == 8 * 4096
    while not any(chunk.sequence_id == 2 for chunk in plan.chunks):
        plan = driver.step()
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.count, chunk.samples) == (0, 16 + 17, True), "prompt and answer so far, in one chunk"


def test_a_preempted_sequence_comes_before_those_that_never_ran(driver_of: Callable) -> None:
    driver = two_that_outgrow_the_pool(driver_of)
    driver.add(3, prompt=1, new=1)
    driver.step()
    assert driver.scheduler.use().waiting == 2
    driver.scheduler.cancel(SequenceId(1))
    assert [chunk.sequence_id for chunk in driver.step().chunks] == [2, 3]


def test_the_first_sequence_never_gives_way(driver_of: Callable) -> None:
    driver = driver_of(40)
    driver.add(0, prompt=100, new=60)  # all 40 blocks in the end
    for number in range(1, 8):
        driver.add(number, prompt=8, new=100)
    for _ in range(61):
        plan = driver.step()
        assert 0 in {chunk.sequence_id for chunk in plan.chunks}
    assert driver.scheduler.fail(SequenceId(0)) is None, "it has ended, without a preemption"
