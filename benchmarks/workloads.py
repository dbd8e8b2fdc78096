"""What the subjects are asked to do: batches of fixed sizes, and recorded arrivals."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from kvfold_server.bench.measurement import Workload, quantile
from peers.protocol import PeerRequest, TokenTimes

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

TOKEN_DIVISOR = 8
"""A recorded request of a large model on a large machine, scaled to a small one."""

FIRST_TOKEN_LIMIT_S = 1.0
TOKEN_GAP_LIMIT_S = 0.2
"""A request counts as good if its first token came within the first limit and its later ones, on average, within the
second: five tokens a second are a little faster than people read."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A recorded request: seconds after the first one, and numbers of tokens."""

    time_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class ReplayFigures:
    """How well a replay was served."""

    tokens_per_second: float
    good_tokens_per_second: float
    first_token_p50_s: float
    first_token_p99_s: float


def label(workload: Workload) -> str:
    """Such as 64 x (128 + 64)."""
    return f"{workload.batch} x ({workload.prompt_tokens} + {workload.new_tokens})"


def batch_requests(workload: Workload, vocabulary: int, source: random.Random) -> list[PeerRequest]:
    """Random prompts: no two share a prefix."""
    return [
        PeerRequest(source.choices(range(vocabulary), k=workload.prompt_tokens), workload.new_tokens)
        for _ in range(workload.batch)
    ]


def with_new_prompts(requests: Sequence[PeerRequest], vocabulary: int, source: random.Random) -> list[PeerRequest]:
    """The same lengths and arrivals."""
    return [
        PeerRequest(source.choices(range(vocabulary), k=len(request.prompt)), request.new_tokens, request.arrival_s)
        for request in requests
    ]


def read_trace(path: Path) -> list[Arrival]:
    """A CSV file with the columns TIMESTAMP (ISO 8601), ContextTokens and GeneratedTokens, in the order of arrival."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} holds no requests")
    times = [datetime.fromisoformat(row["TIMESTAMP"]) for row in rows]
    return [
        Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]


def replay_requests(
    arrivals: Sequence[Arrival], seconds: float, speed: float, vocabulary: int, source: random.Random
) -> list[PeerRequest]:
    """The arrivals of the first `seconds` of a replay that runs `speed` times as fast as the record, with random
    prompts of scaled lengths."""
    return [
        PeerRequest(
            prompt=source.choices(range(vocabulary), k=max(1, arrival.prompt_tokens // TOKEN_DIVISOR)),
            new_tokens=max(1, arrival.new_tokens // TOKEN_DIVISOR),
            arrival_s=arrival.time_s / speed,
        )
        for arrival in arrivals
        if arrival.time_s < seconds * speed
    ]


def replay_figures(requests: Sequence[PeerRequest], times: Sequence[TokenTimes]) -> ReplayFigures:
    """Rates are over the time to the last token; first tokens count from the arrival, also if the engine was busy."""
    served = list(zip(requests, times, strict=True))
    seconds = max(time.last_s for time in times)
    waits = sorted(time.first_s - request.arrival_s for request, time in served)
    return ReplayFigures(
        tokens_per_second=sum(request.new_tokens for request in requests) / seconds,
        good_tokens_per_second=sum(request.new_tokens for request, time in served if _is_good(request, time)) / seconds,
        first_token_p50_s=quantile(waits, 0.5),
        first_token_p99_s=quantile(waits, 0.99),
    )


def _is_good(request: PeerRequest, time: TokenTimes) -> bool:
    gap = (time.last_s - time.first_s) / max(1, request.new_tokens - 1)
    return time.first_s - request.arrival_s <= FIRST_TOKEN_LIMIT_S and gap <= TOKEN_GAP_LIMIT_S
