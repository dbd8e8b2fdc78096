"""Results are typed and say what the messages say."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

import kvfold_client
from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
from kvfold_client import AsyncClient, AttentionType, BlockState, Client, FinishReason

if TYPE_CHECKING:
    from google.protobuf.message import Message


async def test_a_whole_answer(client: AsyncClient) -> None:
    answer = await client.generate("a prompt")
    assert (answer.model, answer.text, answer.token_ids) == ("tiny", "Hello world", (7, 8))
    assert answer.prompt.token_count == 3
    assert answer.finish.reason is FinishReason.LENGTH
    assert (answer.finish.stop_string, answer.finish.stop_token_id) == (None, None)
    assert answer.finish.usage == kvfold_client.Usage(prompt_tokens=3, completion_tokens=2)
    assert answer.finish.memory == kvfold_client.MemoryReport(
        shared_layers=8,
        kv_bytes_held=220,
        kv_bytes_full=300,
        kv_bytes_saved=80,
        kv_bytes_held_peak=220,
        preemptions=0,
    )


async def test_logprobs_and_what_ended_the_answer(server: Any, client: AsyncClient) -> None:
    position = generation_pb2.PositionLogprobs(
        token=generation_pb2.TokenLogprob(token_id=7, logprob=-0.5),
        top=[generation_pb2.TokenLogprob(token_id=9, logprob=-0.25)],
    )
    server.answers["Generate"] = lambda request, context: generation_pb2.GenerateResponse(
        prompt=generation_pb2.PromptInfo(logprobs=[position]),
        logprobs=[position],
        finish=generation_pb2.FinishInfo(reason=generation_pb2.FINISH_REASON_STOP, stop_token_id=0),
    )
    answer = await client.generate("a prompt", logprobs=1, prompt_logprobs=1)
    assert answer.logprobs == answer.prompt.logprobs
    assert answer.logprobs[0].token == kvfold_client.TokenLogprob(7, -0.5)
    assert answer.logprobs[0].top == (kvfold_client.TokenLogprob(9, -0.25),)
    assert answer.finish.reason is FinishReason.STOP
    assert (answer.finish.stop_string, answer.finish.stop_token_id) == (None, 0)


async def test_a_model_and_its_plan(server: Any, client: AsyncClient) -> None:
    described = model_pb2.GetModelResponse(
        name="tiny",
        context_length=64,
        layers=[model_pb2.Layer(attention=model_pb2.ATTENTION_TYPE_SLIDING, window=8, kv_heads=2)],
        kv_bytes_per_token=128,
        plan=model_pb2.SharingPlan(
            strategy="paper",
            entries=[model_pb2.SharingEntry(sharer=1, owner=0)],
            depths=[model_pb2.DepthQuality(shared_layers=1, kv_bytes_per_token=64, quality_cost=0.5)],
        ),
    )
    server.answers["GetModel"] = lambda request, context: described
    model = await client.get_model()
    assert (model.name, model.context_length, model.kv_bytes_per_token) == ("tiny", 64, 128)
    assert (model.layers[0].attention, model.layers[0].window) == (AttentionType.SLIDING, 8)
    assert model.plan is not None
    assert model.plan.entries == (kvfold_client.SharingEntry(sharer=1, owner=0),)
    assert model.plan.depths[0].quality_cost == 0.5


async def test_a_model_without_a_plan_has_none(client: AsyncClient) -> None:
    assert (await client.get_model()).plan is None


def test_models_and_memory(sync_client: Client) -> None:
    assert sync_client.list_models() == (kvfold_client.ModelSummary(name="tiny", ready=True),)
    (pool,) = sync_client.get_memory()
    assert pool.state_bytes == {BlockState.FREE: 700, BlockState.PREFILL: 100, BlockState.DECODE: 200}
    assert (pool.model, pool.ready, pool.pool_bytes, pool.kv_bytes_saved) == ("tiny", True, 1000, 100)


async def test_values_of_a_newer_server_are_not_fatal(server: Any, client: AsyncClient) -> None:
    newer = memory_pb2.ModelMemory()
    newer.states.add(bytes=1).state = 90  # type: ignore[assignment]
    newer.states.add(bytes=2).state = 91  # type: ignore[assignment]
    server.answers["GetMemory"] = lambda request, context: memory_pb2.GetMemoryResponse(models=[newer])
    (pool,) = await client.get_memory()
    assert pool.state_bytes == {BlockState.UNSPECIFIED: 3}


@pytest.mark.parametrize(
    ("result", "message", "renamed"),
    [
        (kvfold_client.Generation, generation_pb2.GenerateResponse, {}),
        (kvfold_client.GenerationChunk, generation_pb2.GenerateStreamResponse, {}),
        (kvfold_client.FinishInfo, generation_pb2.FinishInfo, {}),
        (kvfold_client.Usage, generation_pb2.Usage, {}),
        (kvfold_client.MemoryReport, memory_pb2.MemoryReport, {}),
        (kvfold_client.ModelMemory, memory_pb2.ModelMemory, {"states": "state_bytes"}),
        (kvfold_client.ModelDescription, model_pb2.GetModelResponse, {}),
        (kvfold_client.SharingPlan, model_pb2.SharingPlan, {}),
        (kvfold_client.DepthQuality, model_pb2.DepthQuality, {}),
        (kvfold_client.Layer, model_pb2.Layer, {}),
    ],
)
def test_a_result_has_every_field_of_its_message(result: Any, message: type[Message], renamed: dict[str, str]) -> None:
    fields = {renamed.get(name, name) for name in message.DESCRIPTOR.fields_by_name}
    assert {field.name for field in dataclasses.fields(result)} == fields
