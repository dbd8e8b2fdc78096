"""Show how the KV cache memory of a server is used, once or live."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
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

_BAR_WIDTH = 24  # so that the table fits into 80 columns
_MARKS = {BlockState.DECODE: "█", BlockState.PREFILL: "▓", BlockState.FREE: "░"}
_STYLES = {BlockState.DECODE: "green", BlockState.PREFILL: "yellow", BlockState.FREE: "bright_black"}


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
    legend = Text("  ").join(Text(f"{_MARKS[state]} {state.value}", style=_STYLES[state]) for state in _MARKS)
    table = Table(title="KV cache pools", title_justify="left", title_style="bold", caption=legend, box=SIMPLE_HEAD)
    table.add_column("pool", no_wrap=True)
    table.add_column("requests", no_wrap=True)
    table.add_column("KV held", justify="right", no_wrap=True)
    table.add_column("at depth 0", justify="right", no_wrap=True)
    table.add_column("saved", justify="right", no_wrap=True)
    for model in models:
        name = Text(model.model, style="bold")
        if not model.ready:
            table.add_row(Group(name, Text("its engine restarts", style="yellow")))
            continue
        saved = max(model.kv_bytes_saved, 0)  # below zero are only partial last pages
        table.add_row(
            Group(name, _bar(model), _bar_text(model)),
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
        ceil(_BAR_WIDTH * model.state_bytes.get(state, 0) / max(model.pool_bytes, 1))  # a little is more than nothing
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


def _bar_text(model: ModelMemory) -> str:
    used = model.pool_bytes - model.state_bytes.get(BlockState.FREE, 0)
    return f"{share_text(used, model.pool_bytes)} of {bytes_text(model.pool_bytes)}"


def _json(models: tuple[ModelMemory, ...]) -> str:
    return json.dumps([_plain(asdict(model)) for model in models])


def _plain(value: Any) -> Any:  # noqa: ANN401  (any JSON value)
    """Enums by their value, also as keys."""
    if isinstance(value, dict):
        return {key.value if isinstance(key, Enum) else key: _plain(entry) for key, entry in value.items()}
    return value
