"""A workload on a running server, streamed over gRPC from this process."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import grpc.aio
import uvloop

from kvfold.v1 import generation_pb2, generation_pb2_grpc
from kvfold_server.bench.measurement import Measurement, Workload, measured
from kvfold_server.bench.processor_time import processor_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.bench.server_process import RunningServer

NAME = "kvfold-grpc"


def run_grpc(server: RunningServer, model: str, workload: Workload, prompts: Sequence[Sequence[int]]) -> Measurement:
    """Opens one stream a prompt at once on one channel, generates greedily to the full length, and times each token's
    arrival; takes down what processor time that cost the front end."""
    before = processor_seconds(server.process_id)
    measurement = uvloop.run(_run(server.address, model, workload, prompts))
    after = processor_seconds(server.process_id)
    if before is None or after is None:
        return measurement
    return dataclasses.replace(measurement, front_end_cpu_s=after - before)


async def _run(address: str, model: str, workload: Workload, prompts: Sequence[Sequence[int]]) -> Measurement:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        start = time.perf_counter()
        times = await asyncio.gather(*(_stream(stub, model, workload, prompt) for prompt in prompts))
    return measured(NAME, workload, start, times)


async def _stream(
    stub: generation_pb2_grpc.GenerationServiceAsyncStub, model: str, workload: Workload, prompt: Sequence[int]
) -> list[float]:
    request = generation_pb2.GenerateStreamRequest(
        model=model,
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParameters(temperature=0.0),
        stopping=generation_pb2.StoppingParameters(max_tokens=workload.new_tokens, ignore_eos=True),
    )
    times: list[float] = []
    async for message in stub.GenerateStream(request):
        now = time.perf_counter()
        times.extend(now for _token in message.token_ids)
    if len(times) != workload.new_tokens:
        raise RuntimeError(f"a stream ended after {len(times)} of {workload.new_tokens} tokens")
    return times
