"""Several subjects on the same workloads, in turn, so that a machine whose speed drifts favours none."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold_server.bench.measurement import median_run

if TYPE_CHECKING:
    from kvfold_server.bench.measurement import Measurement, Workload

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can run a workload. `vocabulary_size` bounds the random tokens of its prompts."""

    run: Callable[[Workload, Prompts], Measurement]
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A subject's median run of a workload. `ratio_to_first` is the median, over all rounds, of its tokens per second
    over those of the first subject in that round: a machine whose speed drifts changes it less than either."""

    run: Measurement
    ratio_to_first: float


def alternate(
    subjects: Sequence[Subject], workloads: Sequence[Workload], repeats: int, report: Callable[[str], None]
) -> list[Outcome]:
    """The outcome of each subject on each workload, after one warm-up each. All subjects get the same prompts."""
    source = random.Random(0)  # noqa: S311 - prompts, not secrets
    vocabulary = min(subject.vocabulary_size for subject in subjects)

    def prompts(workload: Workload) -> Prompts:
        return [source.choices(range(vocabulary), k=workload.prompt_tokens) for _ in range(workload.batch)]

    for subject in subjects:
        subject.run(workloads[0], prompts(workloads[0]))
    outcomes: list[Outcome] = []
    for workload in workloads:
        runs: dict[int, list[Measurement]] = {index: [] for index in range(len(subjects))}
        for repeat in range(repeats):
            shared = prompts(workload)
            for index, subject in enumerate(subjects):
                measurement = subject.run(workload, shared)
                runs[index].append(measurement)
                report(
                    f"{measurement.name}, {workload.batch} requests, run {repeat + 1} of {repeats}: "
                    f"{measurement.tokens_per_second:.1f} tokens/s"
                )
        outcomes.extend(_outcome(found, runs[0]) for found in runs.values())
    return outcomes


def _outcome(runs: Sequence[Measurement], first: Sequence[Measurement]) -> Outcome:
    ratios = [run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, first, strict=True)]
    return Outcome(median_run(runs), statistics.median(ratios))
