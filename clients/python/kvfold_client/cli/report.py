"""Bytes, speed and memory reports in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold_client.cli.answer_clock import AnswerClock


def bytes_text(count: float) -> str:
    """A number of bytes with a binary unit, such as "1.41 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def share_text(part: float, whole: float) -> str:
    """A share in percent; "0%" of nothing."""
    return f"{part / whole:.0%}" if whole else "0%"


def answer_text(clock: AnswerClock) -> str:
    """One line about the KV cache and the speed of a finished answer."""
    memory = clock.finish.memory
    tokens = clock.finish.usage.completion_tokens
    parts = [
        f"{memory.shared_layers} shared layers",
        f"KV held {bytes_text(memory.kv_bytes_held)} of {bytes_text(memory.kv_bytes_full)}",
    ]
    if memory.kv_bytes_saved > 0:  # without sharing, partial last pages make it a little negative
        saved = share_text(memory.kv_bytes_saved, memory.kv_bytes_full)
        parts.append(f"saved {bytes_text(memory.kv_bytes_saved)} ({saved})")
    parts.append(f"{tokens} tokens at {tokens / max(clock.seconds, 1e-9):.1f}/s")
    parts.append(f"first after {clock.first_token_seconds:.2f} s")
    return " | ".join(parts)
