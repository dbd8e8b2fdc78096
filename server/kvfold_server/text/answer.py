"""The text of an answer as it grows: detokenized, and cut at a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvfold_server.text.stop import StopScanner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfold_server.text.detokenizer import Detokenizer


class AnswerPiece(NamedTuple):
    """Text that became certain, how many of the given tokens count, and the stop string that ended the answer."""

    text: str
    token_count: int
    matched: str | None = None


class AnswerText:
    """Joins a detokenizer and a stop scanner."""

    def __init__(self, detokenizer: Detokenizer, stop_strings: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stop_strings) if stop_strings else None

    def add(self, token_ids: Sequence[int]) -> AnswerPiece:
        """Takes the next tokens.

        After a match nothing more may be added; the token that completed it is the last that counts.
        """
        add = self._detokenizer.add
        if self._scanner is None:
            return AnswerPiece("".join([add(token_id) for token_id in token_ids]), len(token_ids))
        certain: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            scanned = self._scanner.add(add(token_id))
            certain.append(scanned.text)
            if scanned.matched is not None:
                return AnswerPiece("".join(certain), count, scanned.matched)
        return AnswerPiece("".join(certain), len(token_ids))

    def finish(self) -> AnswerPiece:
        """The rest of the text, when no token follows. It may complete a stop string too."""
        text = self._detokenizer.finish()
        if self._scanner is None:
            return AnswerPiece(text, 0)
        scanned = self._scanner.add(text)
        rest = "" if scanned.matched is not None else self._scanner.finish()
        return AnswerPiece(scanned.text + rest, 0, scanned.matched)
