"""Show what kvfold does: start a server, answer at several sharing depths, and compare memory, speed and quality."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from kvfold_client import AsyncClient, ChatMessage, KvfoldError
from kvfold_client.cli.answer_clock import AnswerClock
from kvfold_client.cli.connection import explain
from kvfold_client.cli.report import answer_text, bytes_text, share_text
from kvfold_client.cli.server_process import ServerFailedError, ServerProcess

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from kvfold_client import GenerationOptions, ModelDescription

_DEPTHS = (0, 4, 8)
_TIMEOUT_SECONDS = 300.0  # 16 answers at once on a busy machine; a hung server must still end the demo
_PASSAGE = (
    "The old harbour of Sandmere lies on a flat coast where two rivers meet the sea. For three hundred years its "
    "people have lived from salt. Each spring they open wooden gates and let the tide run over wide clay basins "
    "behind the dyke. Sun and wind do the rest: by late summer the water is gone, and a white crust is left, "
    "which is raked into heaps by hand. A good year gives four hundred tons; a wet one gives almost nothing, and "
    "then the town lives on what it has put aside. The salt is carried inland on narrow boats drawn by horses, "
    "because the roads over the marsh sink in winter. In return the boats bring grain, timber and letters. At the "
    "mouth of the larger river stands a round tower of red brick. Its lamp was lit for the first time after the "
    "storm of 1712, in which eleven boats were lost in one night. The keeper climbs ninety steps every evening "
    "and writes the weather of the day into a thick book. There are now forty of these books, and people who "
    "study the climate come from far away to read them. They say that the winters have become milder, and that "
    "the storms come later in the year than they did before."
)
_QUESTION = "Summarize this text in three sentences."
_CONCURRENT_QUESTIONS = (
    "What do the people of Sandmere live from?",
    "How is the salt made?",
    "How much salt does a good year give?",
    "What happens in a wet year?",
    "How is the salt carried inland?",
    "Why are the roads not used in winter?",
    "What do the boats bring in return?",
    "Where does the tower stand?",
    "Why was the lamp lit?",
    "How many steps does the keeper climb?",
    "What does the keeper write down?",
    "How many books are there now?",
    "Who comes to read the books?",
    "How have the winters changed?",
    "When do the storms come now?",
    "Give the text a title.",
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the table at the end; bytes and tokens are sums over its requests, seconds are wall time."""

    label: str
    kv_bytes_held: int
    kv_bytes_full: int
    tokens: int
    seconds: float
    first_token_seconds: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--model", default="default", help="what `kvfold serve --model` takes (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=64, help="the most tokens of an answer (default: 64)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns 1 if the server does not start or a request fails."""
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as with Ctrl-C, the server must be stopped before we go
        signal.signal(ending, signal.default_int_handler)
    console = Console(highlight=False)
    console.print(f"[bold]Starting the server[/]  [dim]kvfold serve --model {arguments.model}[/]")
    try:
        with ServerProcess(["--model", arguments.model, "--log-level", "WARNING"]) as server:
            try:
                asyncio.run(_show(server.address, arguments.max_tokens, console))
            except KvfoldError as error:
                print(f"kvfold demo: {explain(error, server.address)}", *server.last_lines, sep="\n", file=sys.stderr)
                return 1
    except ServerFailedError as error:
        print(f"kvfold demo: {error}", file=sys.stderr)
        return 1
    return 0


async def _show(address: str, max_tokens: int, console: Console) -> None:
    async with AsyncClient(address, timeout=_TIMEOUT_SECONDS) as client:
        model = await client.get_model()
        console.print(
            f"Serving [bold]{model.name}[/] at {address}: {len(model.layers)} layers,"
            f" {bytes_text(model.kv_bytes_per_token)} of KV a token, {model.dtype}\n"
        )
        deepest = len(model.plan.entries) if model.plan else 0
        depths = sorted({min(depth, deepest) for depth in _DEPTHS})
        if deepest == 0:
            console.print("[yellow]It has no sharing plan, so that only depth 0 is shown.[/]\n")
        await client.generate(
            _chat(_QUESTION), max_tokens=2
        )  # the first steps of a fresh engine are slower than others
        console.print(f"[bold cyan]you[/]  {_QUESTION}\n[dim]{_PASSAGE}[/]")
        rows = [await _stream_one(client, depth, max_tokens, console) for depth in depths]
        rows.append(await _run_concurrently(client, depths, max_tokens, console))
        console.print(_table(rows))
        console.print(_closing(model, depths), soft_wrap=True)


async def _stream_one(client: AsyncClient, depth: int, max_tokens: int, console: Console) -> _Row:
    console.print(f"\n[bold green]{_label(depth)}[/]")
    clock = AnswerClock()
    answer = Text()
    live = Live(answer, console=console, refresh_per_second=20) if console.is_terminal else nullcontext()
    with live:
        async with client.stream(_chat(_QUESTION), **_options(depth, max_tokens)) as stream:
            async for chunk in stream:
                clock.see(chunk)
                answer.append(chunk.text)
    if not console.is_terminal:
        console.print(answer, soft_wrap=True)
    console.print(f"[dim]{answer_text(clock)}[/]", soft_wrap=True)
    return _row(str(depth), [clock], clock.seconds)


async def _run_concurrently(client: AsyncClient, depths: Sequence[int], max_tokens: int, console: Console) -> _Row:
    count = len(_CONCURRENT_QUESTIONS)
    mixed = ", ".join(str(depth) for depth in depths)
    console.print(f"\n[bold]{count} requests at once, depths {mixed} in one batch[/]")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    whole = AnswerClock()
    with Progress(*columns, console=console, transient=True) as progress:
        tokens = progress.add_task("tokens", total=count * max_tokens)

        async def one(question: str, depth: int) -> AnswerClock:
            clock = AnswerClock()
            async with client.stream(_chat(question), **_options(depth, max_tokens)) as stream:
                async for chunk in stream:
                    clock.see(chunk)
                    whole.see(chunk)
                    progress.advance(tokens, len(chunk.token_ids))
            return clock

        requests = [one(question, depths[index % len(depths)]) for index, question in enumerate(_CONCURRENT_QUESTIONS)]
        clocks = await asyncio.gather(*requests)
    row = _row(f"{count} mixed", clocks, whole.seconds)
    console.print(f"[dim]{row.tokens} tokens in {row.seconds:.1f} s[/]\n")
    return row


def _chat(question: str) -> list[ChatMessage]:
    return [ChatMessage("user", f"{_PASSAGE}\n\n{question}")]


def _options(depth: int, max_tokens: int) -> GenerationOptions:
    """Greedy, so that every run shows the same."""
    return {"shared_layers": depth, "max_tokens": max_tokens, "temperature": 0}


def _row(label: str, clocks: Sequence[AnswerClock], seconds: float) -> _Row:
    first_tokens = sorted(clock.first_token_seconds for clock in clocks)
    return _Row(
        label=label,
        kv_bytes_held=sum(clock.finish.memory.kv_bytes_held for clock in clocks),
        kv_bytes_full=sum(clock.finish.memory.kv_bytes_full for clock in clocks),
        tokens=sum(clock.finish.usage.completion_tokens for clock in clocks),
        seconds=seconds,
        first_token_seconds=first_tokens[len(first_tokens) // 2],
    )


def _label(depth: int) -> str:
    return "depth 0 (exact)" if depth == 0 else f"depth {depth} ({depth} layers read another layer's KV)"


def _table(rows: Sequence[_Row]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="Depth 0 holds slightly more than full: last pages are rarely full.",
    )
    table.add_column("\ndepth", style="bold", no_wrap=True)
    columns: tuple[tuple[str, dict[str, Any]], ...] = (
        ("KV bytes\nheld", {}),
        ("KV bytes\nat depth 0", {}),
        ("bytes\nsaved", {"style": "green"}),
        ("\ntokens/s", {}),
        ("time to\n1st token", {}),
    )
    for name, style in columns:
        table.add_column(name, justify="right", no_wrap=True, **style)
    for row in rows:
        saved = row.kv_bytes_full - row.kv_bytes_held
        table.add_row(
            row.label,
            bytes_text(row.kv_bytes_held),
            bytes_text(row.kv_bytes_full),
            f"{bytes_text(saved)} ({share_text(saved, row.kv_bytes_full)})",
            f"{row.tokens / row.seconds:.1f}",
            f"{row.first_token_seconds:.2f} s",
        )
    return table


def _closing(model: ModelDescription, depths: Sequence[int]) -> str:
    """What the depths cost, as measured when the plan was made."""
    measured = {depth.shared_layers: depth for depth in model.plan.depths} if model.plan else {}
    costs = [
        f"{measured[depth].quality_cost:.0%} at depth {depth}" for depth in depths if depth > 0 and depth in measured
    ]
    if not costs:
        return "What sharing costs in quality has not been measured for this model: `kvfold calibrate` does that."
    return (
        "Sharing is not free: on text that the plan's search did not see, perplexity gets worse by"
        f" {' and '.join(costs)}."
    )
