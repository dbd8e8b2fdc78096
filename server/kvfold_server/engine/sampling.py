"""Choosing the next token of every sampling row of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold_server.engine.logit_changes import change_logits
from kvfold_server.engine.random_stream import uniform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.generation.request import SamplingParameters

FIRST_CANDIDATES = 1024
"""Filters look at this many most probable tokens first; a full sort of a vocabulary costs about fifty times as much."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the choice at one row depends on: the parameters, the tokens so far, and the position of the token to
    choose."""

    parameters: SamplingParameters
    prompt: list[int]
    answer: list[int]

    @property
    def position(self) -> int:
        """The position of the token to choose."""
        return len(self.prompt) + len(self.answer)


def choose_tokens(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """The next token of each row; None where the logits contain NaN.

    `logits` [rows, vocabulary] are the model's own, in any floating dtype; they are not changed. A row's choice
    depends on its own logits, parameters and tokens only.
    """
    best = logits.max(dim=-1)
    broken = best.values.isnan().tolist()
    chosen: list[int | None] = [
        None if nan else token for nan, token in zip(broken, best.indices.tolist(), strict=True)
    ]
    plain = [row.parameters.greedy and not row.parameters.changes_logits for row in rows]
    special = [index for index, row in enumerate(rows) if not plain[index] and not broken[index]]
    if not special:
        return chosen
    changed = logits[torch.tensor(special, device=logits.device)].float()
    for line, index in zip(changed, special, strict=True):
        if rows[index].parameters.changes_logits:
            change_logits(line, rows[index].parameters, rows[index].prompt, rows[index].answer)
    for index, token in zip(special, _choose(changed, [rows[index] for index in special]), strict=True):
        chosen[index] = token
    return chosen


def _choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Chooses from logits that already carry penalties: greedily, from the whole distribution, or from a filtered
    one."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    sampled = [index for index, row in enumerate(rows) if not row.parameters.greedy]
    filtered = [index for index in sampled if _filters(rows[index].parameters)]
    whole = [index for index in sampled if not _filters(rows[index].parameters)]
    for group, choose in ((whole, _from_all), (filtered, _from_filtered)):
        if group:
            index = torch.tensor(group, device=logits.device)
            members = [rows[member] for member in group]
            temperatures = _column([row.parameters.temperature for row in members], logits)
            draws = _column([uniform(row.parameters.seed, row.position) for row in members], logits)
            for member, token in zip(group, choose(logits[index] / temperatures, draws, members), strict=True):
                tokens[member] = token
    return tokens


def _filters(parameters: SamplingParameters) -> bool:
    return parameters.top_k > 0 or parameters.top_p < 1.0 or parameters.min_p > 0.0


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).to(like.dtype)[:, None]


def _from_all(logits: torch.Tensor, draws: torch.Tensor, _rows: Sequence[SamplingRow]) -> list[int]:
    """Inverse transform over the whole vocabulary in token order."""
    return _invert(logits.softmax(dim=-1), draws).tolist()


def _from_filtered(logits: torch.Tensor, draws: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """top_k, then top_p of what is left, then min_p, over tokens sorted by probability; then inverse transform."""
    vocabulary = logits.shape[-1]
    wanted = max((row.parameters.top_k for row in rows), default=0)
    count = min(vocabulary, max(FIRST_CANDIDATES, wanted))
    tokens, complete = _filtered_choice(logits, draws, rows, count)
    result = tokens.tolist()
    open_rows = [index for index, done in enumerate(complete.tolist()) if not done]
    if open_rows:
        index = torch.tensor(open_rows, device=logits.device)
        again, _ = _filtered_choice(logits[index], draws[index], [rows[row] for row in open_rows], vocabulary)
        for row, token in zip(open_rows, again.tolist(), strict=True):
            result[row] = token
    return result


def _filtered_choice(
    logits: torch.Tensor, draws: torch.Tensor, rows: Sequence[SamplingRow], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows] chosen among the `count` most probable, and whether no token beyond them could have passed the
    filters."""
    vocabulary = logits.shape[-1]
    values, candidates = logits.topk(count, dim=-1)
    limits = torch.tensor([min(row.parameters.top_k or vocabulary, vocabulary) for row in rows], device=logits.device)[
        :, None
    ]
    ranks = torch.arange(count, device=logits.device)
    within = ranks < limits
    kept_values = values.masked_fill(~within, float("-inf"))
    # The mass that top_p divides: of the top_k tokens, or of the whole vocabulary where top_k is off.
    total = torch.where(
        limits < vocabulary, kept_values.logsumexp(dim=-1, keepdim=True), logits.logsumexp(dim=-1, keepdim=True)
    )
    probabilities = (kept_values - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = _column([row.parameters.top_p for row in rows], logits)
    min_p = _column([row.parameters.min_p for row in rows], logits)
    keep = within & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    complete = (limits <= count).squeeze(1) | ~keep[:, -1]
    choice = _invert(probabilities * keep, draws)
    return candidates.gather(1, choice[:, None]).squeeze(1), complete


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of weights [rows, n] passes draw * total; never one of weight zero."""
    sums = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(sums, draws.double() * sums[:, -1:], right=True).squeeze(1)
    # A draw so close to 1 that rounding puts it past the end belongs to the last token that has weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)
