"""Serve one or more models over gRPC."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from kvfold_server.settings import ServerSettings

MODEL_FLAGS = (
    "plan",
    "device",
    "dtype",
    "weights",
    "kv_memory",
    "max_running",
    "max_waiting",
    "step_tokens",
    "attention_backend",
)
"""Flags that hold for every model that is named by --model."""

SERVER_FLAGS = ("host", "port", "ready_file", "grace", "max_connection_age", "tls_cert", "tls_key", "log_level")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments. None has a default here: what is not given comes from the environment, or from the file."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]SOURCE",
        help="'default' (the embedded SmolLM2-135M-Instruct; served without this flag too), a folder, a GGUF file or a "
        "hub id; may be repeated",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; flags and KVFOLD_... variables win")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; 0.0.0.0 for all)")
    parser.add_argument("--port", help="port to listen on (default: 50051; 0 takes a free one)")
    parser.add_argument(
        "--ready-file", metavar="FILE", help="write the address there, as JSON, when all models are ready"
    )
    parser.add_argument("--grace", metavar="SECONDS", help="what running requests get after SIGTERM (default: 30)")
    parser.add_argument(
        "--max-connection-age",
        metavar="SECONDS",
        help="ask clients to connect again after this time, so that they find new replicas (default: never)",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM certificate chain; serves TLS together with --tls-key")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM private key")
    parser.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], help="(default: INFO)")
    group = parser.add_argument_group("for every model named by --model")
    group.add_argument(
        "--plan", metavar="FILE", help="sharing plan (default: the one that ships for the model, if any)"
    )
    group.add_argument("--device", help="torch device (default: the best at hand)")
    group.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of weights and KV (default: bfloat16)"
    )
    group.add_argument(
        "--weights",
        choices=["dtype", "int8"],
        help="of linear layers: as --dtype, or int8, which takes half the memory of bfloat16 (default: dtype)",
    )
    group.add_argument(
        "--kv-memory", metavar="SIZE", help="size of the pool, such as 512MiB (default: a part of what is free)"
    )
    group.add_argument("--max-running", metavar="N", help="requests that are computed at once (default: 128)")
    group.add_argument("--max-waiting", metavar="N", help="requests that may wait (default: 1024)")
    group.add_argument("--step-tokens", metavar="N", help="tokens of one step, at least max-running (default: 512)")
    group.add_argument("--attention-backend", metavar="NAME", help="native or reference (default: the best at hand)")


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT. Returns 2 if the configuration is wrong, 1 if it cannot be served.

    A second signal ends running requests at once; then 1 is returned, too.
    """
    from kvfold_server.settings import SettingsError

    try:
        settings = _settings(arguments)
    except SettingsError as error:
        print(f"kvfold serve: {error}", file=sys.stderr)
        return 2

    import asyncio

    import uvloop

    from kvfold_server.channel.supervisor import EngineLoadError
    from kvfold_server.logs import configure_logging

    configure_logging(settings.log_level, "server")
    try:
        uvloop.run(_serve(settings))
    except (EngineLoadError, OSError) as error:
        logging.getLogger(__name__).debug("the server ends", exc_info=True)
        print(f"kvfold serve: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return 1
    return 0


async def _serve(settings: ServerSettings) -> None:
    import asyncio
    import signal

    from kvfold_server.application import Application
    from kvfold_server.runtime import spare_loaded_objects

    spare_loaded_objects()
    application = Application(settings)
    loop = asyncio.get_running_loop()
    serving = asyncio.current_task(loop)

    def on_signal() -> None:
        if application.stopping and serving is not None:
            serving.cancel()  # asked again: without waiting for what runs
        else:
            application.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with application:
        await application.run()


def _settings(arguments: argparse.Namespace) -> ServerSettings:
    from pathlib import Path

    from kvfold_server.settings import SettingsError, load_settings, split_model

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    flags: dict[str, Any] = {name: given[name] for name in SERVER_FLAGS if name in given}
    for_models = {name: given[name] for name in MODEL_FLAGS if name in given}
    named = arguments.model
    if not named and for_models and arguments.config is None and "KVFOLD_MODELS" not in os.environ:
        named = ["default"]
    if named:
        if "plan" in for_models and len(named) > 1:
            raise SettingsError("--plan is for one model; give each of several its own in a --config file")
        flags["models"] = [split_model(text) | for_models for text in named]
    elif for_models:
        flag = next(iter(for_models)).replace("_", "-")
        raise SettingsError(f"--{flag} is for models that are named by --model")
    config = Path(arguments.config) if arguments.config is not None else None
    return load_settings(flags, config)
