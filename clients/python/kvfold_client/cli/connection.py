"""What the client commands share: the arguments that name a server, and errors on one line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from kvfold_client import Client, InvalidRequestError, KvfoldError, NotFoundError, PreconditionError, Tls
from kvfold_client import UnavailableError as Unavailable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

DEFAULT_SERVER = "localhost:50051"


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `with_client` reads."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=os.environ.get("KVFOLD_SERVER", DEFAULT_SERVER),
        help=f"the server (default: $KVFOLD_SERVER, else {DEFAULT_SERVER})",
    )
    group.add_argument("--tls", action="store_true", help="encrypt the connection")
    group.add_argument("--tls-ca", metavar="FILE", help="trust these root certificates (PEM); implies --tls")


def with_client(
    arguments: argparse.Namespace, action: Callable[[Client, argparse.Namespace], int], timeout: float | None
) -> int:
    """Runs `action` with a client and returns its exit code; an error becomes one line on stderr and 1 or 2."""
    try:
        tls = Tls.from_files(arguments.tls_ca) if arguments.tls or arguments.tls_ca else None
    except OSError as error:
        print(f"kvfold: cannot read {arguments.tls_ca}: {error.strerror}", file=sys.stderr)
        return 2
    try:
        with Client(arguments.server, tls=tls, timeout=timeout) as client:
            return action(client, arguments)
    except KvfoldError as error:
        print(f"kvfold: {explain(error, arguments.server)}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequestError | NotFoundError | PreconditionError) else 1
    except ValueError as error:  # an argument that no message can hold
        print(f"kvfold: {error}", file=sys.stderr)
        return 2


def explain(error: KvfoldError, server: str) -> str:
    """One line that says what went wrong, and what to do about it if that is known."""
    message = " ".join(str(error).split())
    if isinstance(error, Unavailable) and not error.details:  # no kvfold server spoke: it would have given details
        return f"no server answers at {server}; start one with `kvfold serve`, or name it with --server ({message})"
    if error.retry_delay is not None:
        return f"{message} (try again in {error.retry_delay:.1f} s)"
    return message
