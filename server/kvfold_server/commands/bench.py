"""Measure speed: the engine alone, transformers' generate, and a server under load, in turn."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from kvfold_server.commands.engine_arguments import CommandError, add_engine_arguments, engine_options, reporting_errors

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from kvfold_server.bench.comparison import Outcome
    from kvfold_server.bench.measurement import Workload


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_engine_arguments(parser)
    parser.add_argument("--batches", default="1,8,32,64", metavar="N,N,...", help="requests at once (1,8,32,64)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, metavar="N", help="tokens that each request generates (64)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs of each, in turn; medians are shown (3)"
    )
    parser.add_argument(
        "--only", action="append", choices=("engine", "generate", "grpc"), help="measure only this; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


@reporting_errors
def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    workloads = _workloads(arguments)
    options = engine_options(arguments)
    wanted = arguments.only or ["engine", "generate", "grpc"]

    from contextlib import ExitStack

    from kvfold_server.bench.comparison import Subject, alternate
    from kvfold_server.bench.subjects import engine_subject, generate_subject, grpc_subject
    from kvfold_server.runtime import spare_loaded_objects

    makers = {"engine": engine_subject, "generate": generate_subject, "grpc": grpc_subject}
    with ExitStack() as stack:
        subjects: list[Subject] = [makers[name](options, stack) for name in wanted]
        spare_loaded_objects()
        outcomes = alternate(subjects, workloads, arguments.repeats, _report)
    if arguments.json:
        sys.stdout.write(json.dumps({"runs": [_as_json(outcome) for outcome in outcomes]}, indent=2) + "\n")
    else:
        _print_table(outcomes)
    return 0


def _report(line: str) -> None:
    sys.stderr.write(line + "\n")


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    from kvfold_server.bench.measurement import Workload

    try:
        batches = [int(part) for part in arguments.batches.split(",")]
    except ValueError:
        raise CommandError(f"--batches is a list of numbers such as 1,8,32, not {arguments.batches}") from None
    if min([*batches, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats]) < 1:
        raise CommandError("--batches, --prompt-tokens, --new-tokens and --repeats are at least 1")
    return [Workload(batch, arguments.prompt_tokens, arguments.new_tokens) for batch in batches]


def _as_json(outcome: Outcome) -> dict[str, object]:
    measurement = outcome.run
    return {
        "name": measurement.name,
        "batch": measurement.workload.batch,
        "prompt_tokens": measurement.workload.prompt_tokens,
        "new_tokens": measurement.workload.new_tokens,
        "tokens_per_second": measurement.tokens_per_second,
        "ttft_p50_s": measurement.ttft_p50_s,
        "itl_p50_s": measurement.itl_p50_s,
        "itl_p99_s": measurement.itl_p99_s,
        "ratio_to_first": outcome.ratio_to_first,
        "front_end_cpu_s_per_1000_tokens": measurement.front_end_cpu_s_per_1000_tokens,
    }


def _print_table(outcomes: Sequence[Outcome]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Medians; times in ms", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in (
        "requests,\ntokens",
        "tokens/s",
        "of the\nfirst",
        "first\ntoken",
        "between\ntokens",
        "p99",
        "front end,\n1,000 tokens",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        measurement, workload = outcome.run, outcome.run.workload
        times = (
            measurement.ttft_p50_s,
            measurement.itl_p50_s,
            measurement.itl_p99_s,
            measurement.front_end_cpu_s_per_1000_tokens,
        )
        table.add_row(
            measurement.name.rpartition("-")[2],
            f"{workload.batch} of {workload.prompt_tokens}+{workload.new_tokens}",
            f"{measurement.tokens_per_second:.1f}",
            f"{outcome.ratio_to_first:.2f}",
            *("" if seconds is None else f"{seconds * 1000:,.0f}" for seconds in times),
        )
    Console().print(table)
