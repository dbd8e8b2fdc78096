"""A patched model: what the engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.kv.backends.base import AttentionBackend
    from kvfold_server.kv.step_batch import StepBatch
    from kvfold_server.models.step_context import StepContext


class PatchedModel:
    """A transformers decoder whose attention and projections follow the step in progress. Made by `patch_model`.

    - `geometry`: layers, kinds and bytes of its KV cache, in its own data type.
    - `context`: the step in progress, and the counts of projected rows.
    - `vocabulary_size`: the width of its logits; a tokenizer may know fewer tokens.
    - `context_length`: the most positions it was made for.
    - `eos_token_ids`: tokens that end an answer; may be empty.
    - `architecture`: the name of its class, such as "LlamaForCausalLM".
    - `layers_without_facade`: layers whose projections have an unknown layout; they always project K and V of all rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: CacheGeometry,
        context: StepContext,
        layers_without_facade: tuple[int, ...],
    ) -> None:
        self.model = model
        self.geometry = geometry
        self.context = context
        self.layers_without_facade = layers_without_facade
        self.vocabulary_size: int = model.config.vocab_size
        self.context_length: int = model.config.max_position_embeddings
        self.eos_token_ids = _eos_token_ids(model)
        self.architecture = type(model).__name__
        self._backend: AttentionBackend | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The data type of weights, KV and logits."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def attach(self, backend: AttentionBackend) -> None:
        """Names the backend that holds the KV of all later steps."""
        self._backend = backend

    @torch.inference_mode()
    def forward(self, input_ids: torch.Tensor, batch: StepBatch, logit_rows: torch.Tensor) -> torch.Tensor:
        """Computes one step: writes the KV of all its tokens and returns the logits of some.

        input_ids [N] int64, the tokens of `batch` in its order; logit_rows [S] int64, which of them, ascending
        -> [S, vocabulary_size] in the model's data type. S may be 0.
        Raises RuntimeError before a backend is attached, else whatever the model raises.
        """
        if self._backend is None:
            raise RuntimeError("attach() names the backend before the first step")
        with self.context.step(batch, self._backend):
            output = self.model(
                input_ids=input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=logit_rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
