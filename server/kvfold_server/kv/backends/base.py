"""What an attention backend does, whatever it is written in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from kvfold_server.kv.arena import Arena
    from kvfold_server.kv.step_batch import StepBatch


class BackendUnavailableError(RuntimeError):
    """A backend cannot run on this machine or serve this arena; the text says why, in words for an operator."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The constants of one layer's attention.

    `softcap`: logits become softcap * tanh(logits / softcap), before masking. `sinks` [heads]: one more logit a head
    that takes part in the softmax and has no value (gpt-oss). `window`: a token at position p sees p - window + 1 .. p.
    """

    layer: int
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(ABC):
    """Writes K and V to the arena and attends over block tables. One step at a time: `begin`, then each layer in turn.

    `tables` is the scheduler's block tables as an int32 tensor [rows, layers, blocks_per_layer], shared, never written
    here.
    """

    name: ClassVar[str]

    def __init__(self, arena: Arena, tables: torch.Tensor) -> None:
        self.arena = arena
        self.tables = tables

    @abstractmethod
    def begin(self, batch: StepBatch) -> None:
        """Prepares what the layers of a step have in common. The tables do not change until the step is over."""

    @abstractmethod
    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores K and V of the first `owner_tokens[layer]` tokens at their positions; later rows are never read.

        Shapes: key [N, kv_heads, key_dim], value [N, kv_heads, value_dim], in the arena's dtype, any strides.
        """

    @abstractmethod
    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        """Causal attention of each token to its own sequence's KV, read from `sources[call.layer]`.

        query [N, heads, key_dim] -> [N, heads, value_dim], contiguous. Query head h reads KV head h * kv_heads //
        heads.
        """
