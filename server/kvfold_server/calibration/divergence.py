"""How far a folded model's predictions are from the exact ones."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

BOOTSTRAP_ROUNDS = 2000
ROWS_AT_ONCE = 64
"""Rows of logits that are turned into fp32 distributions together; more only take memory."""


@dataclass(frozen=True, slots=True)
class WindowDivergence:
    """Means over the scored tokens of one window, in nats per token; `top1_agreement` is a share of tokens.

    `kl` is KL(exact || folded) of the next-token distributions.
    """

    tokens: int
    nll_exact: float
    nll: float
    kl: float
    top1_agreement: float


def window_divergence(exact: torch.Tensor, folded: torch.Tensor, targets: torch.Tensor) -> WindowDivergence:
    """Compares logits [tokens, vocabulary] position by position; `targets` [tokens] are the tokens that really
    follow."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_exact = exact[rows].float().log_softmax(-1)
        log_folded = folded[rows].float().log_softmax(-1)
        index = targets[rows, None]
        kl = (log_exact.exp() * (log_exact - log_folded)).sum(-1)
        agree = log_exact.argmax(-1) == log_folded.argmax(-1)
        sums += torch.stack(
            [-log_exact.gather(1, index).sum(), -log_folded.gather(1, index).sum(), kl.sum(), agree.sum()]
        ).double()
    nll_exact, nll, kl_mean, agreement = (sums / len(targets)).tolist()
    return WindowDivergence(len(targets), nll_exact, nll, kl_mean, agreement)


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality over windows of equal length. `quality_cost` is exp(kl) - 1; its interval covers 95%, resampled by
    window."""

    perplexity_exact: float
    perplexity: float
    kl: float
    quality_cost: float
    quality_cost_low: float
    quality_cost_high: float
    top1_agreement: float


def summarize(windows: Sequence[WindowDivergence]) -> Quality:
    """The means of several windows, and a paired bootstrap interval: a window's exact and folded scores stay
    together."""
    count = len(windows)
    kl = sum(window.kl for window in windows) / count
    source = random.Random(0)  # noqa: S311 - resampling, not secrecy
    means = sorted(
        sum(window.kl for window in source.choices(windows, k=count)) / count for _ in range(BOOTSTRAP_ROUNDS)
    )
    return Quality(
        perplexity_exact=math.exp(sum(window.nll_exact for window in windows) / count),
        perplexity=math.exp(sum(window.nll for window in windows) / count),
        kl=kl,
        quality_cost=math.expm1(kl),
        quality_cost_low=math.expm1(means[round(0.025 * BOOTSTRAP_ROUNDS)]),
        quality_cost_high=math.expm1(means[round(0.975 * BOOTSTRAP_ROUNDS)]),
        top1_agreement=sum(window.top1_agreement for window in windows) / count,
    )
