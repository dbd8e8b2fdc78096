"""What a benchmark run yields."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` requests at once, each of `prompt_tokens`, generating exactly `new_tokens`."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of a workload. Times are in seconds; those that cannot be seen from outside are None.

    `front_end_cpu_s` is the processor time that a server's front end used, the engine's not counted.
    """

    name: str
    workload: Workload
    seconds: float
    ttft_p50_s: float | None = None
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    front_end_cpu_s: float | None = None

    @property
    def tokens(self) -> int:
        """Generated tokens of all requests."""
        return self.workload.batch * self.workload.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests over the time from the first submission to the last token."""
        return self.tokens / self.seconds

    @property
    def front_end_cpu_s_per_1000_tokens(self) -> float | None:
        """What a token costs the front end, a thousand times, its share of its request's validation included."""
        return None if self.front_end_cpu_s is None else self.front_end_cpu_s * 1000 / self.tokens


def measured(name: str, workload: Workload, start: float, token_times: Sequence[Sequence[float]]) -> Measurement:
    """A measurement from the moments (of one clock) at which each request's tokens arrived."""
    gaps = sorted(later - earlier for times in token_times for earlier, later in pairwise(times))
    return Measurement(
        name=name,
        workload=workload,
        seconds=max(times[-1] for times in token_times) - start,
        ttft_p50_s=statistics.median(times[0] - start for times in token_times),
        itl_p50_s=quantile(gaps, 0.5) if gaps else None,
        itl_p99_s=quantile(gaps, 0.99) if gaps else None,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median_run(runs: Sequence[Measurement]) -> Measurement:
    """The run whose time is the median of several of the same workload."""
    return sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
