"""The keyword arguments of the clients' methods, written down once for the asynchronous and the synchronous client."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class CallOptions(TypedDict, total=False):
    """Of every method.

    - `model`: the model's name; may be left out if the server hosts one model.
    - `timeout`: seconds until the call fails with `DeadlineExceededError`; None for no deadline. Default: the client's.
    - `metadata`: gRPC metadata of this call, beside the client's own.
    """

    model: str
    timeout: float | None
    metadata: Mapping[str, str]


class GenerationOptions(CallOptions, total=False):
    """Of `generate` and `stream`. What is left out or None has the server's default.

    How the next token is chosen:

    - `temperature`: 0 for the most probable token (greedy); default 1.
    - `top_k`, `top_p`, `min_p`: drop improbable tokens; default off.
    - `repetition_penalty`, `presence_penalty`, `frequency_penalty`: against repetition; default off.
    - `seed`: makes sampling reproducible.
    - `logit_bias`: added to the logits of these token ids.

    When generation ends:

    - `max_tokens`: default 256, or what is left of the context.
    - `stop_strings`: one or more texts that end the answer and are not part of it.
    - `stop_token_ids`: token ids that do the same.
    - `ignore_eos`: go on at the model's own end-of-sequence tokens.

    What quality is asked for:

    - `shared_layers`: how many layers read another layer's KV instead of storing their own; 0 (default) is exact.

    What is returned beside the text:

    - `logprobs`, `prompt_logprobs`: log-probabilities in the answer and the prompt, with this many alternatives.
    - `skip_special_tokens`: leave marks such as end-of-turn out of the text; default true.

    For a chat:

    - `continue_final_message`: go on with the last message, the assistant's, instead of a new answer.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    max_tokens: int | None
    stop_strings: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    shared_layers: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    continue_final_message: bool
