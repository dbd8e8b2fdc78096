"""What an engine process is told when it starts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

WEIGHT_FORMS = ("dtype", "int8")
"""Weights of linear layers: in the model's data type, or rounded to int8."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One model and the bounds of its engine; made of plain values, so that it travels as JSON on a command line.

    `model` is "default", a folder, a GGUF file or a hub id. `plan` is the path of a sharing plan; None takes the plan
    that ships for the model, if there is one. `device` is a torch device, `attention_backend` one of the registry;
    None takes the best at hand. `weights` says in which form linear layers keep theirs, one of WEIGHT_FORMS.
    `kv_memory_bytes` is the size of the pool; None lets the engine choose a part of the memory that is free. The
    bounds are those of the scheduler.
    """

    model: str
    plan: str | None = None
    device: str | None = None
    dtype: str = "bfloat16"
    weights: str = "dtype"
    kv_memory_bytes: int | None = None
    max_running: int = 128
    max_waiting: int = 1024
    step_tokens: int = 512
    attention_backend: str | None = None

    @property
    def weight_dtype(self) -> str:
        """What the weights of linear layers are in: "int8", or the model's data type."""
        return self.dtype if self.weights == "dtype" else self.weights

    def to_json(self) -> str:
        """The options as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineOptions:
        """Reads what `to_json` wrote. Raises TypeError or ValueError for anything else."""
        return cls(**json.loads(text))
