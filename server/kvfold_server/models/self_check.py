"""The self-check: a patched model must compute what it did before.

Two short prompts run packed and in chunks through the reference backend and must give the logits that the model's own
eager forward gave for each alone. Then, with layers shared, a step that leaves out the K and V of sharers must equal
one that projects them and does not read them. Windows longer than the prompts are not exercised: the probe read them
from the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfold_scheduler.sharing import SharingEntry, SharingPlan
from kvfold_server.kv.arena import Arena
from kvfold_server.kv.backends.reference import ReferenceBackend
from kvfold_server.kv.step_batch import StepBatch
from kvfold_server.models.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.models.patched import PatchedModel

Span = tuple[int, int]
"""The tokens [start, stop) of a prompt."""

PROMPT_TOKENS = (21, 8)
"""More than a layer-block of the usual size, and less. A window up to LONGEST_WINDOW makes the first longer than it."""

LONGEST_WINDOW = 64

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The largest error of a chunk's logits, as a fraction of their spread: the median of its tokens, since in short data
types a router may send a token to another expert. Rounding stays below it; what is computed wrongly is far above."""


class SelfCheck:
    """Remembers what the unpatched model computes; `run` compares the patched one with it. Both in inference mode."""

    def __init__(self, model: PreTrainedModel, geometry: CacheGeometry) -> None:
        windows = [kind.window for kind in geometry.layers if kind.window is not None]
        long = PROMPT_TOKENS[0]
        if windows and min(windows) <= LONGEST_WINDOW:
            long = max(long, min(windows) + 7)
        longest = min(long, model.config.max_position_embeddings)
        generator = torch.Generator().manual_seed(20)
        self._prompts = [
            torch.randint(model.config.vocab_size, (min(length, longest),), generator=generator).to(model.device)
            for length in (long, PROMPT_TOKENS[1])
        ]
        with torch.inference_mode():
            self._expected = [
                model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in self._prompts
            ]

    def run(self, patched: PatchedModel) -> None:
        """Raises UnsupportedModelError if the patched model computes anything else. Attaches backends of its own."""
        tolerance = TOLERANCE[patched.dtype]
        unshared = tuple(range(patched.geometry.layer_count))
        whole = self._steps(chunked=False)
        chunks = self._steps(chunked=True)
        found = self._logits(patched, chunks, unshared, skip=False)
        error = _error(chunks, self._expected, found)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"a packed and chunked run differs from the model's own forward (by {error:.1e} of the logits' spread, "
                f"{tolerance:.0e} is allowed), so its layers do not follow the standard pattern"
            )
        sources = _shared_sources(patched.geometry)
        if sources != unshared:
            projected = self._logits(patched, whole, sources, skip=False)
            error = _error(whole, projected, self._logits(patched, whole, sources, skip=True))
            if not error <= tolerance:
                raise UnsupportedModelError(
                    "a layer that shares KV reads its own K and V elsewhere than in its attention"
                )

    def _logits(
        self, patched: PatchedModel, steps: list[list[Span]], sources: tuple[int, ...], *, skip: bool
    ) -> list[torch.Tensor]:
        """Logits [tokens, vocabulary] of each prompt. All rows read `sources`; `skip` leaves out K and V of sharers."""
        geometry = patched.geometry
        width = max(geometry.blocks_for(len(prompt)) for prompt in self._prompts)
        blocks = len(self._prompts) * geometry.layer_count * width
        tables = torch.arange(1, blocks + 1, dtype=torch.int32)
        arena = Arena(geometry, blocks, patched.dtype, patched.device)
        arena.fill(float("nan"))
        patched.attach(ReferenceBackend(arena, tables.view(len(self._prompts), geometry.layer_count, width)))
        results: list[list[torch.Tensor]] = [[] for _ in self._prompts]
        for spans in steps:
            batch = _batch(spans, sources, skip=skip, device=patched.device)
            tokens = torch.cat([prompt[start:stop] for prompt, (start, stop) in zip(self._prompts, spans, strict=True)])
            rows = torch.arange(batch.token_count, device=patched.device)
            logits = patched.forward(tokens, batch, rows).float()
            for result, part in zip(results, torch.split(logits, [stop - start for start, stop in spans]), strict=True):
                result.append(part)
        return [torch.cat(result) for result in results]

    def _steps(self, *, chunked: bool) -> list[list[Span]]:
        """All prompts in one step; or in two, a long chunk of each before the last token of the short one."""
        if not chunked:
            return [[(0, len(prompt)) for prompt in self._prompts]]
        cuts = (len(self._prompts[0]) // 2, len(self._prompts[1]) - 1)
        first = [(0, cut) for cut in cuts]
        return [first, [(cut, len(prompt)) for cut, prompt in zip(cuts, self._prompts, strict=True)]]


def _error(steps: list[list[Span]], expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest error of any chunk, relative to the logits' spread."""
    errors: list[torch.Tensor] = []
    for index, (right, result) in enumerate(zip(expected, found, strict=True)):
        rows = (result - right).norm(dim=-1) / (right - right.mean(-1, keepdim=True)).norm(dim=-1)
        errors.extend(rows[start:stop].median() for start, stop in (spans[index] for spans in steps))
    return float(torch.stack(errors).max())


def _shared_sources(geometry: CacheGeometry) -> tuple[int, ...]:
    """Every second layer of a kind reads the one before it of that kind."""
    entries = []
    waiting: dict[object, int] = {}
    for layer, kind in enumerate(geometry.layers):
        owner = waiting.pop(kind, None)
        if owner is None:
            waiting[kind] = layer
        else:
            entries.append(SharingEntry(layer, owner))
    return SharingPlan(geometry.layer_count, tuple(entries)).sources(len(entries))


def _batch(spans: list[Span], sources: tuple[int, ...], *, skip: bool, device: torch.device) -> StepBatch:
    counts = [stop - start for start, stop in spans]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    owned = tuple(0 if skip and layer != source else starts[-1] for layer, source in enumerate(sources))
    return StepBatch(
        token_count=starts[-1],
        positions=torch.cat([torch.arange(start, stop, device=device) for start, stop in spans]),
        rows=torch.arange(len(spans)),
        query_starts=tuple(starts),
        kv_lengths=tuple(stop for _, stop in spans),
        owner_tokens=owned,
        sources=torch.tensor(sources)[:, None].expand(-1, len(spans)).contiguous(),
    )
