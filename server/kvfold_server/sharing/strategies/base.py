"""What a search strategy is given, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvfold_scheduler.sharing import SharingEntry
    from kvfold_server.sharing.dense import DenseModel


class SearchError(ValueError):
    """The search cannot give what was asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class SearchSetting:
    """The model, calibration tokens [samples, tokens], the number of layers to share, and whom to tell how far the
    search is.

    `report` is given the share of the work done, from 0 to 1, and a few words.
    """

    dense: DenseModel
    tokens: torch.Tensor
    depth: int
    seed: int
    report: Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class FoundEntry:
    """An entry of the plan, in order, and the value that made the strategy take it there (see its formula)."""

    entry: SharingEntry
    score: float


class Strategy(Protocol):
    """A rule that finds a nested sharing plan.

    `samples` and `tokens` are the shape of the calibration text that it needs. `formula` says in plain words what the
    scores are.
    """

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def formula(self) -> str:
        """What is ranked, and what is accepted."""
        ...

    @property
    def samples(self) -> int:
        """Calibration sequences."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens in each of them."""
        ...

    def search(self, setting: SearchSetting) -> list[FoundEntry]:
        """Finds `setting.depth` entries, or raises SearchError. Deterministic for one setting."""
        ...


def check_calibration(strategy: Strategy, setting: SearchSetting) -> None:
    """Raises SearchError unless the calibration tokens have the strategy's shape: none is dropped, none is missing."""
    shape = tuple(setting.tokens.shape)
    if shape != (strategy.samples, strategy.tokens):
        raise SearchError(
            f"the {strategy.name} strategy needs {strategy.samples} samples of {strategy.tokens} tokens, "
            f"not a calibration text of shape {shape}"
        )


def too_few(found: int, setting: SearchSetting) -> SearchError:
    """The error for a plan that stays shorter than asked."""
    return SearchError(f"{setting.depth} shared layers asked for, but only {found} acceptable entries found")
