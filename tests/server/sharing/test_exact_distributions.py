from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from kvfold_server.sharing.exact_distributions import ExactDistributions

SHAPE = (3, 101, 57)
"""More rows than are compared at once."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_torchs_position_by_position(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact, folded = (torch.randn(SHAPE, generator=generator).mul(4).to(dtype) for _ in range(2))
    expected = kl_div(
        folded.double().log_softmax(-1), exact.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(ExactDistributions(exact).kl(folded), expected.flatten(), rtol=1e-4, atol=1e-5)


def test_the_kl_to_itself_is_nothing() -> None:
    logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).mul(8)
    assert ExactDistributions(logits).kl(logits).abs().max() < 1e-5


def test_logits_of_other_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="logits of shape"):
        ExactDistributions(torch.zeros(SHAPE)).kl(torch.zeros(3, 100, 57))
