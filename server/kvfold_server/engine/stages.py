"""What the time of a start went into."""

from __future__ import annotations

import time


class Stages:
    """Named stages, one after the other; as text, their seconds and the sum: "3.0 s: process 0.1, imports 1.6, ...".

    Counts from `began`, in seconds of time.monotonic, which all processes of a machine share; from now if None.
    """

    def __init__(self, began: float | None = None) -> None:
        self._began = time.monotonic() if began is None else began
        self._starts: list[tuple[str, float]] = []

    def begin(self, name: str) -> None:
        """Ends the stage before. What came before the first one belongs to it."""
        self._starts.append((name, time.monotonic() if self._starts else self._began))

    def __str__(self) -> str:
        now = time.monotonic()
        ends = [*(start for _, start in self._starts[1:]), now]
        parts = [f"{name} {end - start:.1f}" for (name, start), end in zip(self._starts, ends, strict=True)]
        return f"{now - self._began:.1f} s: {', '.join(parts)}"
