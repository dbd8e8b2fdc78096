"""The oracle for sharing between layers: the model's own eager attention, given the K and V of another layer.

One full forward pass at a time, no cache, no pages, and the dense masks of transformers: nothing of kvfold is used.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "naive_sharing"


class NaiveSharing:
    """Runs an unpatched model with its layers reading the K and V of `sources`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._sources: tuple[int, ...] = ()
        self._stored: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], sources: tuple[int, ...]) -> torch.Tensor:
        """Logits [len(tokens), vocabulary] of one sequence; layer l reads the K and V of layer sources[l]."""
        self._sources = sources
        self._stored = []
        with self._registered():
            return self._model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def greedy(self, prompt: Sequence[int], count: int, sources: tuple[int, ...]) -> list[int]:
        """`count` tokens, each from a forward pass over everything before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, sources)[-1].argmax()))
        return tokens[len(prompt) :]

    @contextmanager
    def _registered(self) -> Iterator[None]:
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        self._model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self._model.set_attn_implementation("eager")
            AttentionInterface._global_mapping.pop(NAME)
            AttentionMaskInterface._global_mapping.pop(NAME)

    def _attention(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = len(self._stored)
        self._stored.append((key, value))
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, *self._stored[self._sources[layer]], *rest, **options)
