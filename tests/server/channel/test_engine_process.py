from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvfold_server.channel.supervisor import EngineLoadError, SupervisionPolicy
from kvfold_server.engine.fake import FakeSettings, fake_token
from kvfold_server.generation.errors import (
    EngineFailureError,
    EngineUnavailableError,
    OverloadedError,
    RequestTooLargeError,
    SlowReaderError,
)
from kvfold_server.generation.events import FinishCause, RequestFinished

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from kvfold_server.channel.request_stream import RequestStream

    MakeFakeModel = Callable[..., Path]
    StartEngine = Callable[..., AbstractAsyncContextManager[Any]]

PROMPT = [20, 21, 22, 23]
HANG, EXIT, FAIL = 297, 298, 299


async def read(stream: RequestStream) -> tuple[list[int], RequestFinished]:
    tokens: list[int] = []
    while True:
        batch = await stream.next()
        tokens.extend(batch.token_ids)
        if batch.finished is not None:
            return tokens, batch.finished


def expected(prompt: list[int], count: int) -> list[int]:
    return [fake_token(prompt, position, FakeSettings()) for position in range(count)]


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def test_tokens_come_from_the_engine_process_in_order(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model()) as engine:
        assert engine.process_id != os.getpid()
        streams = [engine.handle.submit(engine.request([*PROMPT, n], 64)) for n in range(40)]
        for n, stream in enumerate(streams):
            tokens, finished = await read(stream)
            assert tokens == expected([*PROMPT, n], 64)
            assert finished.cause is FinishCause.LENGTH
            assert finished.memory.kv_bytes_held_peak > 0
        assert engine.handle.open_streams == 0


async def test_the_model_travels_whole_through_the_channel(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    folder = make_fake_model(eos_token_ids=[1, 3])
    async with start_engine(folder, kv_memory_bytes=2**20) as engine:
        info = engine.handle.info
        assert info.tokenizer_folder == folder
        assert info.eos_token_ids == {1, 3}
        assert info.geometry.layers[0].rope == "fake"
        assert info.plan.max_depth == 2
        assert info.plan_quality[0].kl == 0.1
        assert info.pool_bytes == 2**20


async def test_a_stop_token_ends_a_request(make_fake_model: MakeFakeModel, start_engine: StartEngine) -> None:
    async with start_engine(make_fake_model()) as engine:
        tokens = expected(PROMPT, 64)
        stop = tokens[20]
        request = engine.request(PROMPT, 64, stop_token_ids=frozenset({stop}))
        got, finished = await read(engine.handle.submit(request))
        assert got == tokens[: tokens.index(stop) + 1]
        assert finished.cause is FinishCause.STOP_TOKEN


async def test_log_probabilities_travel_with_their_tokens(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model()) as engine:
        stream = engine.handle.submit(engine.request(PROMPT, 3, logprobs=2, prompt_logprobs=1))
        first = await stream.next()
        assert [entry.token.token_id for entry in first.prompt_logprobs] == PROMPT[1:]
        assert all(len(entry.top) == 1 for entry in first.prompt_logprobs)
        assert [entry.token.token_id for entry in first.logprobs] == first.token_ids
        assert all(len(entry.top) == 2 for entry in first.logprobs)


async def test_a_cancelled_request_frees_its_blocks(make_fake_model: MakeFakeModel, start_engine: StartEngine) -> None:
    async with start_engine(make_fake_model(step_seconds=0.01)) as engine:
        stream = engine.handle.submit(engine.request(PROMPT, 2000))
        await stream.next()
        await until(lambda: engine.handle.snapshot.kv_bytes_held > 0)
        engine.handle.abandon(stream)
        await until(lambda: engine.handle.snapshot.kv_bytes_held == 0)
        assert engine.handle.snapshot.free_bytes == engine.handle.snapshot.pool_bytes
        assert engine.handle.open_streams == 0


async def test_a_stopped_request_reports_its_memory(make_fake_model: MakeFakeModel, start_engine: StartEngine) -> None:
    async with start_engine(make_fake_model(step_seconds=0.01)) as engine:
        stream = engine.handle.submit(engine.request(PROMPT, 2000, shared_layers=2))
        await stream.next()
        engine.handle.stop(stream)
        tokens, finished = await read(stream)
        assert tokens == []
        assert finished.cause is FinishCause.CANCELLED
        assert finished.memory.shared_layers == 2
        assert finished.memory.kv_bytes_held > 0


async def test_the_engine_refuses_what_it_cannot_hold(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    folder = make_fake_model(step_seconds=0.05)
    async with start_engine(folder, kv_memory_bytes=2**18, max_running=1, max_waiting=1) as engine:
        with pytest.raises(RequestTooLargeError) as too_large:
            await read(engine.handle.submit(engine.request(PROMPT, 4000)))
        assert too_large.value.bytes_needed > too_large.value.pool_bytes == 2**18
        running = engine.handle.submit(engine.request(PROMPT, 100))
        await running.next()
        waiting = engine.handle.submit(engine.request(PROMPT, 100))
        with pytest.raises(OverloadedError):
            await read(engine.handle.submit(engine.request(PROMPT, 100)))
        for stream in (running, waiting):
            engine.handle.abandon(stream)


async def test_an_error_in_one_request_does_not_reach_another(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model(fail_token=FAIL, step_seconds=0.001)) as engine:
        others = [engine.handle.submit(engine.request([*PROMPT, n], 200)) for n in range(4)]
        await others[0].next()
        with pytest.raises(EngineFailureError) as failure:
            await read(engine.handle.submit(engine.request([FAIL])))
        assert failure.value.error_id
        for n, stream in enumerate(others[1:], start=1):
            assert (await read(stream))[0] == expected([*PROMPT, n], 200)


async def test_a_killed_engine_fails_what_it_began_restarts_and_serves_the_rest(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model(step_seconds=0.01), max_running=1) as engine:
        begun = engine.handle.submit(engine.request(PROMPT, 2000))
        await begun.next()
        untouched = engine.handle.submit(engine.request([*PROMPT, 1], 8))
        first = engine.process_id
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineUnavailableError):
            await read(begun)
        assert not engine.handle.ready
        with pytest.raises(EngineUnavailableError):
            engine.handle.submit(engine.request(PROMPT))
        assert (await read(untouched))[0] == expected([*PROMPT, 1], 8)
        assert engine.process_id != first
        assert (await read(engine.handle.submit(engine.request(PROMPT))))[0] == expected(PROMPT, 16)


async def test_requests_do_not_wait_for_an_engine_that_cannot_start_again(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    folder = make_fake_model(step_seconds=0.01)
    async with start_engine(folder, max_running=1) as engine:
        begun = engine.handle.submit(engine.request(PROMPT, 2000))
        await begun.next()
        untouched = engine.handle.submit(engine.request(PROMPT, 8))
        (folder / "fake_engine.json").write_text('{"load_failure": "the disk is gone"}')
        os.kill(engine.process_id, signal.SIGKILL)
        for stream in (begun, untouched):
            with pytest.raises(EngineUnavailableError):
                await read(stream)
        (folder / "fake_engine.json").write_text("{}")
        await engine.until(ready=True)
        assert (await read(engine.handle.submit(engine.request(PROMPT))))[0] == expected(PROMPT, 16)


async def test_a_request_that_ends_engines_is_not_given_to_a_third(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model(exit_token=EXIT)) as engine:
        with pytest.raises(EngineUnavailableError):
            await read(engine.handle.submit(engine.request([EXIT])))
        await engine.until(ready=True)
        assert (await read(engine.handle.submit(engine.request(PROMPT))))[0] == expected(PROMPT, 16)


@pytest.mark.parametrize("how", ["frozen process", "endless step"])
async def test_a_hung_engine_is_killed_and_replaced(
    make_fake_model: MakeFakeModel, start_engine: StartEngine, how: str
) -> None:
    policy = SupervisionPolicy(heartbeat_timeout=1.5, step_timeout=1.0, first_delay=0.05, exit_timeout=0.5)
    folder = make_fake_model(hang_token=HANG, step_seconds=0.01)
    async with start_engine(folder, policy) as engine:
        first = engine.process_id
        begun = engine.handle.submit(engine.request(PROMPT, 4000))
        await begun.next()
        if how == "frozen process":
            os.kill(first, signal.SIGSTOP)
        else:
            hanging = engine.handle.submit(engine.request([HANG]))
        began = time.monotonic()
        with pytest.raises(EngineUnavailableError):
            await read(begun)
        assert time.monotonic() - began < 5
        if how == "endless step":
            engine.handle.abandon(hanging)
        await engine.until(ready=True)
        assert not is_alive(first)
        assert (await read(engine.handle.submit(engine.request(PROMPT))))[0] == expected(PROMPT, 16)


async def test_heartbeats_go_on_while_a_long_step_runs(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    policy = SupervisionPolicy(heartbeat_timeout=1.5, step_timeout=60, exit_timeout=0.5)
    async with start_engine(make_fake_model(step_seconds=3.0), policy) as engine:
        first = engine.process_id
        tokens, _ = await read(engine.handle.submit(engine.request(PROMPT, 1)))
        assert tokens == expected(PROMPT, 1)
        assert engine.process_id == first


async def test_a_model_that_cannot_be_loaded_says_why(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    with pytest.raises(EngineLoadError, match="model 'fake' cannot be served: the weights are missing"):
        async with start_engine(make_fake_model(load_failure="the weights are missing")):
            pass


async def test_an_engine_that_dies_while_it_loads_is_a_failed_load(tmp_path: Path, start_engine: StartEngine) -> None:
    (tmp_path / "fake_engine.json").write_text("{")
    with pytest.raises(EngineLoadError, match="JSONDecodeError"):
        async with start_engine(tmp_path):
            pass


async def test_a_reader_that_does_not_keep_up_loses_its_stream_and_its_blocks(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model()) as engine:
        slow = engine.handle.submit(engine.request(PROMPT, 4000))
        quick = engine.handle.submit(engine.request([*PROMPT, 1], 3000))
        assert (await read(quick))[0] == expected([*PROMPT, 1], 3000)
        await until(lambda: engine.handle.open_streams == 0)
        with pytest.raises(SlowReaderError):
            await slow.next()
        await until(lambda: engine.handle.snapshot.kv_bytes_held == 0)


async def test_tokens_that_arrived_meanwhile_are_read_at_once(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model()) as engine:
        stream = engine.handle.submit(engine.request(PROMPT, 500))
        await until(lambda: engine.handle.open_streams == 0)
        batch = await stream.next()
        assert batch.token_ids == expected(PROMPT, 500)
        assert batch.finished is not None


async def test_stopping_the_supervisor_ends_the_process(
    make_fake_model: MakeFakeModel, start_engine: StartEngine
) -> None:
    async with start_engine(make_fake_model()) as engine:
        process_id = engine.process_id
    assert not is_alive(process_id)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_ends_when_the_front_end_is_killed(
    make_fake_model: MakeFakeModel, fake_factory: str, how: signal.Signals
) -> None:
    script = f"""
import asyncio
from kvfold_server.channel.front_end import EngineHandle
from kvfold_server.channel.supervisor import EngineSupervisor
from kvfold_server.engine.options import EngineOptions

async def main():
    supervisor = EngineSupervisor(
        handle := EngineHandle("fake", lambda: print(supervisor.process_id, flush=True)),
        EngineOptions(model={str(make_fake_model())!r}), {fake_factory!r})
    await supervisor.run()

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as front_end:
        assert front_end.stdout is not None
        process_id = int(front_end.stdout.readline())
        assert is_alive(process_id)
        front_end.send_signal(how)
        front_end.wait(10)
    deadline = time.monotonic() + 5
    while is_alive(process_id):
        assert time.monotonic() < deadline, "the engine outlives its front end"
        time.sleep(0.01)


def test_the_engine_process_does_not_need_torch_for_the_channel() -> None:
    program = "import sys, kvfold_server.channel.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
