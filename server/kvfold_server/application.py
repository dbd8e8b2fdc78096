"""The whole server: engines, their supervisors, and the gRPC server in front of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import TYPE_CHECKING

from kvfold_server.channel.front_end import EngineHandle
from kvfold_server.channel.supervisor import EngineLoadError, EngineSupervisor
from kvfold_server.generation.errors import DrainingError
from kvfold_server.rpc.hosted_model import HostedModel, HostedModels
from kvfold_server.text.chat import ChatTemplateError
from kvfold_server.text.model_text import ModelText
from kvfold_server.text.tokenizer import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType
    from typing import Any, Self

    from kvfold_server.channel.supervisor import SupervisionPolicy
    from kvfold_server.settings import ServerSettings

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 1.0
"""What calls get to send their last status when the server ends."""


class Application:
    """An asynchronous context manager: inside, the server listens at `address`; `run` serves until `stop` is called."""

    def __init__(self, settings: ServerSettings, policy: SupervisionPolicy | None = None) -> None:
        self._settings = settings
        self._policy = policy
        self.address = ""
        self.models = HostedModels(
            HostedModel(model.name, EngineHandle(model.name, self._note_change, model.max_running + model.max_waiting))
            for model in settings.models
        )
        self.supervisors: dict[str, EngineSupervisor] = {}
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Starts the engines and listens. Raises OSError if the address or the TLS files cannot be had."""
        settings = self._settings
        for model, hosted in zip(settings.models, self.models.all, strict=True):
            supervisor = EngineSupervisor(hosted.handle, model.engine_options(), settings.engine_factory, self._policy)
            self.supervisors[model.name] = supervisor
            self._spawn(supervisor.run(), f"supervisor of {model.name}")
        await asyncio.sleep(0)  # each supervisor begins, and its first act is to start a process
        try:
            await self._listen()
        except BaseException:
            await self._end_tasks()
            raise
        for hosted in self.models.all:
            self._spawn(self._load_text(hosted), f"tokenizer of {hosted.name}")
        self._spawn(self._publish_readiness(), "readiness")
        self._spawn(self._announce(), "ready file")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends everything at once; `run` drains before."""
        for hosted in self.models.all:
            hosted.handle.fail_all(DrainingError())
        await self._server.drain(CLOSING_SECONDS)
        await self._server.stop()
        await self._end_tasks()
        if self._settings.ready_file is not None:
            self._settings.ready_file.unlink(missing_ok=True)
        logger.info("stopped")

    @property
    def stopping(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Asks `run` to drain and return."""
        self._stopping.set()

    async def until_ready(self) -> None:
        """Waits until every model can be asked. Raises EngineLoadError if one cannot be served."""
        await self._unless_failed(self._until_ready())

    async def run(self) -> None:
        """Serves until `stop`, then refuses new requests and lets the running ones end within the grace period.

        Raises EngineLoadError if a model cannot be served.
        """
        await self._unless_failed(self._stopping.wait())
        logger.info("draining for at most %g s", self._settings.grace)
        left = await self._server.drain(self._settings.grace)
        if left:
            logger.warning("%d calls have not ended in time", left)

    async def _listen(self) -> None:
        from kvfold_server.rpc.server import RpcServer, TlsFiles  # noqa: PLC0415 - gRPC comes while the engines load

        settings = self._settings
        tls = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = TlsFiles(settings.tls_cert.read_bytes(), settings.tls_key.read_bytes())
        self._server = RpcServer(self.models, settings.max_connection_age)
        port = await self._server.start(settings.host, settings.port, tls)
        self.address = f"[{settings.host}]:{port}" if ":" in settings.host else f"{settings.host}:{port}"
        logger.info("listening on %s", self.address)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _until_ready(self) -> None:
        while not self.models.ready:
            self._changed.clear()
            await self._changed.wait()

    async def _unless_failed(self, wanted: Coroutine[Any, Any, Any]) -> None:
        """Waits for what is wanted, or for the first task that fails, and raises what it raised."""
        task: asyncio.Task[Any] = asyncio.create_task(wanted)
        running: set[asyncio.Task[Any]] = {task, *self._tasks}
        try:
            while not task.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
        finally:
            task.cancel()

    async def _load_text(self, hosted: HostedModel) -> None:
        while hosted.handle.info is None:
            self._changed.clear()
            await self._changed.wait()
        try:
            hosted.set_text(await asyncio.to_thread(ModelText.load, hosted.handle.info.tokenizer_folder))
        except (TokenizerError, ChatTemplateError) as error:
            raise EngineLoadError(f"model {hosted.name!r} cannot be served: {error}") from error
        self._note_change()

    async def _announce(self) -> None:
        await self._until_ready()
        logger.info("ready: %s", ", ".join(model.name for model in self.models.all))
        path = self._settings.ready_file
        if path is not None:
            content = {"address": self.address, "pid": os.getpid(), "models": [model.name for model in self.models.all]}
            unfinished = path.with_name(f"{path.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(content))
            unfinished.replace(path)  # whoever waits for the file never sees half of it

    async def _publish_readiness(self) -> None:
        while True:
            await self._server.set_ready(self.models.ready)
            self._changed.clear()
            await self._changed.wait()

    def _note_change(self) -> None:
        self._changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))
