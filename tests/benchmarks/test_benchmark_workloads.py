from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from kvfold_server.bench.measurement import Workload
from peers.protocol import PeerRequest, TokenTimes, read_requests, write_requests
from workloads import batch_requests, label, read_trace, replay_figures, replay_requests, with_new_prompts

if TYPE_CHECKING:
    from pathlib import Path

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,7
2023-11-16 18:15:56.6805900,16,800
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_batch_has_prompts_of_its_own_and_of_the_right_length() -> None:
    workload = Workload(3, 16, 8)
    requests = batch_requests(workload, 100, random.Random(0))
    assert label(workload) == "3 x (16 + 8)"
    assert {len(request.prompt) for request in requests} == {16}
    assert len({tuple(request.prompt) for request in requests}) == 3
    assert all(request.new_tokens == 8 and request.arrival_s == 0 for request in requests)


def test_a_trace_is_scaled_in_tokens_and_in_time(trace: Path) -> None:
    requests = replay_requests(read_trace(trace), seconds=4, speed=2, vocabulary=100, source=random.Random(0))
    assert [(request.arrival_s, len(request.prompt), request.new_tokens) for request in requests] == [
        (0.0, 46, 5),
        (2.0, 49, 1),
    ]


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(path)


def test_new_prompts_keep_lengths_and_arrivals() -> None:
    old = [PeerRequest([1, 2, 3], 4, 5.0)]
    (new,) = with_new_prompts(old, 1000, random.Random(0))
    assert (len(new.prompt), new.new_tokens, new.arrival_s) == (3, 4, 5.0)
    assert new.prompt != old[0].prompt


def test_first_tokens_count_from_the_arrival_and_slow_requests_are_not_good() -> None:
    requests = [
        PeerRequest([1], 11, 0.0),
        PeerRequest([1], 11, 2.0),  # its first token comes too late
        PeerRequest([1], 11, 4.0),  # its later tokens come too slowly
        PeerRequest([1], 1, 6.0),
    ]
    times = [TokenTimes(0.5, 1.5), TokenTimes(3.5, 4.5), TokenTimes(4.25, 10.0), TokenTimes(6.5, 6.5)]
    figures = replay_figures(requests, times)
    assert figures.tokens_per_second == pytest.approx(3.4)
    assert figures.good_tokens_per_second == pytest.approx(1.2)
    assert figures.first_token_p50_s == 0.5
    assert figures.first_token_p99_s == 1.5


def test_requests_reach_a_worker_as_they_were_written(tmp_path: Path) -> None:
    requests = [PeerRequest([1, 2], 3), PeerRequest([4], 5, 6.5)]
    write_requests(tmp_path / "requests.json", requests)
    assert read_requests(tmp_path / "requests.json") == requests
