"""How the time of a decode step grows with the batch, the context and the sharing depth.

    python benchmarks/growth.py [--rounds 7] [-o FILE]

Each point stands beside its floor: the model's matrix products alone, plus the KV bytes over the speed of a plain
read. A step that grows faster than its floor has work in it that the arithmetic does not explain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kvfold_server.runtime import prepare_runtime

prepare_runtime()  # before anything imports torch

import torch

from decode_steps import DecodeSteps
from figures import RESULTS, machine
from kvfold_server.models.loading import load_model
from kvfold_server.models.source import resolve_model
from plot import plot_growth
from step_floor import Linears, ReadSpeed

KV_BYTES = 4 << 30
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXT_BATCH = 4
DEPTH_BATCH = 32
SHORT_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Point:
    """Step times in milliseconds at one value of what varies, and the floor there."""

    value: int
    step_ms_median: float
    step_ms_min: float
    step_ms_max: float
    floor_ms: float


class Growth:
    """Measures points one by one."""

    def __init__(self, folder: Path, attention_backend: str, rounds: int) -> None:
        self._linears = Linears(load_model(folder, torch.bfloat16, torch.device("cpu")))
        self._reading = ReadSpeed()
        self._steps = DecodeSteps(folder, attention_backend, KV_BYTES)
        self._rounds = rounds

    @property
    def depths(self) -> list[int]:
        """Every other depth of the plan."""
        return list(range(0, self._steps.engine.info.plan.max_depth + 1, 2))

    def point(self, value: int, batch: int, context: int, depth: int = 0) -> Point:
        """The step with that batch, context and depth."""
        form = self._linears.best_form(batch)
        self._steps.fill(batch, context, self._rounds, depth)
        times: list[float] = []
        floors: list[float] = []
        for _ in range(self._rounds):
            read_s = self._steps.kv_bytes / self._reading.bytes_per_second()
            floors.append(1e3 * (self._linears.seconds(form, batch) + read_s))
            times.append(1e3 * self._steps.time_step())
        self._steps.clear()
        point = Point(value, statistics.median(times), min(times), max(times), statistics.median(floors))
        sys.stderr.write(f"batch {batch}, context {context}, depth {depth}: {point}\n")
        return point


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each point (7)")
    parser.add_argument("--model", default="default", help="as of `kvfold serve` (default)")
    parser.add_argument("--attention-backend", default="native", help="(native)")
    return parser.parse_args()


def main() -> int:
    """Measures, writes JSON and a picture."""
    arguments = parse_arguments()
    growth = Growth(resolve_model(arguments.model), arguments.attention_backend, arguments.rounds)
    series = [
        {
            "title": f"context {SHORT_CONTEXT}",
            "variable": "batch",
            "points": [asdict(growth.point(batch, batch, SHORT_CONTEXT)) for batch in BATCHES],
        },
        {
            "title": f"batch {CONTEXT_BATCH}",
            "variable": "context",
            "points": [asdict(growth.point(context, CONTEXT_BATCH, context)) for context in CONTEXTS],
        },
        {
            "title": f"batch {DEPTH_BATCH}, context {SHORT_CONTEXT}",
            "variable": "shared layers",
            "points": [asdict(growth.point(depth, DEPTH_BATCH, SHORT_CONTEXT, depth)) for depth in growth.depths],
        },
    ]
    document = {"growth": series, "attention_backend": arguments.attention_backend, "machine": machine()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    plot_growth(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
