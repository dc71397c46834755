"""Random choices about data as functions of their key, written out so that no library can change them.

Every choice is made from a 64-bit hash of (seed, names, numbers).  The hash is FNV-1a over the parts' UTF-8 bytes,
finished by the SplitMix64 mixer; golden values in the tests hold it still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit numbers that scatters neighbours."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def keyed_hash(*key: object) -> int:
    """A 64-bit number that depends on every part of the key and on their order."""
    state = 0xCBF29CE484222325
    for part in key:
        for byte in str(part).encode():
            state = ((state ^ byte) * 0x100000001B3) & MASK
        state = mix(state ^ 0xFF)  # a mark between parts: ("ab", "c") differs from ("a", "bc")
    return state


def uniform(*key: object) -> float:
    """A number in [0, 1)."""
    return (keyed_hash(*key) >> 11) / (1 << 53)


def below(count: int, *key: object) -> int:
    """A whole number in [0, count); the bias is below count / 2**64."""
    return keyed_hash(*key) * count >> 64


def choose(items: Sequence[Item], *key: object) -> Item:
    """One of the items, all equally likely."""
    return items[below(len(items), *key)]


def stream(*key: object) -> Iterator[float]:
    """Numbers in [0, 1) without end, for a choice that needs several."""
    state = keyed_hash(*key)
    while True:
        state = mix(state)
        yield (state >> 11) / (1 << 53)


def permute(place: int, size: int, *key: object) -> int:
    """Where `place` goes in a permutation of range(size) that belongs to the key, computed without a table.

    A four-round Feistel network over the smallest even number of bits that holds `size`, walked along its cycle until
    it lands below `size` (fewer than four steps on average).
    """
    if not 0 <= place < size:
        raise ValueError(f"place {place} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    rounds = [keyed_hash(*key, number) for number in range(4)]
    while True:
        left, right = place >> half, place & low
        for secret in rounds:
            left, right = right, left ^ (mix(right ^ secret) & low)
        place = (left << half) | right
        if place < size:
            return place
