"""Between the messages of `kvfold.v1` and the domain types: nothing else in the front end knows both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
from kvfold_server.generation.answer import EndReason
from kvfold_server.generation.draft import (
    ChatMessage,
    ChatPrompt,
    GenerationDraft,
    SamplingDraft,
    StoppingDraft,
    TextPrompt,
    TokenPrompt,
)
from kvfold_server.generation.errors import InvalidRequestError
from kvfold_server.wire import describe_model, encode_position, encode_report

if TYPE_CHECKING:
    from kvfold_server.generation.answer import AnswerChunk, AnswerEnd
    from kvfold_server.generation.draft import Prompt
    from kvfold_server.rpc.hosted_model import HostedModel

    GenerationMessage = generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest

ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}

END_REASONS = {
    EndReason.STOP: generation_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def parse_prompt(message: GenerationMessage) -> Prompt:
    """The prompt of a request. Raises InvalidRequestError."""
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "token_ids":
            return TokenPrompt(tuple(message.token_ids.ids))
        case "chat":
            return _parse_chat(message.chat)
        case _:
            raise InvalidRequestError("input", "one of prompt, token_ids and chat is required")


def parse_tokenize_prompt(message: generation_pb2.TokenizeRequest) -> Prompt:
    """What is to be tokenized. Raises InvalidRequestError."""
    match message.WhichOneof("input"):
        case "text":
            return TextPrompt(message.text, field="text")
        case "chat":
            return _parse_chat(message.chat)
        case _:
            raise InvalidRequestError("input", "one of text and chat is required")


def parse_draft(message: GenerationMessage) -> GenerationDraft:
    """A request without its prompt, unchecked."""
    options = message.options
    return GenerationDraft(
        sampling=_parse_sampling(message.sampling),
        stopping=_parse_stopping(message.stopping),
        shared_layers=message.quality.shared_layers if message.quality.HasField("shared_layers") else None,
        logprobs=options.logprobs if options.HasField("logprobs") else None,
        prompt_logprobs=options.prompt_logprobs if options.HasField("prompt_logprobs") else None,
    )


def skip_special_tokens(
    message: generation_pb2.OutputOptions | generation_pb2.DetokenizeRequest,
) -> bool:
    """Whether special tokens are left out of the text: by default they are."""
    return message.skip_special_tokens if message.HasField("skip_special_tokens") else True


def stream_response(chunk: AnswerChunk, prompt_tokens: int | None) -> generation_pb2.GenerateStreamResponse:
    """A chunk as a message. `prompt_tokens` is given with the first one."""
    response = generation_pb2.GenerateStreamResponse(text=chunk.text, token_ids=chunk.token_ids)
    if chunk.logprobs:
        response.logprobs.extend(map(encode_position, chunk.logprobs))
    if prompt_tokens is not None:
        response.prompt.CopyFrom(_prompt_info(chunk, prompt_tokens))
    if chunk.end is not None:
        response.finish.CopyFrom(_finish_info(chunk.end))
    return response


def add_to_response(response: generation_pb2.GenerateResponse, chunk: AnswerChunk, prompt_tokens: int | None) -> None:
    """Adds a chunk to a whole answer; the text is left to the caller, since strings do not grow cheaply."""
    response.token_ids.extend(chunk.token_ids)
    if chunk.logprobs:
        response.logprobs.extend(map(encode_position, chunk.logprobs))
    if prompt_tokens is not None:
        response.prompt.CopyFrom(_prompt_info(chunk, prompt_tokens))
    if chunk.end is not None:
        response.finish.CopyFrom(_finish_info(chunk.end))


def model_summary(model: HostedModel) -> model_pb2.ModelSummary:
    """A model in a list."""
    return model_pb2.ModelSummary(name=model.name, ready=model.ready)


def model_response(model: HostedModel) -> model_pb2.GetModelResponse:
    """A model's description. Raises EngineUnavailableError until it has been loaded."""
    response = describe_model(model.info)
    response.name = model.name
    return response


def model_memory(model: HostedModel) -> memory_pb2.ModelMemory:
    """The state of a model's pool; only its name while its engine is not up."""
    snapshot = model.handle.snapshot
    info = model.handle.info
    if snapshot is None or info is None or not model.ready:
        return memory_pb2.ModelMemory(model=model.name)
    states = {
        memory_pb2.BLOCK_STATE_FREE: snapshot.free_bytes,
        memory_pb2.BLOCK_STATE_PREFILL: snapshot.prefill_bytes,
        memory_pb2.BLOCK_STATE_DECODE: snapshot.decode_bytes,
    }
    return memory_pb2.ModelMemory(
        model=model.name,
        pool_bytes=snapshot.pool_bytes,
        block_bytes=info.geometry.block_bytes,
        tokens_per_block=info.geometry.tokens_per_block,
        states=[memory_pb2.BlockStateBytes(state=state, bytes=count) for state, count in states.items()],
        running_requests=snapshot.running_requests,
        waiting_requests=snapshot.waiting_requests,
        kv_bytes_held=snapshot.kv_bytes_held,
        kv_bytes_full=snapshot.kv_bytes_full,
        kv_bytes_saved=snapshot.kv_bytes_full - snapshot.kv_bytes_held,
        ready=True,
    )


def _parse_chat(chat: generation_pb2.Chat) -> ChatPrompt:
    messages = []
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequestError(f"chat.messages[{index}].role", "must be system, user or assistant")
        messages.append(ChatMessage(ROLES[message.role], message.content))
    return ChatPrompt(tuple(messages), chat.continue_final_message)


def _parse_sampling(sampling: generation_pb2.SamplingParameters) -> SamplingDraft:
    given = {field.name: value for field, value in sampling.ListFields() if field.name != "logit_bias"}
    return SamplingDraft(**given, logit_bias=dict(sampling.logit_bias))


def _parse_stopping(stopping: generation_pb2.StoppingParameters) -> StoppingDraft:
    return StoppingDraft(
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop_strings=tuple(stopping.stop_strings),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )


def _prompt_info(chunk: AnswerChunk, prompt_tokens: int) -> generation_pb2.PromptInfo:
    return generation_pb2.PromptInfo(
        token_count=prompt_tokens, logprobs=map(encode_position, chunk.prompt_logprobs or ())
    )


def _finish_info(end: AnswerEnd) -> generation_pb2.FinishInfo:
    info = generation_pb2.FinishInfo(
        reason=END_REASONS[end.reason],
        usage=generation_pb2.Usage(prompt_tokens=end.prompt_tokens, completion_tokens=end.completion_tokens),
        memory=encode_report(end.memory),
    )
    if end.stop_string is not None:
        info.stop_string = end.stop_string
    if end.stop_token_id is not None:
        info.stop_token_id = end.stop_token_id
    return info
