"""The oracle for int8 weights: what rounding does to a model, in float64 and by the definition; nothing of kvfold is
used."""

from __future__ import annotations

import copy
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64


def spread_matrix(width: int) -> torch.Tensor:
    """The orthogonal matrix [width, width] that turns rows: Hadamard matrices along the diagonal, the largest of up to
    BLOCK that divide the width."""
    size = max(power for power in (1, 2, 4, 8, 16, 32, BLOCK) if width % power == 0)
    factors = [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)] * (size.bit_length() - 1)
    hadamard = reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64)) / size**0.5
    return torch.block_diag(*[hadamard] * (width // size))


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """rows [..., width] as int8 holds them: turned, each row rounded to 127 steps either way, and turned back."""
    matrix = spread_matrix(rows.shape[-1])
    turned = rows.double() @ matrix
    steps = turned.abs().amax(-1, keepdim=True) / 127
    return (turned / steps).round() * steps @ matrix.T


class RoundedLinear(nn.Module):
    """A linear layer whose weight and inputs are rounded."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.weight = rounded(linear.weight.T if isinstance(linear, Conv1D) else linear.weight)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = rounded(hidden) @ self.weight.T
        return (result if self.bias is None else result + self.bias.double()).to(hidden.dtype)


def rounded_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with rounded linear layers; of the transposed ones only those that project Q, K and V."""
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear or name == "c_attn":
                setattr(module, name, RoundedLinear(child))
    return found
