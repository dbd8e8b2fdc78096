"""A tiny model, dense, and the calibration tokens that its searches use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

from kvfold_server.models.probe import probe_model
from kvfold_server.sharing.dense import DenseModel
from kvfold_server.sharing.strategies.base import SearchSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel


@pytest.fixture
def dense_of() -> Iterator[Callable[[str], tuple[PreTrainedModel, DenseModel]]]:
    """Makes the tiny model of an architecture and enters its dense form; leaves it at the end."""
    entered: list[DenseModel] = []

    def make(architecture: str) -> tuple[PreTrainedModel, DenseModel]:
        model = tiny_model(ARCHITECTURES[architecture]())
        dense = DenseModel(model, probe_model(model))
        dense.__enter__()
        entered.append(dense)
        return model, dense

    yield make
    for dense in entered:
        dense.__exit__(None, None, None)


@pytest.fixture
def setting_of() -> Callable[..., SearchSetting]:
    """A search setting on random tokens."""

    def make(dense: DenseModel, samples: int, tokens: int, depth: int, seed: int = 0) -> SearchSetting:
        generator = torch.Generator().manual_seed(7)
        text = torch.randint(VOCABULARY, (samples, tokens), generator=generator)
        return SearchSetting(dense, text, depth, seed, lambda _done, _words: None)

    return make
