"""A decode step against what it cannot do without.

    python benchmarks/floor.py [--rounds 7] [--batches 8 32 64] [--contexts 256 1024]

The floor is the best measured time of the model's matrix products alone, plus the KV bytes that the step reads over
the measured speed of a plain read. Each round measures products, reading and steps, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold_server.runtime import prepare_runtime

prepare_runtime()  # before anything imports torch

import torch

from decode_steps import DecodeSteps
from figures import RESULTS, Rounds, table_row, write_comparisons
from kvfold_server.models.loading import load_model
from kvfold_server.models.source import resolve_model
from plot import plot_comparisons
from step_floor import Linears, ReadSpeed

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS_A_ROUND = 5
KV_BYTES = 4 << 30


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "floor.json")
    parser.add_argument("--rounds", type=int, default=7, help="(7)")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--model", default="default", help="as of `kvfold serve` (default)")
    parser.add_argument("--attention-backend", default="native", help="(native)")
    return parser.parse_args()


def main() -> int:
    """Measures, prints a table, writes JSON and a picture."""
    arguments = parse_arguments()
    folder = resolve_model(arguments.model)
    linears = Linears(load_model(folder, torch.bfloat16, torch.device("cpu")))
    reading = ReadSpeed()
    steps = DecodeSteps(folder, arguments.attention_backend, KV_BYTES)
    found: list[Rounds] = []
    parts: list[dict[str, object]] = []
    for batch, context in product(arguments.batches, arguments.contexts):
        form = linears.best_form(batch)
        steps.fill(batch, context, arguments.rounds * STEPS_A_ROUND)
        rounds = Rounds(f"decode step, batch {batch}, context {context}", "ms", [], [])
        product_ms: list[float] = []
        reading_ms: list[float] = []
        for _ in range(arguments.rounds):
            product_ms.append(1e3 * _median([linears.seconds(form, batch) for _ in range(STEPS_A_ROUND)]))
            reading_ms.append(1e3 * steps.kv_bytes / reading.bytes_per_second())
            rounds.ours.append(1e3 * _median([steps.time_step() for _ in range(STEPS_A_ROUND)]))
            rounds.peer.append(product_ms[-1] + reading_ms[-1])
        steps.clear()
        found.append(rounds)
        parts.append(
            {
                "name": rounds.name,
                "products_ms": _median(product_ms),
                "kv_read_ms": _median(reading_ms),
                "products_form": form,
            }
        )
        sys.stdout.write(table_row(rounds.comparison()) + "\n")
        sys.stdout.flush()
    write_comparisons(arguments.output, found, {"floor": parts, "attention_backend": arguments.attention_backend})
    plot_comparisons(arguments.output)
    return 0


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    sys.exit(main())
