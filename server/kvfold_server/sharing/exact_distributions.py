"""How far folded next-token distributions are from the exact ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS_AT_ONCE = 128
"""Distributions in 32-bit floats at a time: 25 MB for 50,000 tokens, which stays near the caches."""


class ExactDistributions:
    """The next-token distributions of the unmodified model, to compare folded ones with.

    Made from logits [samples, positions, vocabulary]; keeps probabilities in 32-bit floats, so four bytes per entry.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        rows = logits.flatten(0, -2)
        self._probabilities = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        self._negative_entropy = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
        for part in _parts(rows.shape[0]):
            log_probabilities = rows[part].float().log_softmax(dim=-1)
            probabilities = log_probabilities.exp()
            self._probabilities[part] = probabilities
            self._negative_entropy[part] = _dot(probabilities, log_probabilities)

    def kl(self, logits: torch.Tensor) -> torch.Tensor:
        """KL(exact || folded) in nats of each position, from folded logits of the same shape: float64 [samples *
        positions]."""
        rows = logits.flatten(0, -2)
        if rows.shape != self._probabilities.shape:
            raise ValueError(f"logits of shape {tuple(rows.shape)} against {tuple(self._probabilities.shape)}")
        result = torch.empty_like(self._negative_entropy)
        for part in _parts(rows.shape[0]):
            # -sum p log q = log of q's normaliser - sum p logit, which saves writing log q.
            folded = rows[part].float()
            result[part] = (
                self._negative_entropy[part] + folded.logsumexp(dim=-1) - _dot(self._probabilities[part], folded)
            )
        return result


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    products: torch.Tensor = torch.linalg.vecdot(one, other)
    return products


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, rows, _ROWS_AT_ONCE))
