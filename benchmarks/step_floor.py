"""What a decode step cannot do without: its matrix products, and reading the KV cache once."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from kvfold_server.models.packed_weight import can_pack, pack_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    Product = tuple[int, Callable[[torch.Tensor], torch.Tensor]]

READ_BYTES = 512 << 20
"""Many times the last-level cache of the machines this runs on."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Products of one input that can be computed as one."""


class Linears:
    """All matrix products of one step of a model, without anything between them, in several forms.

    Each form reads weights of its own. Biases do not count.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        fused = list(_fused_weights(model))
        separate = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
        self._forms = {"as they are": _dense(separate), "fused": _dense(fused)}
        if can_pack(model.dtype, model.device.type):
            self._forms["fused and packed"] = [(weight.shape[1], pack_weight(weight, None)) for weight in fused]
        self._dtype = model.dtype

    @property
    def forms(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._forms)

    def multiplications(self, form: str) -> int:
        """Those of one row of input."""
        rows = {width: torch.zeros(1, width, dtype=self._dtype) for width, _ in self._forms[form]}
        return sum(width * product(rows[width]).shape[1] for width, product in self._forms[form])

    @torch.inference_mode()
    def seconds(self, form: str, rows: int) -> float:
        """Time of all products of that form on `rows` rows of input."""
        products = self._forms[form]
        inputs = {width: torch.randn(rows, width).to(self._dtype) for width, _ in products}
        start = time.perf_counter()
        for width, product in products:
            product(inputs[width])
        return time.perf_counter() - start

    def best_form(self, rows: int, repeats: int = 5) -> str:
        """The one whose fastest run of a few is the fastest."""
        return min(self._forms, key=lambda form: min(self.seconds(form, rows) for _ in range(repeats)))


class ReadSpeed:
    """Reads a block of memory that no cache holds."""

    def __init__(self) -> None:
        self._words = torch.ones(READ_BYTES // 4, dtype=torch.int32)

    def bytes_per_second(self) -> float:
        """Of one pass over it, on all cores."""
        start = time.perf_counter()
        self._words.max()
        return READ_BYTES / (time.perf_counter() - start)


def _dense(weights: list[torch.Tensor]) -> list[Product]:
    return [(weight.shape[1], partial(functional.linear, weight=weight)) for weight in weights]


def _fused_weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Every linear weight [out, in], those of one input joined."""
    joined: set[int] = set()
    for module in model.modules():
        for names in FUSED:
            parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
            if len(parts) == len(names):
                joined.update(map(id, parts))
                yield torch.cat([part.weight.detach() for part in parts])
        if isinstance(module, nn.Linear) and id(module) not in joined:
            yield module.weight.detach()
