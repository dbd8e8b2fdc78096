from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from figures import Rounds, write_comparisons

if TYPE_CHECKING:
    from pathlib import Path


def test_ratios_are_taken_within_a_round() -> None:
    # A machine that slows down by half in the second and third round changes the rates and no ratio but the last.
    comparison = Rounds("decode", "tokens/s", ours=[200.0, 100.0, 90.0], peer=[100.0, 50.0, 50.0]).comparison()
    assert (comparison.ours, comparison.peer) == (100.0, 50.0)
    assert (comparison.ratio_median, comparison.ratio_min, comparison.ratio_max) == (2.0, 1.8, 2.0)


def test_a_peer_that_did_nothing_leaves_no_ratio() -> None:
    comparison = Rounds("goodput", "tokens/s", ours=[5.0, 5.0], peer=[0.0, 1.0]).comparison()
    assert comparison.ratio_median is comparison.ratio_min is comparison.ratio_max is None


def test_unequal_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 rounds of ours and 2"):
        Rounds("decode", "ms", [1.0], [1.0, 2.0]).comparison()


def test_the_results_file_lists_comparisons_with_stable_keys(tmp_path: Path) -> None:
    path = tmp_path / "results" / "some.json"
    write_comparisons(path, [Rounds("decode", "ms", [3.0], [2.0])], {"attention_backend": "native"})
    document = json.loads(path.read_text())
    assert document["comparisons"] == [
        {
            "name": "decode",
            "ours": 3.0,
            "peer": 2.0,
            "ratio_median": 1.5,
            "ratio_min": 1.5,
            "ratio_max": 1.5,
            "unit": "ms",
        }
    ]
    assert document["attention_backend"] == "native"
    assert document["machine"]["cores"] >= 1
