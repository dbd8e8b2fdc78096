"""A model's tokenizer, read from the files beside its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import tokenizers

from kvfold_server.text.byte_pieces import BytePieces

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that a tokenizer's configuration may name, and that chat templates may use."""


class TokenizerError(Exception):
    """A folder holds no tokenizer that can be read; the message says what is missing or wrong."""


class Tokenizer:
    """Turns text into token ids and back. Safe to use from several threads.

    `special_ids` are left out of text when special tokens are to be skipped; `special_tokens` maps names such as
    "eos_token" to their text; `byte_pieces` is None unless the vocabulary is of bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        named = [token for token in special_tokens.values() if backend.token_to_id(token) is not None]
        backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in named])
        self._backend = backend
        self.byte_pieces = BytePieces(backend) if isinstance(backend.decoder, tokenizers.decoders.ByteLevel) else None
        self.special_tokens = dict(special_tokens)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, and the names of the special tokens from the configuration beside it.

        Raises TokenizerError.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        return cls(backend, _special_tokens(folder))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text.

        `add_special_tokens` adds what the model expects around a text, such as a first token.
        """
        # Of the library's ways to encode, only those for batches let other threads run, and this one keeps no offsets.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some tokens. Bytes that form no character become U+FFFD; ids without a token have no text."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing if there is none. Raises TokenizerError."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return config


def _special_tokens(folder: Path) -> dict[str, str]:
    config = read_tokenizer_config(folder)
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens
