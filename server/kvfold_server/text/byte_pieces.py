"""The bytes behind the tokens of a byte-level vocabulary, as GPT-2, Llama 3, Qwen and SmolLM have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


def _byte_symbols() -> dict[str, int]:
    """The character that stands for each byte: itself if it can be seen, else one from U+0100 on, in order."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + index): byte for index, byte in enumerate(unseen)}


BYTES = _byte_symbols()


class BytePieces(dict[int, "str | bytes"]):
    """What each token adds to a text: a string if that is whole characters, else bytes; nothing for unknown ids.

    Filled as tokens are asked for: a vocabulary has 100,000 tokens and more, of which few are common.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            raw = bytes([BYTES[symbol] for symbol in token])
        except KeyError:  # a token that was added as text
            raw = token.encode()
        try:
            piece: str | bytes = raw.decode()
        except UnicodeDecodeError:
            piece = raw
        self[token_id] = piece
        return piece
