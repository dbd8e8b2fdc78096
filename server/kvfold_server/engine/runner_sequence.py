"""What the runner keeps of a sequence: its tokens, and what is to be done with its logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from kvfold_server.generation.request import GenerationRequest


class PositionScorer(Protocol):
    """Looks at the logits of a sequence's known tokens as they are computed: prompt log-probabilities, evaluation."""

    first_position: int
    """Logits of earlier positions are not computed for it."""

    def score(self, position: int, logits: torch.Tensor) -> None:
        """Receives logits [positions, vocabulary] in the model's dtype: those at `position` and after it, in order.

        The logits at position p are of the token at p + 1. A position is scored again if the sequence was preempted.
        """
        ...


@dataclass(slots=True)
class RunnerSequence:
    """A request with its tokens so far. `answer` grows by one with each token that is chosen."""

    request: GenerationRequest
    scorer: PositionScorer | None = None
    prompt: list[int] = field(init=False)
    answer: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = list(self.request.prompt_token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """The tokens at positions [start, start + count)."""
        split = len(self.prompt)
        stop = start + count
        if start >= split:
            return self.answer[start - split : stop - split]
        if stop <= split:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.answer[: stop - split]
