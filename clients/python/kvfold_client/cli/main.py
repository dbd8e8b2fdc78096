"""The `kvfold` command: a shell around subcommands that packages register as entry points of `kvfold.commands`.

A command is a module whose docstring's first line is its help, with `configure(parser)`, which adds its arguments, and
`run(arguments) -> int`, which returns the exit code: 0, 1 if it failed, 2 if the user asked for what cannot be.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GROUP = "kvfold.commands"

_EXTRA_OF_PACKAGE = {"kvfold_client": "cli", "kvfold_server": "server"}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr."""

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong and exits with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `kvfold` with these arguments, by default those of the process. Returns the exit code."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        return 130  # what shells expect of a program that ends by Ctrl-C
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has enough. The interpreter's flush at exit must not say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if arguments and arguments[0] in commands:
        return _run_command(commands[arguments[0]], arguments[1:])
    parser = OneLineParser(
        prog="kvfold",
        usage="kvfold COMMAND ...",
        description="Text generation over gRPC that folds the KV cache when memory gets tight.",
        epilog=_list_of(commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvfold {version('kvfold')}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    command = parser.parse_known_args(arguments)[0].command
    if command is None:
        parser.error(f"name a command: {', '.join(sorted(commands))}")
    parser.error(f"there is no command {command!r}: choose from {', '.join(sorted(commands))}")
    return None


def _run_command(entry: EntryPoint, arguments: list[str]) -> int:
    try:
        command = importlib.import_module(entry.value)
        parser = OneLineParser(prog=f"kvfold {entry.name}", description=command.__doc__)
        command.configure(parser)
        return int(command.run(parser.parse_args(arguments)))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRA_OF_PACKAGE.get(entry.value.partition(".")[0])
        if extra is None or missing.startswith("kvfold"):
            raise  # a broken installation, not a smaller one
        print(f"kvfold {entry.name}: needs {missing}: pip install 'kvfold[{extra}]'", file=sys.stderr)
        return 2


def _list_of(commands: Mapping[str, EntryPoint]) -> str:
    """The commands and their help, read from the source: importing the modules would take seconds, or an extra."""
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:<{width}}  {_help_of(entry)}" for name, entry in sorted(commands.items())]
    return "\n".join(["commands:", *lines, "", "kvfold COMMAND --help tells the arguments of a command."])


def _help_of(entry: EntryPoint) -> str:
    spec = importlib.util.find_spec(entry.value)
    if spec is None or spec.origin is None:
        return "(not installed)"
    with open(spec.origin, encoding="utf-8") as source:  # noqa: PTH123  (pathlib is not needed for anything else)
        return (ast.get_docstring(ast.parse(source.read())) or "").partition("\n")[0]
