"""Frames: a length of four bytes in network order, then that many bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = struct.Struct("!I")

MAX_FRAME_BYTES = 32 * 2**20
"""No sound frame comes near: a prompt travels in at most 16 MiB (4 MiB of text), its log-probabilities in 4 MiB."""


class FrameError(Exception):
    """A frame is longer than allowed: the two sides do not understand each other, or one of them has a bug."""


def pack_frame(payload: bytes) -> bytes:
    """The payload as a frame. Raises FrameError if it is too long."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(payload)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return HEADER.pack(len(payload)) + payload


class FrameBuffer:
    """Cuts a stream of bytes into payloads."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes what arrived and yields the payloads that became complete. Raises FrameError."""
        buffer = self._bytes
        buffer += data
        offset = 0
        try:
            while len(buffer) - offset >= HEADER.size:
                (length,) = HEADER.unpack_from(buffer, offset)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
                start = offset + HEADER.size
                if len(buffer) - start < length:
                    break
                offset = start + length
                yield bytes(buffer[start:offset])
        finally:
            del buffer[:offset]
