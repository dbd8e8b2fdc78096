from __future__ import annotations

import re
import time

from kvfold_server.engine.stages import Stages


def test_stages_are_told_in_order_and_make_up_the_whole() -> None:
    stages = Stages(began=time.monotonic() - 40)
    stages.begin("process")
    stages.begin("imports")
    stages.begin("weights")
    whole, *parts = re.findall(r"\d+\.\d", str(stages))
    assert re.sub(r"\d+\.\d", "N", str(stages)) == "N s: process N, imports N, weights N"
    assert float(parts[0]) >= 40
    assert abs(float(whole) - sum(map(float, parts))) < 0.25  # each is rounded
