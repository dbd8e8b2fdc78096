"""From arguments to messages: the only file that builds requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kvfold.v1 import generation_pb2, memory_pb2, model_pb2
from kvfold_client.options import CallOptions, GenerationOptions
from kvfold_client.prompt import ChatMessage

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from kvfold_client.prompt import Chat, Prompt

_ROLES = {
    "system": generation_pb2.ROLE_SYSTEM,
    "user": generation_pb2.ROLE_USER,
    "assistant": generation_pb2.ROLE_ASSISTANT,
}
_GENERATION_OPTIONS = frozenset(GenerationOptions.__annotations__)
_CALL_OPTIONS = frozenset(CallOptions.__annotations__)

_Group = TypeVar("_Group", bound="Message")
_Request = TypeVar("_Request", generation_pb2.GenerateRequest, generation_pb2.GenerateStreamRequest)


def generation_request(kind: type[_Request], prompt: Prompt, options: GenerationOptions) -> _Request:
    """Builds a request for an answer.

    Raises TypeError or ValueError for what no message can hold. All else is the server's to judge.
    """
    _refuse_unknown(options, _GENERATION_OPTIONS)
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(values.get("stop_strings"), str):
        values["stop_strings"] = [values["stop_strings"]]
    request = kind(
        model=options.get("model", ""),
        sampling=_group(generation_pb2.SamplingParameters, values),
        stopping=_group(generation_pb2.StoppingParameters, values),
        quality=_group(generation_pb2.Quality, values),
        options=_group(generation_pb2.OutputOptions, values),
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    elif len(prompt) == 0:
        raise ValueError("the prompt is empty")
    elif isinstance(prompt[0], int):
        request.token_ids.ids.extend(cast("Sequence[int]", prompt))
    else:
        request.chat.CopyFrom(_chat(cast("Chat", prompt), options.get("continue_final_message", False)))
    return request


def tokenize_request(text: str | Chat, options: CallOptions) -> generation_pb2.TokenizeRequest:
    """Builds a request for the token ids of a text or a chat."""
    _refuse_unknown(options, _CALL_OPTIONS)
    model = options.get("model", "")
    if isinstance(text, str):
        return generation_pb2.TokenizeRequest(model=model, text=text)
    return generation_pb2.TokenizeRequest(model=model, chat=_chat(text, continue_final_message=False))


def detokenize_request(
    token_ids: Sequence[int], skip_special_tokens: bool | None, options: CallOptions
) -> generation_pb2.DetokenizeRequest:
    """Builds a request for the text of some tokens."""
    _refuse_unknown(options, _CALL_OPTIONS)
    return generation_pb2.DetokenizeRequest(
        model=options.get("model", ""), token_ids=token_ids, skip_special_tokens=skip_special_tokens
    )


def list_models_request(options: CallOptions) -> model_pb2.ListModelsRequest:
    """Builds a request for the list of models."""
    _refuse_unknown(options, _CALL_OPTIONS - {"model"})
    return model_pb2.ListModelsRequest()


def get_model_request(options: CallOptions) -> model_pb2.GetModelRequest:
    """Builds a request for the description of a model."""
    _refuse_unknown(options, _CALL_OPTIONS)
    return model_pb2.GetModelRequest(model=options.get("model", ""))


def get_memory_request(options: CallOptions) -> memory_pb2.GetMemoryRequest:
    """Builds a request for the state of the pools."""
    _refuse_unknown(options, _CALL_OPTIONS)
    return memory_pb2.GetMemoryRequest(model=options.get("model", ""))


def watch_memory_request(interval: float, options: CallOptions) -> memory_pb2.WatchMemoryRequest:
    """Builds a request to watch the pools every `interval` seconds."""
    _refuse_unknown(options, _CALL_OPTIONS)
    request = memory_pb2.WatchMemoryRequest(model=options.get("model", ""))
    request.interval.FromNanoseconds(round(interval * 1e9))
    return request


def _group(kind: type[_Group], values: Mapping[str, Any]) -> _Group:
    """Fills a group of parameters with the values that carry its fields' names."""
    group = kind()
    for name in kind.DESCRIPTOR.fields_by_name:
        if name in values:
            try:
                group.MergeFrom(kind(**{name: values[name]}))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}={values[name]!r}: {error}") from None
    return group


def _chat(messages: Chat, continue_final_message: bool) -> generation_pb2.Chat:
    chat = generation_pb2.Chat(continue_final_message=continue_final_message)
    for message in messages:
        if isinstance(message, Mapping) and message.keys() == {"role", "content"}:
            role, content = message["role"], message["content"]
        elif isinstance(message, ChatMessage):
            role, content = message.role, message.content
        else:
            raise TypeError(f'a chat message is a ChatMessage or a mapping of "role" and "content", not {message!r}')
        if role not in _ROLES:
            raise ValueError(f"the role of a chat message is one of {', '.join(_ROLES)}, not {role!r}")
        chat.messages.add(role=_ROLES[role], content=content)
    return chat


def _refuse_unknown(options: GenerationOptions | CallOptions, known: frozenset[str]) -> None:
    """Says what a misspelt keyword argument is, as Python does for arguments that are spelt out."""
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; there are {', '.join(sorted(known))}")
