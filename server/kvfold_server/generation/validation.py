"""The one validator at the engine's boundary: all requests pass it, and nothing behind it checks again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvfold_server.generation.errors import InvalidRequestError, UnmetPreconditionError
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.generation.draft import GenerationDraft, SamplingDraft, StoppingDraft
    from kvfold_server.generation.model_info import ModelInfo

DEFAULT_MAX_TOKENS = 256
MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_LOGPROB_ENTRIES = 2**18
"""Tokens times (alternatives + 1).

At 12 bytes an entry a message stays below 4 MiB, the most that gRPC clients take by default.
"""


def validate(
    draft: GenerationDraft,
    prompt: Sequence[int],
    *,
    prompt_field: str,
    info: ModelInfo,
    request_id: RequestId,
    default_seed: int,
) -> GenerationRequest:
    """Checks a request against a model and fills in every default.

    `prompt_field` is the path of the field that the prompt came from. Raises InvalidRequestError, naming the field, or
    UnmetPreconditionError if the model's sharing plan is not as deep as the request wants.
    """
    validate_prompt(prompt, prompt_field, info)
    max_tokens = _max_tokens(draft.stopping, len(prompt), info)
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=_sampling(draft.sampling, info, default_seed),
        max_tokens=max_tokens,
        stop_token_ids=_stop_tokens(draft.stopping, info),
        shared_layers=_shared_layers(draft.shared_layers, info),
        logprobs=_logprobs(draft.logprobs, max_tokens, "options.logprobs"),
        prompt_logprobs=_logprobs(draft.prompt_logprobs, len(prompt), "options.prompt_logprobs"),
    )


def validate_prompt(prompt: Sequence[int], field: str, info: ModelInfo) -> None:
    """Checks that a prompt has tokens, that they exist, and that the context has room for an answer."""
    if not prompt:
        raise InvalidRequestError(field, "the prompt has no tokens")
    if len(prompt) >= info.context_length:
        raise InvalidRequestError(
            field, f"the prompt has {len(prompt)} tokens; a context of {info.context_length} has no room for an answer"
        )
    validate_token_ids(prompt, field, info)


def validate_token_ids(token_ids: Sequence[int], field: str, info: ModelInfo) -> None:
    """Checks that every token id is one of the model's."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < info.vocabulary_size:
        index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < info.vocabulary_size)
        raise InvalidRequestError(f"{field}[{index}]", _not_a_token(token_ids[index], info))


def _sampling(draft: SamplingDraft, info: ModelInfo, default_seed: int) -> SamplingParameters:
    seed = default_seed if draft.seed is None else draft.seed
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequestError("sampling.seed", "must be an unsigned 64-bit number")
    if draft.top_k is not None and draft.top_k < 0:
        raise InvalidRequestError("sampling.top_k", "must not be negative")
    return SamplingParameters(
        temperature=_number(draft.temperature, 1.0, "sampling.temperature", 0, 100),
        top_k=draft.top_k or 0,
        top_p=_number(draft.top_p, 1.0, "sampling.top_p", 0, 1, above_low=True),
        min_p=_number(draft.min_p, 0.0, "sampling.min_p", 0, 1),
        repetition_penalty=_number(
            draft.repetition_penalty, 1.0, "sampling.repetition_penalty", 0, 100, above_low=True
        ),
        presence_penalty=_number(draft.presence_penalty, 0.0, "sampling.presence_penalty", -2, 2),
        frequency_penalty=_number(draft.frequency_penalty, 0.0, "sampling.frequency_penalty", -2, 2),
        seed=seed,
        logit_bias=_logit_bias(draft, info),
    )


def _logit_bias(draft: SamplingDraft, info: ModelInfo) -> dict[int, float]:
    if len(draft.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequestError("sampling.logit_bias", f"has more than {MAX_LOGIT_BIASES} entries")
    for token_id, bias in draft.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        if not 0 <= token_id < info.vocabulary_size:
            raise InvalidRequestError(field, _not_a_token(token_id, info))
        _number(bias, 0.0, field, -100, 100)
    return dict(draft.logit_bias)


def _max_tokens(draft: StoppingDraft, prompt_tokens: int, info: ModelInfo) -> int:
    left = info.context_length - prompt_tokens
    if draft.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, left)
    if draft.max_tokens < 1:
        raise InvalidRequestError("stopping.max_tokens", "must be at least 1")
    if draft.max_tokens > left:
        raise InvalidRequestError(
            "stopping.max_tokens",
            f"prompt of {prompt_tokens} tokens, context of {info.context_length}: at most {left} can be generated",
        )
    return draft.max_tokens


def _stop_tokens(draft: StoppingDraft, info: ModelInfo) -> frozenset[int]:
    if len(draft.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stopping.stop_strings", f"has more than {MAX_STOP_STRINGS} entries")
    for index, string in enumerate(draft.stop_strings):
        if not 1 <= len(string) <= MAX_STOP_STRING_LENGTH:
            raise InvalidRequestError(
                f"stopping.stop_strings[{index}]", f"must have 1 to {MAX_STOP_STRING_LENGTH} characters"
            )
    if len(draft.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequestError("stopping.stop_token_ids", f"has more than {MAX_STOP_TOKENS} entries")
    validate_token_ids(draft.stop_token_ids, "stopping.stop_token_ids", info)
    own = frozenset() if draft.ignore_eos else info.eos_token_ids
    return own | frozenset(draft.stop_token_ids)


def _shared_layers(depth: int | None, info: ModelInfo) -> int:
    if depth is None:
        return 0
    if depth < 0:
        raise InvalidRequestError("quality.shared_layers", "must not be negative")
    if depth > info.plan.max_depth:
        raise UnmetPreconditionError(
            "SHARING_DEPTH",
            "quality.shared_layers",
            f"{depth} shared layers were asked for; the model's sharing plan has {info.plan.max_depth}",
        )
    return depth


def _logprobs(alternatives: int | None, tokens: int, field: str) -> int | None:
    if alternatives is None:
        return None
    if not 0 <= alternatives <= MAX_LOGPROBS:
        raise InvalidRequestError(field, f"must be 0 to {MAX_LOGPROBS}")
    if tokens * (alternatives + 1) > MAX_LOGPROB_ENTRIES:
        raise InvalidRequestError(
            field, f"{alternatives + 1} entries for each of {tokens} tokens are more than {MAX_LOGPROB_ENTRIES}"
        )
    return alternatives


def _number(
    value: float | None, default: float, field: str, low: float, high: float, *, above_low: bool = False
) -> float:
    """The value, or the default; NaN passes every comparison, so finiteness is asked first."""
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        raise InvalidRequestError(field, f"must be {'above' if above_low else 'at least'} {low} and at most {high}")
    return value


def _not_a_token(token_id: int, info: ModelInfo) -> str:
    return f"{token_id} is not a token; the model has {info.vocabulary_size}"
