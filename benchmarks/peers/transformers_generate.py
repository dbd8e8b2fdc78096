"""transformers' `generate` on one equal batch."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from kvfold_server.bench.measurement import Workload
from kvfold_server.bench.transformers_run import run_generate
from peers.protocol import PeerInfo, PeerOptions, PeerRequest, TokenTimes, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTENTION = "sdpa"


class TransformersGenerate:
    """bf16 and torch's own attention, `generate`'s defaults otherwise. Its cache takes what memory it needs."""

    def __init__(self, options: PeerOptions) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, attn_implementation=ATTENTION, local_files_only=True
        )
        self.model.requires_grad_(False)
        self.info = PeerInfo(version("transformers"), {"dtype": "bfloat16", "attention": ATTENTION})

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """Prompts of one length, so that nothing is padded."""
        return run_generate(self.model, Workload(len(prompts), len(prompts[0]), new_tokens), prompts).seconds

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """Takes no requests while others run."""
        raise NotImplementedError("generate takes batches only")


if __name__ == "__main__":
    serve(TransformersGenerate)
