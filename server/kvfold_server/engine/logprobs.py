"""Log-probabilities of chosen and most probable tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.generation.events import PositionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def position_logprobs(logits: torch.Tensor, tokens: Sequence[int], top_count: int) -> tuple[PositionLogprobs, ...]:
    """One entry a row of `logits` [rows, vocabulary]: the row's token and the `top_count` most probable ones."""
    logprobs = logits.float().log_softmax(dim=-1)
    index = logprobs.new_tensor(tokens).long()[:, None]
    chosen = logprobs.gather(1, index).squeeze(1).tolist()
    top = logprobs.topk(min(top_count, logprobs.shape[-1]), dim=-1)
    return tuple(
        PositionLogprobs(
            TokenLogprob(token, logprob),
            tuple(TokenLogprob(other, value) for other, value in zip(others, values, strict=True)),
        )
        for token, logprob, others, values in zip(
            tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    )
