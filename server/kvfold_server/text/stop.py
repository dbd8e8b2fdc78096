"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True)
class _State:
    """A prefix of a stop string: of all prefixes, the longest that the text read so far ends with.

    `fallback` is the next shorter one. `match` is the longest stop string that ends here.
    """

    length: int
    following: dict[str, _State] = field(default_factory=dict)
    fallback: _State | None = None
    match: str | None = None


@dataclass(frozen=True, slots=True)
class ScannedText:
    """Text that is certain, and the stop string that ended it."""

    text: str
    matched: str | None = None


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and cuts at the first that is complete.

    Of several, the one that is complete first wins, and of those the longest; so the result does not depend on how
    the text was cut into pieces. An Aho-Corasick automaton: the work a character depends neither on the number nor
    the length of the strings.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self._root = self._state = _automaton(stop_strings)
        self._held = ""

    def add(self, text: str) -> ScannedText:
        """Takes the next piece. After a match nothing more may be added."""
        root = self._root
        state = self._state
        for index, character in enumerate(text):
            following = state.following.get(character)
            while following is None and state.fallback is not None:
                state = state.fallback
                following = state.following.get(character)
            state = following or root
            if state.match is not None:
                whole = self._held + text[: index + 1]
                self._held = ""
                return ScannedText(whole[: len(whole) - len(state.match)], state.match)
        self._state = state
        whole = self._held + text
        certain = len(whole) - state.length
        self._held = whole[certain:]
        return ScannedText(whole[:certain])

    def finish(self) -> str:
        """The text that was held back: no stop string can be completed any more."""
        held, self._held = self._held, ""
        return held


def _automaton(stop_strings: Iterable[str]) -> _State:
    root = _State(0)
    for string in stop_strings:
        state = root
        for character in string:
            state = state.following.setdefault(character, _State(state.length + 1))
        state.match = string
    queue = deque(root.following.values())
    for state in queue:
        state.fallback = root
    while queue:
        state = queue.popleft()
        for character, following in state.following.items():
            fallback = state.fallback
            while fallback is not None and character not in fallback.following:
                fallback = fallback.fallback
            following.fallback = root if fallback is None else fallback.following[character]
            following.match = following.match or following.fallback.match
            queue.append(following)
    return root
