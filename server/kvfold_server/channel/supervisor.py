"""Starts an engine process, watches over it, and starts another when it is lost."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfold_server.channel.link import EngineLink
from kvfold_server.channel.messages import EngineReady, LoadFailed

if TYPE_CHECKING:
    from kvfold_server.channel.front_end import EngineHandle
    from kvfold_server.channel.messages import EngineMessage
    from kvfold_server.engine.options import EngineOptions

logger = logging.getLogger(__name__)

DEFAULT_FACTORY = "kvfold_server.engine.starting:start_engine"
"""What builds the engine inside its process: module and function (an EngineFactory). Tests name another one."""


class EngineLoadError(Exception):
    """The first start of an engine failed; the message is for an operator."""


@dataclass(frozen=True, slots=True)
class SupervisionPolicy:
    """When an engine counts as hung, and how soon it is started again. All in seconds.

    `heartbeat_timeout`: heartbeats come twice a second; a busy machine may delay them by a few seconds, not by 15.
    `load_timeout`: until the engine is ready, they may fail to come for longer: reading libraries from a cold disk
    holds up every thread of a Python process. `step_timeout`: a step computes at most a few hundred tokens; even a
    large model on a slow CPU ends it within minutes. The delay before a restart doubles from `first_delay` to
    `max_delay`, so that an engine that cannot live does not keep the machine busy, and falls back when one has
    lived for `stable_after`.
    """

    heartbeat_timeout: float = 15.0
    load_timeout: float = 120.0
    step_timeout: float = 300.0
    first_delay: float = 0.5
    max_delay: float = 30.0
    stable_after: float = 60.0
    exit_timeout: float = 2.0


class EngineSupervisor:
    """Keeps one engine process running behind a handle, until it is stopped."""

    def __init__(
        self,
        handle: EngineHandle,
        options: EngineOptions,
        factory: str = DEFAULT_FACTORY,
        policy: SupervisionPolicy | None = None,
    ) -> None:
        self._handle = handle
        self._options = options
        self._factory = factory
        self._policy = policy or SupervisionPolicy()
        self._process: asyncio.subprocess.Process | None = None
        self._failure: str | None = None

    @property
    def process_id(self) -> int | None:
        """The id of the engine process; None between two of them."""
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Runs until it is cancelled. Raises EngineLoadError if the very first start fails."""
        delay = self._policy.first_delay
        while True:
            started = time.monotonic()
            reason = await self._run_process()
            if self._handle.info is None:
                raise EngineLoadError(f"model {self._handle.name!r} cannot be served: {reason}")
            if time.monotonic() - started > self._policy.stable_after:
                delay = self._policy.first_delay
            logger.error("model %s: engine lost (%s); restart in %.1f s", self._handle.name, reason, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._policy.max_delay)

    async def _run_process(self) -> str:
        """Runs one engine process to its end, and says how it ended."""
        self._failure = None
        try:
            link, process = await self._start()
        except OSError as error:
            return f"its process cannot be started: {error}"
        self._process = process
        exited = asyncio.create_task(process.wait())
        try:
            reason = await self._watch(link, exited)
        finally:
            self._handle.disconnect()
            link.close()
            await self._end(process, exited)
            self._process = None
        return self._failure or reason or _describe_exit(process.returncode)

    async def _start(self) -> tuple[EngineLink, asyncio.subprocess.Process]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "kvfold_server.channel.process",
                    f"--channel={theirs.fileno()}",
                    f"--name={self._handle.name}",
                    f"--factory={self._factory}",
                    f"--options={self._options.to_json()}",
                    f"--log-level={logging.getLevelName(logging.getLogger().getEffectiveLevel())}",
                    f"--started={time.monotonic()}",
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # nothing but log lines may come from an engine
                    start_new_session=True,  # an interrupt from the terminal drains the server first
                )
            ours.setblocking(False)
            link = EngineLink(self._receive)
            await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)
        except BaseException:
            ours.close()  # a process that has been started sees it and ends
            raise
        self._handle.connect(link.send)
        logger.info("model %s: engine process %d started", self._handle.name, process.pid)
        return link, process

    def _receive(self, message: EngineMessage) -> None:
        if isinstance(message, LoadFailed):
            self._failure = message.reason
        self._handle.receive(message)
        if isinstance(message, EngineReady):
            logger.info("model %s: engine ready, pool of %d bytes", self._handle.name, message.info.pool_bytes)

    async def _watch(self, link: EngineLink, exited: asyncio.Task[int]) -> str | None:
        """Waits for the end of the process. Returns why it has to end, or None if it ended by itself."""
        policy = self._policy
        ends: set[asyncio.Future[Any]] = {link.lost, exited}
        pause = min(policy.heartbeat_timeout, policy.step_timeout) / 5
        while True:
            before = time.monotonic()
            await asyncio.wait(ends, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            now = time.monotonic()
            if exited.done() or link.lost.done():
                # The other one follows: what the process said before it exited is read, or its status is known.
                await asyncio.wait(ends, timeout=policy.exit_timeout)
                return None if exited.done() else link.lost.result()
            if now - before > 2 * pause + 1:
                continue  # this process stood still itself: what the engine said meanwhile has yet to be read
            silence_allowed = policy.heartbeat_timeout if self._handle.ready else policy.load_timeout
            if now - link.heard_at > silence_allowed:
                return f"it hangs: no sign of life for {now - link.heard_at:.1f} s"
            if link.busy_seconds > policy.step_timeout:
                return f"it hangs: a step takes {link.busy_seconds:.1f} s"

    async def _end(self, process: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> None:
        """Makes sure that the process is gone. Its channel is closed: it exits by itself, unless it hangs."""
        await asyncio.wait({exited}, timeout=self._policy.exit_timeout)
        if not exited.done():
            process.kill()
        await exited


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it exited with status {code}"
