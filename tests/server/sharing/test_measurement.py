"""Measured depths, against transformers' own attention fed with the owners' K and V."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from support.naive_sharing import NaiveSharing
from support.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_plan

from kvfold_server.models.probe import probe_model
from kvfold_server.sharing.dense import DenseModel
from kvfold_server.sharing.measurement import measure_depths

if TYPE_CHECKING:
    from kvfold_scheduler.sharing import SharingPlan

PREFIX = 20
WINDOWS = torch.randint(VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(3))


def naive_quality(naive: NaiveSharing, plan: SharingPlan, depth: int) -> tuple[float, float]:
    """Mean surprisal of the tokens after the prefix, and mean KL, position by position."""
    surprisal, kl = [], []
    for window in WINDOWS:
        exact, folded = (
            naive.logits(window.tolist(), plan.sources(at)).double().log_softmax(-1)[PREFIX - 1 : -1]
            for at in (0, depth)
        )
        surprisal.append(-folded.gather(1, window[PREFIX:, None]).mean())
        kl.append((exact.exp() * (exact - folded)).sum(-1).mean())
    return float(torch.stack(surprisal).mean()), float(torch.stack(kl).mean())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_depths_are_measured_on_the_tokens_after_the_prefix(architecture: str) -> None:
    model = tiny_model(ARCHITECTURES[architecture]())
    probe = probe_model(model)
    plan = tiny_plan(probe.geometry)
    with DenseModel(model, probe) as dense:
        perplexity_exact, measured = measure_depths(dense, WINDOWS, prefix=PREFIX, plan=plan, depths=(2, 1))
    naive = NaiveSharing(model)
    assert math.log(perplexity_exact) == pytest.approx(naive_quality(naive, plan, 0)[0], rel=1e-4)
    assert [depth.shared_layers for depth in measured] == [1, 2]
    for depth in measured:
        surprisal, kl = naive_quality(naive, plan, depth.shared_layers)
        assert math.log(depth.perplexity) == pytest.approx(surprisal, rel=1e-4)
        assert depth.kl == pytest.approx(kl, rel=1e-3)
        assert depth.quality_cost == pytest.approx(math.exp(kl) - 1, rel=1e-2)
        layer_bytes = 4 * model.config.num_key_value_heads * 2 * 16
        assert depth.kv_bytes_per_token == (6 - depth.shared_layers) * layer_bytes
