"""A workload on a running server, streamed over gRPC from this process."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc.aio

from kvfold.v1 import generation_pb2, generation_pb2_grpc
from kvfold_server.bench.measurement import Measurement, Workload, measured

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "kvfold-grpc"


def run_grpc(address: str, model: str, workload: Workload, prompts: Sequence[Sequence[int]]) -> Measurement:
    """Opens one stream a prompt at once on one channel, generates greedily to the full length, and times each token's
    arrival."""
    return asyncio.run(_run(address, model, workload, prompts))


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
