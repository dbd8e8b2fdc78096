"""What the front end knows about a model that an engine has loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_scheduler.sharing import SharingPlan


@dataclass(frozen=True, slots=True)
class DepthQuality:
    """Measured quality of one depth of a plan, on text that the search did not see. `kl` is in nats per token."""

    shared_layers: int
    kv_bytes_per_token: int
    perplexity: float
    kl: float
    quality_cost: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A loaded model as its engine describes it.

    `dtype` is a torch name such as "bfloat16"; `weights` is the form of its linear layers' weights, "int8" or `dtype`.
    `context_length` bounds prompt and answer together, in tokens.
    """

    architecture: str
    dtype: str
    weights: str
    context_length: int
    vocabulary_size: int
    geometry: CacheGeometry
    plan: SharingPlan
    plan_strategy: str
    plan_quality: tuple[DepthQuality, ...]
    attention_backend: str
    eos_token_ids: frozenset[int]
    tokenizer_folder: Path
    pool_bytes: int
