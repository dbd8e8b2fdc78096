"""Logging: one line an event, to stderr. Prompts and answers are never logged."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str, process: str) -> None:
    """Sends all log records of this process to stderr, marked with the name of the process."""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [{process}] %(message)s",
        force=True,
    )
