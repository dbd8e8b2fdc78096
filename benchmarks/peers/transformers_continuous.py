"""transformers' continuous batching."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from peers.protocol import PeerInfo, PeerOptions, PeerRequest, TokenTimes, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTENTION = "sdpa"
PAGE_TOKENS = 256
"""Its default."""

STEP_TOKENS = 512
"""Tokens of one of its steps, as in kvfold."""


class TransformersContinuous:
    """bf16 and torch's attention over pages. One manager serves all runs, so that no run pays for its cache."""

    def __init__(self, options: PeerOptions) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, attn_implementation=ATTENTION, local_files_only=True
        )
        self.model.requires_grad_(False)
        shape = self.model.config
        head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        page_bytes = PAGE_TOKENS * shape.num_hidden_layers * shape.num_key_value_heads * head_dim * 2 * 2
        self.config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=options.kv_memory_bytes // page_bytes,
            max_batch_tokens=STEP_TOKENS,
            allow_block_sharing=False,
        )
        self.info = PeerInfo(version("transformers"), {"dtype": "bfloat16", "attention": f"paged {ATTENTION}"})

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """Its `generate_batch` on all prompts."""
        # An end-of-sequence token that no model has: every answer runs to its full length.
        greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        outputs = self.model.generate_batch(
            list(prompts), generation_config=greedy, continuous_batching_config=self.config, persistent_manager=True
        )
        seconds = time.perf_counter() - start
        answers = [output.generated_tokens for output in outputs.values()]
        if len(answers) != len(prompts) or any(len(answer) != new_tokens for answer in answers):
            raise RuntimeError("an answer ended early")
        return seconds

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """Not measured: it is far behind in batches already."""
        raise NotImplementedError("only batches of continuous batching are measured")


if __name__ == "__main__":
    serve(TransformersContinuous)
