"""Which sample is number k: the balanced mixture as a pure function of (seed, k), without state or tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from qformer import keyed
from qformer.data.grouping import Groups, apportioned
from qformer.errors import ConfigError

SCALE = 1 << 40
"""Probabilities are held as whole numbers of this many parts, so that every machine counts alike."""


@dataclass(frozen=True)
class Draw:
    """Draw `number` of the whole run: record `place` of a set, in its pass `turn` over that set.

    `group`: the number within the pass of the group that it is drawn in, whose records share a picture; None: it is
    drawn alone.
    """

    number: int
    task: str
    turn: int
    place: int
    group: int | None = None

    @property
    def unit(self) -> object:
        """The same for all draws of a group, and for no others."""
        return self.number if self.group is None else (self.task, self.turn, self.group)


class Mixture:
    """Sets drawn in proportion to p_d, each set's records in a fresh permutation every pass.

    With the sets sorted by falling p_d, the first has had T₁ = round(k·p₁) of k draws, the next
    round((k - T₁)·p₂/(1 - p₁)) and so on, the last the rest.  Exactly one total rises from k to k + 1, and totals stay
    within 2 of k·p_d for ever.  Any k costs the same, so a run stores nothing but k.
    """

    def __init__(
        self,
        probabilities: Mapping[str, float],
        records: Mapping[str, int],
        seed: int,
        groups: Mapping[str, Groups] | None = None,
    ):
        """p_d by set, and N_d: the records really there.

        Args:
            probabilities: p_d.
            records: N_d.
            seed: of all permutations.
            groups: sets whose records on one picture come in groups; the order of others is a plain permutation.

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
        self.groups = {name: each for name, each in (groups or {}).items() if name in names}
        assert all(each.records == records[name] for name, each in self.groups.items())
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
        return dict(zip(self.names, apportioned(count, self._shares), strict=True))

    def pictures(self, first: int, last: int) -> int:
        """At most how many distinct pictures draws `first` to `last` - 1 look at, where each record has one.

        A group is one; records of sets without groups, and those of several sets, are taken to look at different ones.
        """
        drawn = map(self.draw, range(first, last))
        return len({draw.unit for draw in drawn})

    def places(self, first: int, last: int) -> dict[str, Iterable[int]]:
        """By set: the records that draws `first` to `last` - 1 take, each once."""
        before, after = self.totals(first), self.totals(last)
        found: dict[str, Iterable[int]] = {}
        for name, size in ((name, self.records[name]) for name in self.names):
            found[name] = (
                range(size)
                if after[name] - before[name] >= size
                else {self._taken(name, mine)[1] for mine in range(before[name], after[name])}
            )
        return found

    def draw(self, number: int) -> Draw:
        """Draw `number`, counted from 0."""
        before = after = number
        after += 1
        for name, (part, left) in zip(self.names, self._shares, strict=True):
            mine, then = (2 * before * part + left) // (2 * left), (2 * after * part + left) // (2 * left)
            if then > mine:
                return Draw(number, name, *self._taken(name, mine))
            before -= mine
            after -= then
        raise AssertionError("every draw belongs to one set")

    def nth(self, name: str, count: int) -> Draw:
        """A set's own draw `count`, counted from 0."""
        end = 1
        while self.totals(end)[name] <= count:
            end *= 2
        return self.draw(bisect_right(range(end + 1), count, key=lambda number: self.totals(number)[name]) - 1)

    def _taken(self, name: str, mine: int) -> tuple[int, int, int | None]:
        """Of a set's own draw: the pass, the record, and the group."""
        size = self.records[name]
        turn, place = divmod(mine, size)
        if name in self.groups:
            return turn, *self.groups[name].take(place, self.seed, name, turn)
        return turn, keyed.permute(place, size, self.seed, name, turn), None


def dealt(draws: Sequence[Draw], ranks: int) -> list[list[Draw]]:
    """A step's draws shared out to processes, as many to each as in turn; a group goes to one while it has room."""
    room = [len(range(rank, len(draws), ranks)) for rank in range(ranks)]
    groups: dict[object, list[Draw]] = {}
    for draw in draws:
        groups.setdefault(draw.unit, []).append(draw)
    shares: list[list[Draw]] = [[] for _ in room]
    for mates in sorted(groups.values(), key=len, reverse=True):
        while mates:
            rank = max(range(ranks), key=room.__getitem__)
            shares[rank] += mates[: room[rank]]
            mates, room[rank] = mates[room[rank] :], room[rank] - min(len(mates), room[rank])
    return [sorted(share, key=lambda draw: draw.number) for share in shares]
