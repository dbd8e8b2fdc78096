"""The strategies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.sharing.strategies.output_aware import OutputAware
from kvfold_server.sharing.strategies.ranked import Order, RankedWalk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvfold_server.sharing.strategies.base import Strategy

STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        RankedWalk("paper", Order.DISSIMILAR_FIRST),
        RankedWalk("similar", Order.SIMILAR_FIRST),
        RankedWalk("random", Order.RANDOM),
        OutputAware(),
    )
}
