"""Talk to a model; each answer shows the KV bytes that sharing saved.

In the conversation, /depth N changes how many layers share KV, /clear begins anew, and /quit (or Ctrl-D) ends.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from kvfold_client import ChatMessage, KvfoldError, UnavailableError
from kvfold_client.cli.answer_clock import AnswerClock
from kvfold_client.cli.connection import add_connection_arguments, explain, with_client
from kvfold_client.cli.generate import add_generation_arguments, generation_options
from kvfold_client.cli.report import answer_text

if TYPE_CHECKING:
    import argparse

    from kvfold_client import Client, GenerationOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand above the conversation")
    add_generation_arguments(parser)
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reads messages until the input ends."""
    return with_client(arguments, _chat, arguments.timeout)


def _chat(client: Client, arguments: argparse.Namespace) -> int:
    options = generation_options(arguments)
    model = client.get_model(model=options.get("model", ""))  # also finds out at once whether a server is there
    conversation = _Conversation(client, options, arguments.system, arguments.server)
    depth = len(model.plan.entries) if model.plan else 0
    console = conversation.console
    console.print(f"[bold]{model.name}[/] [dim]/depth N (0 to {depth}), /clear, /quit[/]", highlight=False)
    while True:
        try:
            line = console.input("[bold cyan]you[/] " if sys.stdin.isatty() else "").strip()
        except EOFError:
            console.print()  # the shell's prompt belongs on a line of its own
            return 0
        if line in {"/quit", "/exit"}:
            return 0
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/depth"):
            conversation.change_depth(line.removeprefix("/depth").strip())
        elif line:
            conversation.say(line)


class _Conversation:
    """The messages so far, and how to answer the next one."""

    def __init__(self, client: Client, options: GenerationOptions, system: str | None, server: str) -> None:
        self.console = Console()
        self._client = client
        self._options = options
        self._server = server
        self._start = [ChatMessage("system", system)] if system else []
        self._messages = list(self._start)

    def clear(self) -> None:
        """Forgets all but the system's instructions."""
        self._messages = list(self._start)

    def change_depth(self, text: str) -> None:
        """Sets how many layers share KV from the next answer on."""
        if text.isdecimal():
            self._options["shared_layers"] = int(text)
        else:
            self.console.print("[yellow]/depth needs a number, such as /depth 4[/]")

    def say(self, line: str) -> None:
        """Sends a message and prints the answer as it comes. One that fails, or that Ctrl-C ends, is forgotten."""
        messages = [*self._messages, ChatMessage("user", line)]
        clock = AnswerClock()
        answer = ""
        try:
            with self._client.stream(messages, **self._options) as stream:
                for chunk in stream:
                    clock.see(chunk)
                    answer += chunk.text
                    self.console.out(chunk.text, end="", highlight=False)
        except KeyboardInterrupt:
            self.console.print("\n[dim]stopped[/]")
            return
        except UnavailableError:
            raise
        except KvfoldError as error:
            self.console.print(explain(error, self._server), style="red", markup=False, highlight=False, soft_wrap=True)
            return
        self._messages = [*messages, ChatMessage("assistant", answer)]
        self.console.print(f"\n[dim]{answer_text(clock)}[/]\n", highlight=False, soft_wrap=True)
