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

    `tables` is the scheduler's block tables as an int32 tensor [rows, layers, blocks_per_layer]. `slot_positions`,
    int32 [rows, layers, slots_per_layer], holds the positions of the tokens in the slots that are in use, ascending;
    it is read only for tables that lost tokens, those with fewer slots in use than the sequence has tokens. None where
    nothing is ever evicted. Both are shared, and never written here.
    """

    name: ClassVar[str]

    def __init__(self, arena: Arena, tables: torch.Tensor, slot_positions: torch.Tensor | None = None) -> None:
        self.arena = arena
        self.tables = tables
        self.slot_positions = slot_positions

    def require_slot_positions(self, batch: StepBatch) -> None:
        """Raises ValueError if tokens of the batch were evicted and nothing says which."""
        if batch.slot_counts is not None and self.slot_positions is None:
            raise ValueError("a batch with slot counts needs slot positions, and the backend was given none")

    @abstractmethod
    def begin(self, batch: StepBatch) -> None:
        """Prepares what the layers of a step have in common. Tables and positions do not change until the step is over.

        The positions of the step's own tokens stand in `slot_positions` already. Raises ValueError for a batch with
        `slot_counts` if there are no slot positions.
        """

    @abstractmethod
    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores K and V of the first `owner_tokens[layer]` tokens in the last slots of each sequence that are in use.

        Later rows of `key` and `value` are never read.

        Shapes: key [N, kv_heads, key_dim], value [N, kv_heads, value_dim], in the arena's dtype, any strides.
        """

    @abstractmethod
    def attend(self, call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
        """Causal attention of each token to its own sequence's KV, read from `sources[call.layer]`.

        A token sees the slots up to its own, and of these, if there is a window, the ones with positions inside it.
        Slots that are not in use are never read.

        query [N, heads, key_dim] -> [N, heads, value_dim], contiguous. Query head h reads KV head h * kv_heads //
        heads.
        """

    def attend_projected(
        self,
        call: AttentionCall,  # noqa: ARG002
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # noqa: ARG002
        positions: tuple[torch.Tensor, torch.Tensor],  # noqa: ARG002
    ) -> torch.Tensor | None:
        """All that follows a layer's projections in one call: rotates Q and K in place, writes K and V, and attends.

        None, and nothing has happened, where a backend has no such call (by default) or cannot take these tensors.

        projected: Q [1, N, heads * key_dim], K [1, N, kv_heads * key_dim] and V [1, N, kv_heads * value_dim], heads
        side by side; of K and V only what `write` reads is defined. positions: cosine and sine [1, N, key_dim], which
        rotate pairs (i, i + key_dim / 2).
        """
        return None
