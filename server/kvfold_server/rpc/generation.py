"""GenerationService."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from kvfold.v1 import generation_pb2, generation_pb2_grpc
from kvfold_server.generation.errors import DeadlineError
from kvfold_server.generation.validation import validate, validate_token_ids
from kvfold_server.rpc import conversion
from kvfold_server.rpc.running_answer import RunningAnswer

if TYPE_CHECKING:
    import grpc

    from kvfold_server.generation.request import GenerationRequest
    from kvfold_server.rpc.conversion import GenerationMessage
    from kvfold_server.rpc.hosted_model import HostedModel, HostedModels

    Context = grpc.aio.ServicerContext[Any, Any]

ANSWER_MARGIN = 0.02
MAX_ANSWER_MARGIN = 0.05
"""A call ends a little before its deadline, by a part of the time and at most 50 ms, so that the client learns from the
status what the time was spent on; at the deadline its own library would end the call without asking."""


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Tokenizes, validates, submits, and sends what comes back. RequestErrors are left to the boundary."""

    def __init__(self, models: HostedModels) -> None:
        self._models = models

    async def Generate(  # noqa: N802, gRPC's names
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """A whole answer."""
        deadline = _deadline(context)
        model = self._models.find(request.model)
        validated = await _validated(request, model, deadline)
        response = generation_pb2.GenerateResponse(model=model.name)
        texts: list[str] = []
        prompt_tokens: int | None = len(validated.prompt_token_ids)
        with _submitted(request, validated, model, deadline) as answer:
            while not response.HasField("finish"):
                chunk = await answer.next()
                texts.append(chunk.text)
                conversion.add_to_response(response, chunk, prompt_tokens)
                prompt_tokens = None
        response.text = "".join(texts)
        return response

    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: generation_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        """A streamed answer. While a message is being written, further tokens are joined to the next one.

        A step brings tokens for many streams. All are put into words first, then all are sent: taking turns for each
        stream costs a sixth more processor time, since neither work finds its code in the caches.
        """
        deadline = _deadline(context)
        model = self._models.find(request.model)
        validated = await _validated(request, model, deadline)
        prompt_tokens: int | None = len(validated.prompt_token_ids)
        with _submitted(request, validated, model, deadline) as answer:
            finished = False
            while not finished:
                chunk = await answer.next()
                finished = chunk.end is not None
                message = conversion.stream_response(chunk, prompt_tokens)
                await asyncio.sleep(0)  # the others' turn to put theirs into words
                await context.write(message)
                prompt_tokens = None

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, _context: Context
    ) -> generation_pb2.TokenizeResponse:
        """The tokens of a text or a chat."""
        model = self._models.find(request.model)
        prompt = conversion.parse_tokenize_prompt(request)
        return generation_pb2.TokenizeResponse(token_ids=await model.text.tokens(prompt))

    async def Detokenize(  # noqa: N802
        self, request: generation_pb2.DetokenizeRequest, _context: Context
    ) -> generation_pb2.DetokenizeResponse:
        """The text of some tokens."""
        model = self._models.find(request.model)
        token_ids = list(request.token_ids)
        validate_token_ids(token_ids, "token_ids", model.info)
        text = model.text.tokenizer.decode(token_ids, skip_special_tokens=conversion.skip_special_tokens(request))
        return generation_pb2.DetokenizeResponse(text=text)


def _deadline(context: Context) -> float | None:
    """When the call has to end, by the event loop's clock. Asked once: the wall clock may jump, this one does not."""
    remaining = context.time_remaining()
    if remaining is None:
        return None
    return asyncio.get_running_loop().time() + remaining - min(ANSWER_MARGIN * remaining, MAX_ANSWER_MARGIN)


async def _validated(message: GenerationMessage, model: HostedModel, deadline: float | None) -> GenerationRequest:
    draft = conversion.parse_draft(message)
    prompt = conversion.parse_prompt(message)
    tokens = await model.text.tokens(prompt)
    if deadline is not None and asyncio.get_running_loop().time() >= deadline:
        raise DeadlineError("tokenizing")
    return validate(
        draft,
        tokens,
        prompt_field=prompt.field,
        info=model.info,
        request_id=model.handle.new_request_id(),
        default_seed=secrets.randbits(64),
    )


def _submitted(
    message: GenerationMessage, request: GenerationRequest, model: HostedModel, deadline: float | None
) -> RunningAnswer:
    return RunningAnswer(
        model.handle,
        request,
        model.text.tokenizer,
        stop_strings=tuple(message.stopping.stop_strings),
        skip_special_tokens=conversion.skip_special_tokens(message.options),
        deadline=deadline,
    )
