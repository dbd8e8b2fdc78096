"""Show how the KV cache memory of a server is used, once or live."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvfold_client import BlockState
from kvfold_client.cli.connection import add_connection_arguments, with_client
from kvfold_client.cli.report import bytes_text, share_text

if TYPE_CHECKING:
    import argparse

    from kvfold_client import Client, ModelMemory

_BAR_WIDTH = 40
_STYLES = {BlockState.PREFILL: "yellow", BlockState.DECODE: "green", BlockState.FREE: "bright_black"}
_MARKS = {BlockState.PREFILL: "▓", BlockState.DECODE: "█", BlockState.FREE: "░"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--model", metavar="NAME", default="", help="only this model (default: all)")
    parser.add_argument("--watch", action="store_true", help="go on showing it until Ctrl-C")
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=1.0, help="with --watch (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON, with --watch one line at a time")
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the pools, or shows them live."""
    return with_client(arguments, _watch if arguments.watch else _show, timeout=10)  # watching itself has no deadline


def _show(client: Client, arguments: argparse.Namespace) -> int:
    models = client.get_memory(model=arguments.model)
    if arguments.json:
        print(_json(models))
    else:
        Console().print(pool_table(models))
    return 0


def _watch(client: Client, arguments: argparse.Namespace) -> int:
    with client.watch_memory(model=arguments.model, interval=arguments.interval) as stream:
        if arguments.json:
            for models in stream:
                print(_json(models), flush=True)
            return 0
        console = Console()
        with Live(console=console, auto_refresh=False) as live:
            for models in stream:
                live.update(pool_table(models), refresh=True)
    return 0


def pool_table(models: tuple[ModelMemory, ...]) -> Table:
    """One row a model: how its pool is used, by whom, and what folding saves."""
    table = Table(title="KV cache pools", title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("pool")
    table.add_column("requests")
    table.add_column("KV held", justify="right")
    table.add_column("at depth 0", justify="right")
    table.add_column("saved", justify="right")
    for model in models:
        if not model.ready:
            table.add_row(model.model, Text("its engine restarts", style="yellow"))
            continue
        saved = max(model.kv_bytes_saved, 0)  # below zero are only partial last pages
        table.add_row(
            model.model,
            Group(_bar(model), _bar_text(model)),
            f"{model.running_requests} running\n{model.waiting_requests} waiting",
            bytes_text(model.kv_bytes_held),
            bytes_text(model.kv_bytes_full),
            f"{bytes_text(saved)}\n{share_text(saved, model.kv_bytes_full)}",
        )
    return table


def _bar(model: ModelMemory) -> Text:
    """The pool as a bar: decode, prefill, free."""
    bar = Text()
    decode, prefill = (
        round(_BAR_WIDTH * model.state_bytes.get(state, 0) / model.pool_bytes) if model.pool_bytes else 0
        for state in (BlockState.DECODE, BlockState.PREFILL)
    )
    widths = {
        BlockState.DECODE: decode,
        BlockState.PREFILL: prefill,
        BlockState.FREE: max(_BAR_WIDTH - decode - prefill, 0),
    }
    for state, width in widths.items():
        bar.append(_MARKS[state] * width, style=_STYLES[state])
    return bar


def _bar_text(model: ModelMemory) -> Text:
    used = model.pool_bytes - model.state_bytes.get(BlockState.FREE, 0)
    return Text.assemble(
        f"{bytes_text(used)} of {bytes_text(model.pool_bytes)} ({share_text(used, model.pool_bytes)}): ",
        ("decode", _STYLES[BlockState.DECODE]),
        " ",
        ("prefill", _STYLES[BlockState.PREFILL]),
    )


def _json(models: tuple[ModelMemory, ...]) -> str:
    return json.dumps([_plain(asdict(model)) for model in models])


def _plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Enums by their value, also as keys."""
    if isinstance(value, dict):
        return {key.value if isinstance(key, Enum) else key: _plain(entry) for key, entry in value.items()}
    return value
