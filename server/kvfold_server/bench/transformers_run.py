"""A workload on transformers' own `generate`, as one equal padded batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from kvfold_server.bench.measurement import Measurement, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

NAME = "transformers-generate"


@torch.inference_mode()
def run_generate(model: PreTrainedModel, workload: Workload, prompts: Sequence[Sequence[int]]) -> Measurement:
    """Generates greedily to the full length. Prompts are of one length, so that nothing is padded and no mask is in
    the way."""
    tokens = torch.tensor([list(prompt) for prompt in prompts])
    start = time.perf_counter()
    result = model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=workload.new_tokens,
        min_new_tokens=workload.new_tokens,
    )
    seconds = time.perf_counter() - start
    if result.shape[1] != workload.prompt_tokens + workload.new_tokens:
        raise RuntimeError("generate stopped early")
    return Measurement(NAME, workload, seconds)
