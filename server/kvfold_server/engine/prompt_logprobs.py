"""Collecting the log-probabilities of a prompt while its chunks are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.engine.logprobs import position_logprobs

if TYPE_CHECKING:
    import torch

    from kvfold_server.generation.events import PositionLogprobs


class PromptLogprobs:
    """Scores every prompt token but the first, with `top_count` alternatives each."""

    first_position = 0

    def __init__(self, prompt: tuple[int, ...], top_count: int) -> None:
        self._prompt = prompt
        self._top_count = top_count
        self._entries: list[PositionLogprobs] = []
        self._taken = False

    def score(self, position: int, logits: torch.Tensor) -> None:
        """Takes the logits of positions that were not scored before and have a prompt token after them."""
        first = max(position, len(self._entries))
        stop = min(position + logits.shape[0], len(self._prompt) - 1)
        if first < stop:
            rows = logits[first - position : stop - position]
            self._entries.extend(position_logprobs(rows, self._prompt[first + 1 : stop + 1], self._top_count))

    def take(self) -> tuple[PositionLogprobs, ...] | None:
        """All entries, once, when the whole prompt has been scored; None before and after."""
        if self._taken or len(self._entries) < len(self._prompt) - 1:
            return None
        self._taken = True
        return tuple(self._entries)
