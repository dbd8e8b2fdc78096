"""Measure the quality of a sharing depth, or of int8 weights, or of both, through the engine's own path."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold_server.commands.engine_arguments import CommandError, add_engine_arguments, engine_options, reporting_errors

if TYPE_CHECKING:
    import argparse

    from kvfold_server.calibration.evaluation import Evaluation, Protocol


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_engine_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to score, used as it is")
    parser.add_argument(
        "--shared-layers", type=int, default=0, metavar="N", help="the sharing depth (default 0: exact)"
    )
    parser.add_argument("--prefix", type=int, default=768, metavar="TOKENS", help="tokens before the scored ones (768)")
    parser.add_argument(
        "--continue", dest="continuation", type=int, default=256, metavar="TOKENS", help="scored tokens (256)"
    )
    parser.add_argument(
        "--windows", type=int, default=64, metavar="N", help="windows, evenly spaced over the text (64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


@reporting_errors
def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    text = _read(arguments.text)

    from rich.console import Console
    from rich.progress import Progress

    from kvfold_server.calibration.evaluation import Protocol, cut_windows, evaluate
    from kvfold_server.engine.factory import build_engine
    from kvfold_server.text.tokenizer import Tokenizer

    try:
        protocol = Protocol(arguments.prefix, arguments.continuation, arguments.windows)
    except ValueError as error:
        raise CommandError(str(error)) from error
    options = engine_options(arguments)
    engine = build_engine(options)
    exact_engine = engine if options.weights == "dtype" else build_engine(dataclasses.replace(options, weights="dtype"))
    if protocol.window_tokens > engine.info.context_length:
        raise CommandError(
            f"a window has {protocol.window_tokens} tokens, the model's context {engine.info.context_length}"
        )
    if not 0 <= arguments.shared_layers <= engine.info.plan.max_depth:
        raise CommandError(f"the model's sharing plan has depths 0 to {engine.info.plan.max_depth}")
    try:
        tokens = Tokenizer.load(engine.info.tokenizer_folder).encode(text, add_special_tokens=False)
        windows = cut_windows(tokens, protocol)
    except ValueError as error:
        raise CommandError(f"{arguments.text}: {error}") from error
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("windows", total=len(windows))
        evaluation = evaluate(
            engine,
            windows,
            protocol,
            arguments.shared_layers,
            lambda done: progress.update(task, completed=done),
            exact_engine=exact_engine,
        )
    print_evaluation(evaluation, protocol, arguments.shared_layers, engine.info.weights, as_json=arguments.json)
    return 0


def print_evaluation(
    evaluation: Evaluation, protocol: Protocol, shared_layers: int, weights: str, *, as_json: bool
) -> None:
    """Writes the result to standard output, for a program or for a person."""
    quality = evaluation.quality
    if as_json:
        report = {
            "shared_layers": shared_layers,
            "weights": weights,
            **dataclasses.asdict(protocol),
            "windows": evaluation.windows,
            **dataclasses.asdict(quality),
            "kv_bytes_per_token": evaluation.kv_bytes_per_token,
            "kv_bytes_per_token_exact": evaluation.kv_bytes_per_token_exact,
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    saved = 1 - evaluation.kv_bytes_per_token / evaluation.kv_bytes_per_token_exact
    sys.stdout.write(
        f"{shared_layers} shared layers, weights in {weights}, {evaluation.windows} windows of "
        f"{protocol.prefix} + {protocol.continuation} tokens\n"
        f"perplexity       {quality.perplexity:.3f} (exact {quality.perplexity_exact:.3f})\n"
        f"quality cost     {quality.quality_cost:.2%} (95% interval {quality.quality_cost_low:.2%} to "
        f"{quality.quality_cost_high:.2%})\n"
        f"KL               {quality.kl:.5f} nats per token\n"
        f"top-1 agreement  {quality.top1_agreement:.2%}\n"
        f"KV per token     {evaluation.kv_bytes_per_token:,.0f} bytes "
        f"(exact {evaluation.kv_bytes_per_token_exact:,.0f}, saved {saved:.1%})\n"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text (byte {error.start})") from error
