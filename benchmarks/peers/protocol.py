"""What a comparison and a worker say to each other: one JSON object a line, over the worker's standard streams.

    comparison                                          worker
    starts  python -m peers.NAME '{options}'   ----->   loads its engine once
                                               <-----   {"version": ..., "settings": {...}}
    {"kind": "batch", "requests": FILE}        ----->   runs it
                                               <-----   {"seconds": ...}
    {"kind": "replay", "requests": FILE}       ----->   runs it
                                               <-----   {"requests": [[first, last], ...]}
    closes the stream                          ----->   ends

Standard library only: it runs in every peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What a worker is started with.

    `model` is a prepared folder. `kv_memory_bytes` is the size of the KV cache. `longest_request` is the most tokens,
    prompt and answer together, that any of its requests will have. `attention_backend` is for kvfold alone.
    """

    model: str
    kv_memory_bytes: int
    longest_request: int
    attention_backend: str = ""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """One prompt to be continued greedily by exactly `new_tokens` tokens, `arrival_s` seconds after the start."""

    prompt: list[int]
    new_tokens: int
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """When a request's first and last token came, in seconds after the start of the replay."""

    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a worker is: its version, and the settings that it chose."""

    version: str
    settings: dict[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """An engine that is loaded and warm enough to be asked for work."""

    info: PeerInfo

    def run_batch(self, prompts: Sequence[list[int]], new_tokens: int) -> float:
        """Continues all prompts at once. Seconds from the first submission to the last token."""

    def replay(self, requests: Sequence[PeerRequest]) -> list[TokenTimes]:
        """Submits each request when it arrives; the answer is in their order. Raises NotImplementedError if the peer
        takes only batches."""


def write_requests(path: Path, requests: Sequence[PeerRequest]) -> None:
    """Writes the work of one job."""
    path.write_text(json.dumps([asdict(request) for request in requests]))


def read_requests(path: Path) -> list[PeerRequest]:
    """Reads what `write_requests` wrote."""
    return [PeerRequest(**request) for request in json.loads(path.read_text())]


def serve(load: Callable[[PeerOptions], Peer]) -> None:
    """Loads a peer with the options of the command line and does jobs until the input ends."""
    answers = _take_standard_output()
    peer = load(PeerOptions(**json.loads(sys.argv[1])))
    _say(answers, asdict(peer.info))
    for line in sys.stdin:
        job = json.loads(line)
        requests = read_requests(Path(job["requests"]))
        if job["kind"] == "replay":
            times = peer.replay(requests)
            _say(answers, {"requests": [[time.first_s, time.last_s] for time in times]})
        else:
            seconds = peer.run_batch([request.prompt for request in requests], requests[0].new_tokens)
            _say(answers, {"seconds": seconds})


def _take_standard_output() -> TextIO:
    """A stream to the comparison; from now on, whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
