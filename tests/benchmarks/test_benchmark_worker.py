"""A worker with the real engine and a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.tiny_models import ARCHITECTURES, tiny_model

from peers.protocol import PeerOptions, PeerRequest
from worker import Worker, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = Path(sys.executable)
KV_BYTES = 4 << 20


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(ARCHITECTURES["llama"]()).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # a prepared folder has one; no text is made of these tokens
    return folder


@pytest.fixture(scope="module")
def worker(model_folder: Path) -> Iterator[Worker]:
    with Worker(PYTHON, "kvfold", PeerOptions(str(model_folder), KV_BYTES, 64, "reference")) as worker:
        yield worker


def group_states(worker: Worker) -> set[str]:
    """The states of all threads in the worker's process group."""
    states: set[str] = set()
    for path in Path("/proc").glob("[0-9]*/task/*/stat"):
        try:
            state, _parent, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended
        if int(group) == worker.process_group:
            states.add(state)
    return states


def test_a_worker_says_what_it_is(worker: Worker) -> None:
    assert worker.info.settings == {"dtype": "bfloat16", "attention_backend": "reference"}


def test_a_worker_runs_batches_and_stands_still_between_them(worker: Worker) -> None:
    for _ in range(2):
        assert group_states(worker) == {"T"}
        assert worker.run_batch([PeerRequest([1, 2, 3], 4)] * 3) > 0


def test_a_replay_submits_each_request_when_it_arrives(worker: Worker) -> None:
    early, late = worker.replay([PeerRequest([1, 2, 3], 4, 0.0), PeerRequest([1, 2], 3, 0.5)])
    assert 0 < early.first_s <= early.last_s < 0.5 <= late.first_s <= late.last_s


def test_a_worker_that_ends_early_is_an_error() -> None:
    with pytest.raises(WorkerError, match="there_is_none ended with exit code 1"):
        Worker(PYTHON, "there_is_none", PeerOptions("", KV_BYTES, 64))


def test_nothing_is_left_of_a_closed_worker(model_folder: Path) -> None:
    with Worker(PYTHON, "kvfold", PeerOptions(str(model_folder), KV_BYTES, 64, "reference")) as worker:
        pass
    assert group_states(worker) == set()
