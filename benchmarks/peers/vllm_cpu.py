"""vLLM's CPU build, through its own offline API."""

from __future__ import annotations

import math
import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peers.protocol import PeerInfo, PeerOptions, PeerRequest, TokenTimes, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_RUNNING = 128
"""As many as kvfold runs at once."""

BLOCK_TOKENS = 32
"""The smallest block that its CPU attention takes: the least waste when memory is short. Its default is 128."""


class VllmCpu:
    """bf16, compiled as by default, threads bound to all cores, no prefix cache, no tokenizer."""

    def __init__(self, options: PeerOptions) -> None:
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        environment = {
            # By itself it would keep one core free for its scheduler, half of a machine with two.
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        from vllm import LLM  # noqa: PLC0415 - it reads its environment when it is imported

        self.llm = LLM(
            model=options.model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=math.ceil(options.longest_request / BLOCK_TOKENS) * BLOCK_TOKENS,
            max_num_seqs=MAX_RUNNING,
            block_size=BLOCK_TOKENS,
            kv_cache_memory_bytes=options.kv_memory_bytes,
            enable_prefix_caching=False,
            seed=0,
        )
        self.info = PeerInfo(version("vllm-cpu"), {"block_tokens": str(BLOCK_TOKENS), "cores": cores})

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """Its `generate` on all prompts."""
        from vllm import SamplingParams  # noqa: PLC0415

        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new_tokens for output in outputs):
            raise RuntimeError("an answer ended early")
        return seconds

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """The loop of its `generate`, with requests added when they arrive."""
        engine: Any = self.llm.llm_engine
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        following = 0
        start = time.perf_counter()
        while following < len(requests) or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while following < len(requests) and requests[following].arrival_s <= now:
                self._add(str(following), requests[following])
                following += 1
            if not engine.has_unfinished_requests():
                time.sleep(requests[following].arrival_s - now)
                continue
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, now)
                    last[output.request_id] = now
        return [TokenTimes(first[str(index)], last[str(index)]) for index in range(len(requests))]

    def _add(self, request_id: str, request: PeerRequest) -> None:
        from vllm import SamplingParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=request.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": request.prompt}, parameters)


if __name__ == "__main__":
    serve(VllmCpu)
