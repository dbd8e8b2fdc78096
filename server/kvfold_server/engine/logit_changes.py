"""Penalties and biases: what a request changes in its logits before a token is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvfold_server.generation.request import SamplingParameters


def change_logits(logits: torch.Tensor, parameters: SamplingParameters, prompt: list[int], answer: list[int]) -> None:
    """Changes one row of logits [vocabulary], fp32, in place.

    Repetition penalty (CTRL, arXiv:1909.05858) over prompt and answer: positive logits are divided by it, negative
    multiplied. Presence and frequency penalties over the answer: subtracted once, and once for each occurrence. Then
    the biases.
    """
    device = logits.device
    if parameters.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *answer}), device=device)
        values = logits[seen]
        penalty = parameters.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if answer and (parameters.presence_penalty != 0.0 or parameters.frequency_penalty != 0.0):
        tokens, counts = torch.unique(torch.tensor(answer, device=device), return_counts=True)
        logits[tokens] -= parameters.presence_penalty + parameters.frequency_penalty * counts
    if parameters.logit_bias:
        tokens = torch.tensor(list(parameters.logit_bias), device=device)
        logits[tokens] += torch.tensor(list(parameters.logit_bias.values()), device=device)
