from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvfold.v1 import generation_pb2, generation_pb2_grpc, memory_pb2, model_pb2
from kvfold_server.application import Application
from kvfold_server.channel.supervisor import EngineLoadError
from kvfold_server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Serve = Callable[..., AbstractAsyncContextManager[Any]]
    MakeFakeModel = Callable[..., Path]
    Failing = Callable[[Any], Any]

PROMPT = {"token_ids": {"ids": [20, 21, 22]}}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("kvfold.v1.GenerationService", "kvfold.v1.ModelService", "kvfold.v1.MemoryService")


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_tells_the_process_from_its_models(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(load_seconds=1), wait=False) as served:
        assert await health_of(served.channel, "") == SERVING
        assert [await health_of(served.channel, service) for service in SERVICES] == [NOT_SERVING] * 3
        await served.application.until_ready()
        await asyncio.sleep(0)
        assert [await health_of(served.channel, service) for service in SERVICES] == [SERVING] * 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(served.channel, "other")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reflection_lists_every_service(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model()) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        raw = served.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        answer = reflection_pb2.ServerReflectionResponse.FromString(await raw(iter([b"\xff"])).read())
        assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_models_are_described(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(name="one"), make_fake_model(name="two")) as served:
        listed = await served.model.ListModels(model_pb2.ListModelsRequest())
        assert [(model.name, model.ready) for model in listed.models] == [("one", True), ("two", True)]
        model = await served.model.GetModel(model_pb2.GetModelRequest(model="two"))
        assert model.name == "two"
        assert model.context_length == 4096
        assert len(model.layers) == 4
        assert model.kv_bytes_per_token == 4 * 2 * 2 * 16 * 2
        assert [(entry.sharer, entry.owner) for entry in model.plan.entries] == [(3, 0), (2, 1)]
        assert model.plan.depths[0].quality_cost == pytest.approx(0.105)


async def test_memory_shows_what_requests_hold(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(step_seconds=0.005)) as served:
        call = served.generation.GenerateStream(
            generation_pb2.GenerateStreamRequest(**PROMPT, stopping={"max_tokens": 2000}, quality={"shared_layers": 2})
        )
        await call.read()
        watch = served.memory.WatchMemory(memory_pb2.WatchMemoryRequest(interval={"nanos": 100_000_000}))
        while True:
            (memory,) = (await watch.read()).models
            if memory.running_requests and memory.kv_bytes_saved > 0:
                break
        assert sum(entry.bytes for entry in memory.states) == memory.pool_bytes
        assert memory.kv_bytes_saved == memory.kv_bytes_full - memory.kv_bytes_held
        assert memory.kv_bytes_held % memory.block_bytes == 0
        call.cancel()
        await served.until_idle()
        (memory,) = (await served.memory.GetMemory(memory_pb2.GetMemoryRequest(model="fake"))).models
        assert memory.ready
        assert memory.kv_bytes_held == memory.running_requests == 0
        watch.cancel()


async def test_a_draining_server_refuses_new_requests_and_ends_the_running_ones(
    serve: Serve, make_fake_model: MakeFakeModel, failing: Failing
) -> None:
    async with serve(make_fake_model(step_seconds=0.01), grace=20) as served:
        running = asyncio.create_task(served.stream(**PROMPT, stopping={"max_tokens": 150}))
        watch = served.memory.WatchMemory(memory_pb2.WatchMemoryRequest(interval={"seconds": 60}))
        await watch.read()
        while not served.handle.open_streams:
            await asyncio.sleep(0.01)
        run = asyncio.create_task(served.application.run())
        await asyncio.sleep(0)
        served.application.stop()
        failure = await failing(watch.read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        failure = await failing(served.generation.Generate(generation_pb2.GenerateRequest(**PROMPT)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert "RetryInfo" in failure.details
        assert await health_of(served.channel, SERVICES[0]) == NOT_SERVING
        assert await health_of(served.channel, "") == SERVING
        responses = await running
        assert responses[-1].finish.usage.completion_tokens == 150
        await asyncio.wait_for(run, 5)


async def test_the_grace_period_ends(serve: Serve, make_fake_model: MakeFakeModel, failing: Failing) -> None:
    async with serve(make_fake_model(step_seconds=0.05), grace=0.2) as served:
        channel = grpc.aio.insecure_channel(served.address)
        request = generation_pb2.GenerateRequest(**PROMPT, stopping={"max_tokens": 4000})
        running = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)
        while not served.handle.open_streams:
            await asyncio.sleep(0.01)
        served.application.stop()
        await asyncio.wait_for(served.application.run(), 2)
        assert not running.done()
    failure = await failing(running)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await channel.close()


async def test_tls_is_spoken_with_a_certificate(serve: Serve, make_fake_model: MakeFakeModel, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    async with serve(make_fake_model(), tls_cert=certificate, tls_key=key) as served:
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        options = [("grpc.ssl_target_name_override", "localhost")]
        async with grpc.aio.secure_channel(served.address, credentials, options) as channel:
            assert await health_of(channel, "") == SERVING


async def test_a_port_that_is_taken_is_an_error(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    async with serve(make_fake_model(name="one"), wait=False) as served:
        port = int(served.address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with serve(make_fake_model(name="two"), port=port):
                pass


async def test_a_server_that_cannot_listen_leaves_no_engine_behind(
    serve: Serve, make_fake_model: MakeFakeModel, fake_factory: str
) -> None:
    async with serve(make_fake_model(name="one"), wait=False) as served:
        settings = ServerSettings(
            models=[{"source": str(make_fake_model(name="two"))}],
            port=int(served.address.rpartition(":")[2]),
            engine_factory=fake_factory,
        )
        with pytest.raises(OSError, match="cannot listen"):
            await Application(settings).__aenter__()
        command = ["ps", "-ww", "-o", "args=", "--ppid", str(os.getpid())]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
    names = [argument for argument in listed.stdout.split() if argument.startswith("--name=")]
    assert names == ["--name=one"]


async def test_a_model_that_cannot_be_loaded_ends_the_server(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    with pytest.raises(EngineLoadError, match="model 'two' cannot be served: no such weights"):
        async with serve(make_fake_model(name="one"), make_fake_model(name="two", load_failure="no such weights")):
            pass


async def test_a_model_without_a_tokenizer_ends_the_server(serve: Serve, make_fake_model: MakeFakeModel) -> None:
    folder = make_fake_model()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineLoadError, match=r"has no tokenizer\.json"):
        async with serve(folder):
            pass


def test_engines_start_before_grpc_is_imported(make_fake_model: MakeFakeModel, fake_factory: str) -> None:
    program = f"""
import asyncio, subprocess, sys
from kvfold_server.application import Application
from kvfold_server.settings import ServerSettings

class Started(Exception):
    pass

def see_the_start(*arguments, **options):
    raise Started(sorted({{"grpc", "torch"}} & sys.modules.keys()))

async def main():
    models = [{{"source": {str(make_fake_model())!r}}}]
    settings = ServerSettings(models=models, port=0, engine_factory={fake_factory!r})
    async with Application(settings) as application:
        await application.until_ready()

subprocess.Popen = see_the_start
try:
    asyncio.run(main())
except Started as started:
    print(started)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_front_end_runs_without_torch(make_fake_model: MakeFakeModel, fake_factory: str) -> None:
    program = f"""
import asyncio, sys
from kvfold_server.application import Application
from kvfold_server.settings import ServerSettings

async def main():
    models = [{{"source": {str(make_fake_model())!r}}}]
    settings = ServerSettings(models=models, port=0, engine_factory={fake_factory!r})
    async with Application(settings) as application:
        await application.until_ready()
        return [name for name in ("torch", "transformers", "numpy") if name in sys.modules]

print(asyncio.run(main()))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
