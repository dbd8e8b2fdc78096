from __future__ import annotations

import asyncio
import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from kvfold.v1 import generation_pb2, generation_pb2_grpc, memory_pb2, memory_pb2_grpc, model_pb2, model_pb2_grpc
from kvfold_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    KvfoldServe = Callable[..., AbstractContextManager[Any]]

QUESTION = {"messages": [{"role": "ROLE_USER", "content": "What is the capital of France?"}]}
GREEDY = {"temperature": 0}


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_wrong_configuration_is_one_line_and_exit_code_two() -> None:
    for arguments, words in (
        (["--model", "a=default", "--model", "a=default"], "several models are named a"),
        (["--kv-memory", "plenty"], "is no size"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kvfold_client.cli", "serve", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_model_that_does_not_exist_ends_the_server_with_the_reason(kvfold_serve: KvfoldServe, tmp_path: Path) -> None:
    with kvfold_serve("--model", str(tmp_path / "missing"), wait=False) as server:
        assert server.process.wait(120) == 1
        assert "model 'missing' cannot be served" in server.log[-1]
        assert not any("Traceback" in line for line in server.log)


async def test_the_default_model_answers_the_same_to_all_who_ask_alike(
    default_server: Any, default_model_folder: Path
) -> None:
    assert default_server.ready["models"] == ["default"]
    tokenizer = Tokenizer.load(default_model_folder)
    async with grpc.aio.insecure_channel(default_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(chat=QUESTION, sampling=GREEDY, stopping={"max_tokens": 40})
        answers = await asyncio.gather(*(stub.Generate(request, timeout=120) for _ in range(4)))
        memory_stub = memory_pb2_grpc.MemoryServiceStub(channel)
        (memory,) = (await memory_stub.GetMemory(memory_pb2.GetMemoryRequest())).models
    assert len({answer.text for answer in answers}) == 1
    assert "Paris" in answers[0].text
    for answer in answers:
        assert answer.finish.reason == generation_pb2.FINISH_REASON_STOP
        assert answer.finish.stop_token_id in tokenizer.special_ids
        assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
        assert answer.finish.memory.kv_bytes_held > 0
    assert memory.ready
    assert memory.kv_bytes_held == 0
    assert 255 * 2**20 <= memory.pool_bytes <= 2**28


def test_each_depth_holds_its_share_of_the_bytes(default_server: Any) -> None:
    with grpc.insecure_channel(default_server.address) as channel:
        info = model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(model="default"))
        layers, deepest = len(info.layers), len(info.plan.entries)
        assert deepest >= 8
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        held = {}
        for depth in sorted({0, deepest // 2, deepest}):
            request = generation_pb2.GenerateRequest(
                prompt="The quick brown fox jumps over the lazy dog. " * 10,
                sampling=GREEDY,
                stopping={"max_tokens": 8, "ignore_eos": True},
                quality={"shared_layers": depth},
            )
            memory = stub.Generate(request, timeout=120).finish.memory
            assert memory.shared_layers == depth
            held[depth] = memory.kv_bytes_held
    assert all(held[depth] * layers == held[0] * (layers - depth) for depth in held)


def test_a_killed_engine_is_replaced(default_server: Any) -> None:
    with grpc.insecure_channel(default_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        (engine,) = default_server.engine_ids()
        call = stub.GenerateStream(
            generation_pb2.GenerateStreamRequest(
                prompt="Once upon a time", sampling=GREEDY, stopping={"max_tokens": 2000, "ignore_eos": True}
            )
        )
        next(call)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            collections.deque(call, maxlen=0)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        models = model_pb2_grpc.ModelServiceStub(channel)
        deadline = time.monotonic() + 120
        while not models.ListModels(model_pb2.ListModelsRequest()).models[0].ready:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        request = generation_pb2.GenerateRequest(chat=QUESTION, sampling=GREEDY, stopping={"max_tokens": 20})
        assert "Paris" in stub.Generate(request, timeout=60).text
        assert default_server.engine_ids() != [engine]


def test_a_server_under_sigterm_finishes_what_runs(default_server: Any) -> None:
    with grpc.insecure_channel(default_server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateStreamRequest(
            prompt="Once upon a time", sampling=GREEDY, stopping={"max_tokens": 100, "ignore_eos": True}
        )
        call = stub.GenerateStream(request)
        count = len(next(call).token_ids)
        (engine,) = default_server.engine_ids()
        default_server.process.send_signal(signal.SIGTERM)
        for response in call:
            count += len(response.token_ids)
        assert response.finish.usage.completion_tokens == count == 100
    assert default_server.process.wait(30) == 0
    assert not default_server.ready_file.exists()
    assert not is_alive(engine)


def test_a_killed_server_leaves_no_engine_behind(serve_fake: KvfoldServe) -> None:
    with serve_fake(step_seconds=0.01) as server:
        (engine,) = server.engine_ids()
        server.process.kill()
        server.process.wait(10)
        deadline = time.monotonic() + 10
        while is_alive(engine):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_second_signal_ends_the_server_at_once(serve_fake: KvfoldServe) -> None:
    with (
        serve_fake(step_seconds=0.01) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(
            generation_pb2.GenerateStreamRequest(token_ids={"ids": [20, 21]}, stopping={"max_tokens": 4000})
        )
        next(call)
        server.process.send_signal(signal.SIGINT)
        while not any("draining" in line for line in server.log):
            time.sleep(0.05)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 1
