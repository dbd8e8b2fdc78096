"""A request for generation, complete: every default is resolved before an engine sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping

RequestId = NewType("RequestId", int)
"""Minted by the server, unique for the life of an engine process."""


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is chosen from the logits; the ranges are those of `kvfold.v1.SamplingParameters`.

    `seed` and the position of a token determine the random number that chooses it, so a request's choices do not
    depend on its batch mates.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits before the choice."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.logit_bias
        )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What an engine needs to know to serve a request.

    `stop_token_ids` contains the model's end-of-sequence tokens unless the request ignores them. `logprobs` and
    `prompt_logprobs` are numbers of alternatives; None asks for no log-probabilities.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParameters
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    shared_layers: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
