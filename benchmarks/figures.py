"""Figures of two subjects that took turns, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over the rounds of a run, and the median, least and greatest of the ratios ours / peer within a round.

    Ratios are None if the peer's figure was 0 in some round. The unit says which way is better: tokens/s up, s and ms
    down.
    """

    name: str
    ours: float
    peer: float
    ratio_median: float | None
    ratio_min: float | None
    ratio_max: float | None
    unit: str


@dataclass(frozen=True, slots=True)
class Rounds:
    """What was measured, round by round, before anything is condensed."""

    name: str
    unit: str
    ours: list[float]
    peer: list[float]

    def comparison(self) -> Comparison:
        """The rounds condensed. Raises ValueError if there are none, or not equally many."""
        if not self.ours or len(self.ours) != len(self.peer):
            raise ValueError(f"{self.name} has {len(self.ours)} rounds of ours and {len(self.peer)} of the peer's")
        ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True) if peer]
        known = len(ratios) == len(self.ours)
        return Comparison(
            name=self.name,
            ours=statistics.median(self.ours),
            peer=statistics.median(self.peer),
            ratio_median=statistics.median(ratios) if known else None,
            ratio_min=min(ratios) if known else None,
            ratio_max=max(ratios) if known else None,
            unit=self.unit,
        )


def write_comparisons(path: Path, rounds: Sequence[Rounds], about: Mapping[str, object]) -> None:
    """Writes the figures, what they were made of, the machine, and `about`."""
    document = {
        "comparisons": [asdict(entry.comparison()) for entry in rounds],
        "rounds": [asdict(entry) for entry in rounds],
        "machine": machine(),
        **about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def machine() -> dict[str, object]:
    """What the figures depend on, and how busy the machine has been besides."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table_row(comparison: Comparison) -> str:
    """One line for a person."""
    ratio = "no ratio"
    if comparison.ratio_median is not None:
        ratio = f"{comparison.ratio_median:.2f}x ({comparison.ratio_min:.2f} to {comparison.ratio_max:.2f})"
    return f"{comparison.name:44} {comparison.ours:10.4g} {comparison.peer:10.4g} {comparison.unit:9} {ratio}"
