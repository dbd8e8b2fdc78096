"""Random numbers that depend on a request's seed and a token's position, and on nothing else."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one position of one request: splitmix64 (Steele, Lea, Flood 2014) over both."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) / (1 << 53)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
