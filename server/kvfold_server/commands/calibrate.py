"""Search a sharing plan for a model, measure each depth on text that the search did not see, and write a plan file.

Without --text the model writes the text itself, so no data set is needed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold_server.commands.engine_arguments import CommandError, reporting_errors

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from rich.progress import Progress, TaskID
    from transformers import PreTrainedModel

    from kvfold_server.sharing.calibrate import CalibrationText, Subject, Task
    from kvfold_server.sharing.fingerprint import ModelFingerprint
    from kvfold_server.sharing.plan_file import PlanFile

STRATEGY_NAMES = ("output-aware", "paper", "similar", "random")
"""The names of the registry, which brings torch along and is imported when the command runs."""

DEFAULT_SHARE = 0.4
"""Of the layers: deeper plans cost more than the memory is worth on every model that we measured."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "model", nargs="?", default="default", help='"default", a folder, a GGUF file or a hub id (default: default)'
    )
    parser.add_argument(
        "--strategy",
        choices=(*STRATEGY_NAMES, "all"),
        default="output-aware",
        help="how layers are chosen; paper is KVSharer's rule; all compares them and keeps the best (output-aware)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the model writes it)")
    parser.add_argument("--depths", metavar="N,N,...", help="depths to measure (default: every depth of the plan)")
    parser.add_argument("--max-depth", type=int, metavar="N", help="layers to share (the deepest of --depths, or 40%%)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of generated text and random choices (0)")
    parser.add_argument("-o", "--output", type=Path, metavar="PLAN", help="the file to write (MODEL.plan.json)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--device", help="a torch device such as cpu or cuda (default: the best at hand)")


@reporting_errors
def run(arguments: argparse.Namespace) -> int:
    """Searches, measures, writes, and prints what was measured."""
    asked_depths = _numbers(arguments.depths) if arguments.depths is not None else None
    if arguments.max_depth is not None and arguments.max_depth < 1:
        raise CommandError("--max-depth is at least 1")
    if asked_depths and arguments.max_depth is not None and max(asked_depths) > arguments.max_depth:
        raise CommandError(f"--depths asks for {max(asked_depths)}, beyond --max-depth {arguments.max_depth}")
    output = _output(arguments)

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from kvfold_server.engine.factory import choose_device
    from kvfold_server.models.loading import DTYPES, load_model
    from kvfold_server.models.probe import probe_model
    from kvfold_server.models.source import resolve_model
    from kvfold_server.sharing.calibrate import Subject
    from kvfold_server.sharing.dense import DenseModel
    from kvfold_server.sharing.fingerprint import fingerprint

    device = choose_device(arguments.device)
    folder = resolve_model(arguments.model)
    model = load_model(folder, DTYPES[arguments.dtype], device)
    identity = fingerprint(folder)
    task = _task(asked_depths, arguments.max_depth, arguments.seed, identity.layer_count)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True),
    ) as bars:
        text = _text(arguments, folder, model, identity, bars)
        with DenseModel(model, probe_model(model)) as dense:
            subject = Subject(dense, identity, _model_name(arguments.model), text)
            plans = _search(arguments.strategy, subject, task, bars)
    chosen = plans[0]
    output.write_text(chosen.to_json(), encoding="utf-8")
    _print_table(plans)
    sys.stdout.write(f"{chosen.search.strategy} plan of {chosen.plan.max_depth} entries written to {output}\n")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise CommandError(f"--depths is a list of numbers from 1 such as 2,4,8, not {text}")
    return tuple(numbers)


def _output(arguments: argparse.Namespace) -> Path:
    """Where the plan goes, checked before a search of minutes rather than after it."""
    output: Path = arguments.output or Path(f"{_model_name(arguments.model)}.plan.json")
    if output.is_dir():
        raise CommandError(f"{output} is a folder; name a file for the plan")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise CommandError(f"{output} cannot be written")
    return output


def _model_name(model: str) -> str:
    """A short name for people: never a path, which means nothing elsewhere."""
    path = Path(model)
    return (path.stem if path.suffix.lower() == ".gguf" else path.name) or path.absolute().name


def _task(asked_depths: tuple[int, ...] | None, max_depth: int | None, seed: int, layer_count: int) -> Task:
    from kvfold_server.sharing.calibrate import Task

    depth = max_depth or (max(asked_depths) if asked_depths else max(1, int(layer_count * DEFAULT_SHARE)))
    if depth >= layer_count:
        raise CommandError(f"a model of {layer_count} layers can share {layer_count - 1} at most, not {depth}")
    return Task(depth, asked_depths or tuple(range(1, depth + 1)), seed)


def _text(
    arguments: argparse.Namespace, folder: Path, model: PreTrainedModel, identity: ModelFingerprint, bars: Progress
) -> CalibrationText:
    from kvfold_server.calibration.text import (
        CalibrationTextError,
        GeneratedTextParameters,
        generated_text,
        generated_text_name,
        text_from_file,
    )
    from kvfold_server.models.cache_folder import cache_root
    from kvfold_server.sharing.calibrate import HELD_OUT_WINDOWS, SEARCH_WINDOWS, WINDOW_TOKENS, CalibrationText
    from kvfold_server.text.tokenizer import Tokenizer

    windows = SEARCH_WINDOWS + HELD_OUT_WINDOWS
    context = getattr(model.config, "max_position_embeddings", WINDOW_TOKENS)
    if context < WINDOW_TOKENS:
        raise CommandError(f"calibration takes {WINDOW_TOKENS} tokens at a time; the model's context is {context}")
    if arguments.text is not None:
        try:
            tokens = text_from_file(arguments.text, Tokenizer.load(folder), windows, WINDOW_TOKENS)
        except CalibrationTextError as error:
            raise CommandError(str(error)) from error
        return CalibrationText(tokens.to(model.device), "file", arguments.text.name)
    parameters = GeneratedTextParameters(windows, WINDOW_TOKENS, arguments.seed)
    cache_file = cache_root() / "calibration" / generated_text_name(identity.weights_hash, model.dtype, parameters)
    bar = bars.add_task("writing calibration text", total=WINDOW_TOKENS, words="")
    tokens = generated_text(
        model, folder, parameters, cache_file=cache_file, progress=lambda done: bars.update(bar, completed=done)
    )
    return CalibrationText(tokens.to(model.device), "generated", seed=arguments.seed)


def _search(strategy: str, subject: Subject, task: Task, bars: Progress) -> list[PlanFile]:
    """The plans of the strategies asked for, best first. Raises CommandError if there is none."""
    from kvfold_server.sharing.calibrate import best_of, calibrate
    from kvfold_server.sharing.strategies.base import SearchError
    from kvfold_server.sharing.strategies.registry import STRATEGIES

    plans: list[PlanFile] = []
    for name in STRATEGY_NAMES if strategy == "all" else (strategy,):
        phases = {
            phase: bars.add_task(f"{words} ({name})", total=1.0, words="", start=False)
            for phase, words in (("search", "searching"), ("measure", "measuring"))
        }

        def report(phase: str, done: float, words: str, phases: dict[str, TaskID] = phases) -> None:
            bars.start_task(phases[phase])
            bars.update(phases[phase], completed=done, words=words)

        try:
            plans.append(calibrate(subject, STRATEGIES[name], task, report))
        except SearchError as error:
            if strategy != "all":
                raise CommandError(str(error)) from error
            bars.console.print(f"{name}: {error}")
    if not plans:
        raise CommandError("no strategy found a plan")
    best = best_of(plans)
    return [best, *(plan for plan in plans if plan is not best)]


def _print_table(plans: Sequence[PlanFile]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Quality on text that the search did not see")
    for heading in ("strategy", "shared layers", "KV bytes/token", "perplexity", "KL", "quality cost"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    table.add_row("", "0", "", f"{plans[0].measurement.perplexity_exact:.3f}", "0", "0.0%")
    for plan in plans:
        for depth in plan.depth_quality:
            table.add_row(
                plan.search.strategy,
                str(depth.shared_layers),
                f"{depth.kv_bytes_per_token:,}",
                f"{depth.perplexity:.3f}",
                f"{depth.kl:.4f}",
                f"{depth.quality_cost:.1%}",
            )
        table.add_section()
    Console().print(table)
