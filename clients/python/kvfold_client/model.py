"""What is known about a model; mirrors kvfold/v1/model.proto."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AttentionType(Enum):
    """How a layer attends: to every earlier token, or to the last `window` tokens."""

    UNSPECIFIED = "unspecified"
    FULL = "full"
    SLIDING = "sliding"


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in a list; `ready` says whether its engine is up and takes requests."""

    name: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model; `window` is in tokens, 0 if the layer attends to every earlier token."""

    attention: AttentionType
    window: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class SharingEntry:
    """One entry of a sharing plan: layer `sharer` stores no KV and reads layer `owner`'s."""

    sharer: int
    owner: int


@dataclass(frozen=True, slots=True)
class DepthQuality:
    """The measured quality at one depth of a sharing plan, on text that the search did not see.

    `kl` is in nats per token; `quality_cost` is exp(kl) - 1, the relative perplexity lost on the model's own text.
    """

    shared_layers: int
    kv_bytes_per_token: int
    perplexity: float
    kl: float
    quality_cost: float


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """Which layers share KV, in which order: depth n shares the first n entries. `depths` ascends."""

    entries: tuple[SharingEntry, ...]
    strategy: str
    depths: tuple[DepthQuality, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model. `kv_bytes_per_token` is the price of a token at depth 0, the only depth if there is no plan.

    `weights` is the form of its linear layers' weights: "int8", or the same as `dtype`.
    """

    name: str
    architecture: str
    dtype: str
    weights: str
    context_length: int
    vocabulary_size: int
    layers: tuple[Layer, ...]
    kv_bytes_per_token: int
    plan: SharingPlan | None
    attention_backend: str
