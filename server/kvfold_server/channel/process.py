"""The engine process: `python -m kvfold_server.channel.process`, started by the supervisor and by nobody else."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, cast

from kvfold_server.channel.engine_loop import EngineChannel, EngineLoop, Heart
from kvfold_server.channel.messages import LoadFailed
from kvfold_server.engine.options import EngineOptions
from kvfold_server.engine.stages import Stages
from kvfold_server.logs import configure_logging
from kvfold_server.runtime import prepare_runtime, spare_loaded_objects

if TYPE_CHECKING:
    from kvfold_server.channel.messages import FrontEndMessage
    from kvfold_server.engine.interface import EngineFactory

logger = logging.getLogger(__name__)

NICENESS = 5
"""Gives the front end about three times the engine's weight: it answers while the engine keeps all cores busy."""

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Builds the engine and runs it until the front end goes away. Returns 1 if it cannot be built, or breaks."""
    arguments = _parse_arguments()
    stages = Stages(arguments.started)
    stages.begin("process")
    configure_logging(arguments.log_level, f"engine {arguments.name}")
    _die_with_parent()
    prepare_runtime()
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=arguments.channel) as connection:
        channel = EngineChannel(connection)
        inbox: SimpleQueue[FrontEndMessage] = SimpleQueue()
        heart = Heart(channel)
        threading.Thread(target=channel.read_into, args=(inbox,), name="inbox", daemon=True).start()
        threading.Thread(target=heart.beat_for_ever, name="heart", daemon=True).start()
        try:
            engine = _load_factory(arguments.factory)(EngineOptions.from_json(arguments.options), stages)
        except Exception as error:  # whatever is wrong with a model, the operator has to be told
            channel.send(LoadFailed(_describe(error)))
            return 1
        spare_loaded_objects()
        logger.info("ready in %s", stages)
        try:
            EngineLoop(engine, channel, heart, inbox).run_for_ever()
        except Exception:  # the supervisor starts another process; this one's log says what happened
            logger.exception("the engine broke")
    return 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel", type=int, required=True, help="file descriptor of the socket to the front end")
    parser.add_argument("--name", required=True)
    parser.add_argument("--factory", required=True)
    parser.add_argument("--options", required=True)
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--started", type=float, help="when the process was asked for, in seconds of time.monotonic")
    return parser.parse_args()


def _load_factory(name: str) -> EngineFactory:
    module, _, function = name.partition(":")
    return cast("EngineFactory", getattr(importlib.import_module(module), function))


def _describe(error: Exception) -> str:
    """Our own errors are words for an operator; of others the type is part of the message, and the log has the rest."""
    if type(error).__module__.startswith("kvfold"):
        return str(error)
    logger.error("the engine cannot be built", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _die_with_parent() -> None:
    """Asks Linux to end this process when the front end ends, however it ends. Elsewhere the closed channel does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
