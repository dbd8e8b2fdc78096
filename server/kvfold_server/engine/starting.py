"""Starts an engine in a process of its own: what takes longest is importing, so that is kept small, and timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.runtime import lasting_imports

if TYPE_CHECKING:
    from kvfold_server.engine.core import EngineCore
    from kvfold_server.engine.options import EngineOptions
    from kvfold_server.engine.stages import Stages


def start_engine(options: EngineOptions, stages: Stages) -> EngineCore:
    """As `factory.build_engine`, for a process that has imported neither torch nor transformers yet."""
    stages.begin("imports")
    with lasting_imports():
        from kvfold_server.models.lean_loading import lean_loading  # noqa: PLC0415 - brings torch along
    with lean_loading():
        with lasting_imports():
            from kvfold_server.engine.factory import build_engine  # noqa: PLC0415 - brings transformers along
        return build_engine(options, stages)
