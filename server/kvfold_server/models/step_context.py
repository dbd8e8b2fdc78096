"""What the patched parts of one model share: the step in progress, and the count of projected rows."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfold_server.kv.backends.base import AttentionBackend
    from kvfold_server.kv.step_batch import StepBatch


@dataclass(frozen=True, slots=True)
class ActiveStep:
    """The batch that is being computed, and the backend that holds its KV."""

    batch: StepBatch
    backend: AttentionBackend


class StepContext:
    """One per model, so that two models in one process do not meet.

    `query_rows[layer]` and `key_value_rows[layer]` count the token rows projected since the start: what sharing saves
    is the difference. Layers without facades count nothing.
    """

    def __init__(self, layer_count: int) -> None:
        self._active: ActiveStep | None = None
        self.query_rows = [0] * layer_count
        self.key_value_rows = [0] * layer_count

    @property
    def active(self) -> ActiveStep:
        """The step in progress. Raises RuntimeError outside of one: a patched model runs only through PatchedModel."""
        if self._active is None:
            raise RuntimeError("the model was called outside of a step")
        return self._active

    @contextmanager
    def step(self, batch: StepBatch, backend: AttentionBackend) -> Iterator[None]:
        """Makes a batch the one in progress, also for the backend; ends the step however the block ends."""
        backend.begin(batch)
        self._active = ActiveStep(batch, backend)
        try:
            yield
        finally:
            self._active = None
