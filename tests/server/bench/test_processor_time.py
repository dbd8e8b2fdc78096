from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvfold_server.bench.processor_time import processor_seconds

WORK = """
import sys, time
while time.process_time() < float(sys.argv[1]):
    pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""


def test_it_is_what_the_process_itself_says() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORK, "0.3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        said = float(process.stdout.readline())
        assert processor_seconds(process.pid) == pytest.approx(said, abs=0.05)
        process.stdin.close()


def test_waiting_takes_none() -> None:
    before = processor_seconds(os.getpid())
    time.sleep(0.2)
    after = processor_seconds(os.getpid())
    assert before is not None
    assert after is not None
    assert after - before < 0.1


def test_a_process_that_is_gone_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        with pytest.raises(ProcessLookupError):
            processor_seconds(process.pid)
