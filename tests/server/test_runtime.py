"""How a process that computes treats its memory; in processes of their own, since it changes them for good."""

from __future__ import annotations

import subprocess
import sys


def test_the_garbage_collector_leaves_alone_what_lasts() -> None:
    program = """
import gc
from kvfold_server.runtime import lasting_imports, spare_loaded_objects

with lasting_imports():
    import asyncio, unittest.mock
    print(gc.isenabled())
print(gc.isenabled(), len(gc.get_objects()) < 1000)
built = [[] for _ in range(10_000)]
print(len(gc.get_objects()) > 10_000)
spare_loaded_objects()
print(len(gc.get_objects()) < 1000)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True"]
