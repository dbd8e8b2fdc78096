"""Arguments that every command with an engine of its own takes, and how its errors reach the user."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold_server.runtime import prepare_runtime

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from kvfold_server.engine.options import EngineOptions

USAGE_ERROR = 2


class CommandError(Exception):
    """The user asked for something that cannot be done; the message is one clear line."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model and what its engine is built with."""
    parser.add_argument(
        "model", nargs="?", default="default", help='"default", a folder, a GGUF file or a hub id (default: default)'
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a sharing plan instead of the one that ships")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument(
        "--weights", choices=("dtype", "int8"), default="dtype", help="of linear layers: as --dtype, or int8 (dtype)"
    )
    parser.add_argument("--device", help="a torch device such as cpu or cuda (default: the best at hand)")
    parser.add_argument("--attention-backend", metavar="NAME", help="native or reference (default: the best at hand)")
    parser.add_argument(
        "--kv-memory", metavar="BYTES", help="the size of the KV pool, such as 512MiB (default: from free memory)"
    )


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The options that the arguments name. Raises CommandError."""
    from kvfold_server.byte_size import parse_bytes
    from kvfold_server.engine.options import EngineOptions

    try:
        kv_memory = None if arguments.kv_memory is None else parse_bytes(arguments.kv_memory)
    except ValueError as error:
        raise CommandError(f"--kv-memory: {error}") from error
    return EngineOptions(
        model=arguments.model,
        plan=None if arguments.plan is None else str(arguments.plan),
        device=arguments.device,
        dtype=arguments.dtype,
        weights=arguments.weights,
        kv_memory_bytes=kv_memory,
        attention_backend=arguments.attention_backend,
    )


def reporting_errors(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turns errors that are the user's to mend into one line on standard error and exit code 2."""

    @functools.wraps(run)
    def wrapped(arguments: argparse.Namespace) -> int:
        prepare_runtime()
        try:
            return run(arguments)
        except CommandError as error:
            message = str(error)
        except Exception as error:
            if not _is_users(error):
                raise
            message = str(error)
        sys.stderr.write(f"kvfold: {message}\n")
        return USAGE_ERROR

    return wrapped


def _is_users(error: Exception) -> bool:
    """Whether building an engine failed for a reason that its message explains. Imported late: it brings torch
    along."""
    from kvfold_server.engine.factory import EngineOptionsError
    from kvfold_server.models.errors import ModelSourceError, UnsupportedModelError
    from kvfold_server.sharing.plan_file import PlanFileError, PlanMismatchError

    known = EngineOptionsError | ModelSourceError | UnsupportedModelError | PlanFileError | PlanMismatchError
    return isinstance(error, known)
