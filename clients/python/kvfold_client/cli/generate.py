"""Generate text from a prompt and stream it to standard output.

What was done with the KV cache is printed to standard error at the end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from kvfold_client.cli.answer_clock import AnswerClock
from kvfold_client.cli.connection import add_connection_arguments, with_client
from kvfold_client.cli.report import answer_text

if TYPE_CHECKING:
    import argparse

    from kvfold_client import Client, GenerationOptions, Prompt

_OPTIONS = (
    *("model", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
    *("stop_strings", "shared_layers", "logprobs"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("prompt", nargs="?", help="the text to continue; read from standard input if absent or -")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message of a chat")
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand above the chat; implies --chat")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON instead of streaming")
    add_generation_arguments(parser)
    add_connection_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `kvfold generate` and `kvfold chat` share."""
    group = parser.add_argument_group("generation", "what is left out has the server's default")
    group.add_argument("--model", metavar="NAME", help="the model; needed if the server hosts several")
    group.add_argument("--shared-layers", metavar="N", type=int, help="layers that share KV; 0 is exact")
    group.add_argument("--max-tokens", metavar="N", type=int, help="the most tokens to generate")
    group.add_argument("--temperature", metavar="X", type=float, help="0 for the most probable token each time")
    group.add_argument("--top-k", metavar="K", type=int, help="keep only the K most probable tokens")
    group.add_argument("--top-p", metavar="P", type=float, help="keep the most probable tokens that sum up to P")
    group.add_argument("--min-p", metavar="P", type=float, help="drop tokens below P times the most probable one")
    group.add_argument("--repetition-penalty", metavar="X", type=float, help="above 1 discourages repetition")
    group.add_argument("--seed", metavar="N", type=int, help="makes sampling reproducible")
    group.add_argument("--stop", metavar="TEXT", action="append", dest="stop_strings", help="end here; may be repeated")
    group.add_argument("--logprobs", metavar="N", type=int, help="with --json: log-probabilities and N alternatives")
    group.add_argument("--timeout", metavar="SECONDS", type=float, default=None, help="give up after this time")


def generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """The options that the user gave."""
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    return cast("GenerationOptions", {name: value for name, value in given.items() if value is not None})


def run(arguments: argparse.Namespace) -> int:
    """Streams the answer, or prints it as JSON."""
    if arguments.prompt is None and sys.stdin.isatty():
        print("kvfold: give a prompt, or pipe one in", file=sys.stderr)
        return 2
    return with_client(arguments, _generate, arguments.timeout)


def _generate(client: Client, arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.prompt in {None, "-"} else arguments.prompt
    prompt: Prompt = text
    if arguments.chat or arguments.system:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        prompt = [*system, {"role": "user", "content": text}]
    options = generation_options(arguments)
    if arguments.json:
        answer = client.generate(prompt, **options)
        print(json.dumps(asdict(answer), default=lambda enum: enum.value, ensure_ascii=False))
        return 0
    clock = AnswerClock()
    with client.stream(prompt, **options) as stream:
        for chunk in stream:
            clock.see(chunk)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(answer_text(clock), file=sys.stderr)
    return 0
