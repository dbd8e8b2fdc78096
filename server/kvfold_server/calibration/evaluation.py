"""The quality of an operating point, measured through the engine's own path: what is measured is what is served.

The protocol: windows of `prefix + continuation` tokens, evenly spaced over a text. Each window runs exactly and folded,
through the same engine, or through one with the model's own weights and one with rounded ones; the next-token
distributions over the continuation are compared, the real tokens being given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvfold_server.calibration.divergence import Quality, WindowDivergence, summarize, window_divergence
from kvfold_server.generation.events import FinishCause, RequestFinished
from kvfold_server.generation.request import GenerationRequest, RequestId, SamplingParameters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfold_server.engine.core import EngineCore


@dataclass(frozen=True, slots=True)
class Protocol:
    """How windows are cut, in tokens."""

    prefix: int = 768
    continuation: int = 256
    windows: int = 64

    def __post_init__(self) -> None:
        if min(self.prefix, self.continuation, self.windows) < 1:
            raise ValueError("prefix, continuation and windows must be at least 1")

    @property
    def window_tokens(self) -> int:
        """Tokens of one window."""
        return self.prefix + self.continuation


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a protocol found. KV bytes per token are allocated bytes over the tokens in the cache, at the end of a
    window."""

    quality: Quality
    windows: int
    kv_bytes_per_token: float
    kv_bytes_per_token_exact: float


def cut_windows(tokens: Sequence[int], protocol: Protocol) -> list[Sequence[int]]:
    """Windows at evenly spaced starts. Raises ValueError if the text is too short for windows that do not overlap."""
    needed = protocol.windows * protocol.window_tokens
    if len(tokens) < needed:
        raise ValueError(
            f"{protocol.windows} windows of {protocol.window_tokens} tokens need {needed} tokens, "
            f"the text has {len(tokens)}"
        )
    spacing = len(tokens) / protocol.windows
    starts = [int(index * spacing) for index in range(protocol.windows)]
    return [tokens[start : start + protocol.window_tokens] for start in starts]


def evaluate(
    engine: EngineCore,
    windows: Sequence[Sequence[int]],
    protocol: Protocol,
    shared_layers: int,
    progress: Callable[[int], None] = lambda _done: None,
    *,
    exact_engine: EngineCore | None = None,
) -> Evaluation:
    """Runs every window exactly and at `shared_layers`. `progress` is called with the number of windows done.

    `exact_engine` runs the exact ones; by default it is `engine`, at depth 0.
    """
    found: list[WindowDivergence] = []
    folded_bytes = exact_bytes = 0
    for done, window in enumerate(windows):
        exact, folded = _Continuation(protocol.prefix), _Continuation(protocol.prefix)
        exact_bytes += _run(exact_engine or engine, window, 0, exact)
        folded_bytes += _run(engine, window, shared_layers, folded)
        targets = torch.tensor(window[protocol.prefix :])
        found.append(window_divergence(exact.logits(), folded.logits(), targets))
        progress(done + 1)
    tokens = len(windows) * (protocol.window_tokens - 1)
    return Evaluation(summarize(found), len(windows), folded_bytes / tokens, exact_bytes / tokens)


class _Continuation:
    """Keeps the logits that predict the tokens after a prefix."""

    def __init__(self, prefix: int) -> None:
        self.first_position = prefix - 1
        self._parts: dict[int, torch.Tensor] = {}

    def score(self, position: int, logits: torch.Tensor) -> None:
        self._parts[position] = logits.clone()

    def logits(self) -> torch.Tensor:
        return torch.cat([self._parts[position] for position in sorted(self._parts)])


def _run(engine: EngineCore, window: Sequence[int], shared_layers: int, scorer: _Continuation) -> int:
    """Runs a window to its end and returns the KV bytes that it held. The last token of a window is only predicted."""
    request = GenerationRequest(
        request_id=RequestId(0),
        prompt_token_ids=tuple(window[:-1]),
        sampling=SamplingParameters(temperature=0.0),
        max_tokens=1,
        shared_layers=shared_layers,
    )
    if engine.submit(request, scorer):
        raise ValueError(f"a window of {len(window)} tokens does not fit in the engine's KV memory")
    held = 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, RequestFinished):
                if event.cause is FinishCause.INTERNAL_ERROR:
                    raise RuntimeError("the engine could not compute a window; its log says why")
                held = event.memory.kv_bytes_held
    return held
