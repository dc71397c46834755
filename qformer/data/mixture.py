"""Which sample is number k: the balanced mixture as a pure function of (seed, k), without state or tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from qformer import keyed
from qformer.errors import ConfigError

SCALE = 1 << 40
"""Probabilities are held as whole numbers of this many parts, so that every machine counts alike."""


@dataclass(frozen=True)
class Draw:
    """Draw `number` of the whole run: record `place` of a set, in its pass `turn` over that set."""

    number: int
    task: str
    turn: int
    place: int


class Mixture:
    """Sets drawn in proportion to p_d, each set's records in a fresh permutation every pass.

    With the sets sorted by falling p_d, the first has had T₁ = round(k·p₁) of k draws, the next
    round((k - T₁)·p₂/(1 - p₁)) and so on, the last the rest.  Exactly one total rises from k to k + 1, and totals stay
    within 2 of k·p_d for ever.  Any k costs the same, so a run stores nothing but k.
    """

    def __init__(self, probabilities: Mapping[str, float], records: Mapping[str, int], seed: int):
        """p_d by set, and N_d: the records really there.

        Raises:
            ConfigError: no set at all, or a set with a positive share and no record.
        """
        names = [name for name, share in probabilities.items() if share > 0]
        if not names:
            raise ConfigError("data.tasks names no set with a multiplier above 0; a mixture needs at least one.")
        for name in names:
            if records[name] < 1:
                raise ConfigError(f"data.tasks: the set '{name}' has no records, so nothing can be drawn from it.")
        self.seed, self.records = seed, dict(records)
        self.names = sorted(names, key=lambda name: (-probabilities[name], name))
        parts = {name: max(1, round(Fraction(probabilities[name]) * SCALE)) for name in self.names}
        left = sum(parts.values())
        self._shares = []
        for name in self.names:
            self._shares.append((parts[name], left))
            left -= parts[name]

    def shares(self) -> dict[str, float]:
        """p_d of each set, by falling share."""
        whole = self._shares[0][1]
        return {name: part / whole for name, (part, _) in zip(self.names, self._shares, strict=True)}

    def totals(self, count: int) -> dict[str, int]:
        """How many of the first `count` draws each set has had."""
        totals, rest = {}, count
        for name, (part, left) in zip(self.names, self._shares, strict=True):
            totals[name] = (2 * rest * part + left) // (2 * left)  # round half up, in integers
            rest -= totals[name]
        return totals

    def places(self, first: int, last: int) -> dict[str, Iterable[int]]:
        """By set: the records that draws `first` to `last` - 1 take, each once."""
        before, after = self.totals(first), self.totals(last)
        found: dict[str, Iterable[int]] = {}
        for name, size in ((name, self.records[name]) for name in self.names):
            turns = (divmod(mine, size) for mine in range(before[name], after[name]))
            found[name] = (
                range(size)
                if after[name] - before[name] >= size
                else {keyed.permute(place, size, self.seed, name, turn) for turn, place in turns}
            )
        return found

    def draw(self, number: int) -> Draw:
        """Draw `number`, counted from 0."""
        before = after = number
        after += 1
        for name, (part, left) in zip(self.names, self._shares, strict=True):
            mine, then = (2 * before * part + left) // (2 * left), (2 * after * part + left) // (2 * left)
            if then > mine:
                size = self.records[name]
                turn, place = divmod(mine, size)
                return Draw(number, name, turn, keyed.permute(place, size, self.seed, name, turn))
            before -= mine
            after -= then
        raise AssertionError("every draw belongs to one set")

    def nth(self, name: str, count: int) -> Draw:
        """A set's own draw `count`, counted from 0."""
        end = 1
        while self.totals(end)[name] <= count:
            end *= 2
        return self.draw(bisect_right(range(end + 1), count, key=lambda number: self.totals(number)[name]) - 1)
