"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

SIZE_UNITS = {"": 1} | {
    prefix + binary: base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for binary, base in (("", 1000), ("I", 1024))
}


def parse_bytes(text: str) -> int:
    """A number of bytes from text such as "512MiB", "2GB" or "1000000". Raises ValueError for other text, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    size = 0 if match is None else int(float(match[1]) * SIZE_UNITS[match[2] or ""])
    if size == 0:
        raise ValueError(f"{text!r} is no size; write for example 512MiB or 2GB")
    return size
