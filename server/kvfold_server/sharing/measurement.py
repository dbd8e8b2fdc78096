"""What each depth of a plan costs, measured on text that the search did not see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfold_server.calibration.divergence import Quality, WindowDivergence, summarize, window_divergence
from kvfold_server.generation.model_info import DepthQuality

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfold_scheduler.sharing import SharingPlan
    from kvfold_server.sharing.dense import DenseModel


def measure_depths(
    dense: DenseModel,
    tokens: torch.Tensor,
    *,
    prefix: int,
    plan: SharingPlan,
    depths: Sequence[int],
    progress: Callable[[float], None] = lambda _share: None,
) -> tuple[float, tuple[DepthQuality, ...]]:
    """The exact perplexity, and the quality of each of `depths`, over tokens [windows, tokens].

    Predictions of the first `prefix` tokens of a window are not scored: short contexts
    are not what memory is short for.
    """
    window_tokens = tokens.shape[1]
    positions = torch.arange(prefix - 1, window_tokens - 1, device=tokens.device)
    found: dict[int, list[WindowDivergence]] = {depth: [] for depth in depths}
    for done, window in enumerate(tokens):
        exact, trace = dense.logits(window[None], plan.sources(0), positions=positions)
        # Plans are nested, so each depth begins where the one before it is left.
        for depth in sorted(depths):
            folded, trace = dense.logits(window[None], plan.sources(depth), positions=positions, base=trace)
            found[depth].append(window_divergence(exact[0], folded[0], window[prefix:]))
        progress((done + 1) / len(tokens))
    qualities = {depth: summarize(windows) for depth, windows in found.items()}
    measured = tuple(_depth_quality(dense, plan, depth, qualities[depth]) for depth in sorted(depths))
    return qualities[min(depths)].perplexity_exact, measured


def _depth_quality(dense: DenseModel, plan: SharingPlan, depth: int, quality: Quality) -> DepthQuality:
    return DepthQuality(
        shared_layers=depth,
        kv_bytes_per_token=dense.geometry.token_bytes * len(plan.owners(depth)),
        perplexity=quality.perplexity,
        kl=quality.kl,
        quality_cost=quality.quality_cost,
    )
