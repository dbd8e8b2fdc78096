"""Arguments arrive in the fields that carry their names."""

from __future__ import annotations

from typing import Any

import pytest

from kvfold.v1 import generation_pb2
from kvfold_client import AsyncClient, ChatMessage, GenerationOptions

EVERY_OPTION: GenerationOptions = {
    "model": "tiny",
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "seed": 2**64 - 1,
    "logit_bias": {3: -1.0},
    "max_tokens": 9,
    "stop_strings": ["END"],
    "stop_token_ids": [4, 5],
    "ignore_eos": True,
    "shared_layers": 8,
    "logprobs": 2,
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
}


async def test_every_option_reaches_its_field(server: Any, client: AsyncClient) -> None:
    await client.generate("a prompt", **EVERY_OPTION)
    assert server.calls[0].request == generation_pb2.GenerateRequest(
        model="tiny",
        prompt="a prompt",
        sampling=generation_pb2.SamplingParameters(
            temperature=0.5,
            top_k=5,
            top_p=0.75,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            seed=2**64 - 1,
            logit_bias={3: -1.0},
        ),
        stopping=generation_pb2.StoppingParameters(
            max_tokens=9, stop_strings=["END"], stop_token_ids=[4, 5], ignore_eos=True
        ),
        quality=generation_pb2.Quality(shared_layers=8),
        options=generation_pb2.OutputOptions(logprobs=2, prompt_logprobs=0, skip_special_tokens=False),
    )


async def test_a_stream_and_a_whole_answer_ask_for_the_same(server: Any, client: AsyncClient) -> None:
    await client.generate([1, 2], **EVERY_OPTION)
    async with client.stream([1, 2], **EVERY_OPTION) as stream:
        _ = [chunk async for chunk in stream]
    whole, streamed = (call.request for call in server.calls)
    assert whole.SerializeToString(deterministic=True) == streamed.SerializeToString(deterministic=True)


def test_there_is_an_option_for_every_field_of_the_api() -> None:
    groups = (
        generation_pb2.SamplingParameters,
        generation_pb2.StoppingParameters,
        generation_pb2.Quality,
        generation_pb2.OutputOptions,
    )
    fields = {name for group in groups for name in group.DESCRIPTOR.fields_by_name}
    others = {"model", "timeout", "metadata", "continue_final_message"}
    assert set(GenerationOptions.__annotations__) == fields | others


async def test_what_is_left_out_is_not_set(server: Any, client: AsyncClient) -> None:
    await client.generate("a prompt", temperature=None)
    request = server.calls[0].request
    for group in (request.sampling, request.stopping, request.quality, request.options):
        assert group.ListFields() == []


async def test_zero_is_not_left_out(server: Any, client: AsyncClient) -> None:
    await client.generate("a prompt", temperature=0, shared_layers=0)
    request = server.calls[0].request
    assert request.sampling.HasField("temperature")
    assert request.quality.HasField("shared_layers")


async def test_token_ids_are_sent_as_they_are(server: Any, client: AsyncClient) -> None:
    await client.generate((0, 4, 2))
    assert list(server.calls[0].request.token_ids.ids) == [0, 4, 2]


async def test_a_chat_may_mix_messages_and_mappings(server: Any, client: AsyncClient) -> None:
    chat = [ChatMessage("system", "Be brief."), {"role": "user", "content": "Hi"}, ChatMessage("assistant", "He")]
    await client.generate(chat, continue_final_message=True)
    assert server.calls[0].request.chat == generation_pb2.Chat(
        messages=[
            generation_pb2.ChatMessage(role=generation_pb2.ROLE_SYSTEM, content="Be brief."),
            generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER, content="Hi"),
            generation_pb2.ChatMessage(role=generation_pb2.ROLE_ASSISTANT, content="He"),
        ],
        continue_final_message=True,
    )


async def test_one_stop_string_needs_no_list(server: Any, client: AsyncClient) -> None:
    await client.generate("a prompt", stop_strings="END")
    assert list(server.calls[0].request.stopping.stop_strings) == ["END"]


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("p", {"temprature": 1}, (TypeError, "'temprature'")),
        ("p", {"max_tokens": -1}, (ValueError, "max_tokens=-1")),
        ("p", {"temperature": "hot"}, (TypeError, "temperature='hot'")),
        ([], {}, (ValueError, "the prompt is empty")),
        ([{"role": "robot", "content": "x"}], {}, (ValueError, "'robot'")),
        ([{"role": "user", "text": "x"}], {}, (TypeError, '"role" and "content"')),
    ],
)
async def test_what_no_message_can_hold_is_refused_before_it_is_sent(
    server: Any, client: AsyncClient, prompt: Any, options: Any, error: Any
) -> None:
    kind, message = error
    with pytest.raises(kind, match=message):
        await client.generate(prompt, **options)
    assert server.calls == []


async def test_tokenizing_and_detokenizing(server: Any, client: AsyncClient) -> None:
    assert await client.tokenize("abc", model="tiny") == (1, 2, 3)
    assert await client.tokenize([{"role": "user", "content": "Hi"}]) == (1, 2, 3)
    assert await client.detokenize([1, 2, 3], skip_special_tokens=False) == "abc"
    text, chat, back = (call.request for call in server.calls)
    assert (text.model, text.text) == ("tiny", "abc")
    assert chat.chat.messages[0].content == "Hi"
    assert (list(back.token_ids), back.skip_special_tokens) == ([1, 2, 3], False)


async def test_the_interval_of_watching_is_sent(server: Any, client: AsyncClient) -> None:
    async with client.watch_memory(interval=0.25, model="tiny") as stream:
        await anext(stream)
    request = server.calls[0].request
    assert (request.model, request.interval.ToNanoseconds()) == ("tiny", 250_000_000)


async def test_metadata_of_the_client_and_of_the_call_are_sent(server: Any) -> None:
    async with AsyncClient(server.address, metadata={"authorization": "Bearer k", "a": "1"}) as client:
        await client.list_models(metadata={"a": "2"})
        with pytest.raises(TypeError, match="'model'"):
            await client.list_models(model="tiny")
    received = server.calls[0].metadata
    assert (received["authorization"], received["a"]) == ("Bearer k", "2")
