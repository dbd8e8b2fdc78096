from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from comparisons import COMPARISONS
from environments import REQUIREMENTS, environment_folder

if TYPE_CHECKING:
    from pathlib import Path

PAIRINGS = [pairing for pairings in COMPARISONS.values() for pairing in pairings]


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_requirement_is_pinned_and_names_no_address(path: Path) -> None:
    lines = path.read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages
    assert all(line.count("==") == 1 and "/" not in line for line in packages)


def test_each_comparison_has_a_peer_and_an_environment() -> None:
    for pairing in PAIRINGS:
        assert (REQUIREMENTS / f"{pairing.environment}.txt").is_file()
        assert (REQUIREMENTS.parent / "peers" / f"{pairing.module}.py").is_file()


def test_environments_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {environment_folder(pairing.environment) for pairing in PAIRINGS}
    assert {str(folder.parent) for folder in folders} == {f"{tmp_path}/kvfold-benchmarks"}
    assert len(folders) == len({pairing.environment for pairing in PAIRINGS})
