"""A set's records by the pictures they are about, and an order of them in small groups that share a picture.

Drawn one by one, a picture with ten questions almost never comes twice in a step, and is encoded ten times.  In groups
of `data.per_picture` it is encoded three times.  The order is a function of its key like the plain permutation, and
keeps no more than one array, of four bytes a record: the records sorted by picture.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyarrow
from numpy.typing import NDArray

from qformer import keyed
from qformer.data.index import encoded
from qformer.data.records import Records

FORMAT = 1
"""Rises when records are sorted otherwise, or what is kept of it is written otherwise."""


def apportioned(count: int, shares: Sequence[tuple[int, int]]) -> list[int]:
    """How many of the first `count` of a sequence each of some kinds has, all of them evenly spread.

    `shares`: by kind its part, and what is left of the whole for it and those behind it.  Exactly one of the results
    rises from `count` to `count` + 1, and at the whole each is its part.
    """
    found, rest = [], count
    for part, left in shares:
        found.append((2 * rest * part + left) // (2 * left))  # round half up, in integers
        rest -= found[-1]
    return found


@dataclass(frozen=True)
class ByPicture:
    """Places of records, those about one picture side by side.

    counts: pairs of (records on a picture, pictures that have so many), by falling records.  order: first the records
    of the pictures that have the most; nothing where no two records share a picture.
    """

    counts: tuple[tuple[int, int], ...]
    order: Sequence[int] | NDArray[numpy.uint32]

    @property
    def records(self) -> int:
        """How many there are."""
        return sum(many * pictures for many, pictures in self.counts)

    @property
    def pictures(self) -> int:
        """How many distinct ones there are."""
        return sum(pictures for _, pictures in self.counts)

    @property
    def shared(self) -> bool:
        """Whether any two records share a picture."""
        return self.records > self.pictures


@dataclass(frozen=True)
class _Stretch:
    """Groups cut from pictures with `many` records: as many as `parts` of each, from its part `part` on.

    group: the number of the first; record: the place in the order of the first record.
    """

    group: int
    record: int
    many: int
    part: int
    parts: int


class Groups:
    """The order of a set within a pass: groups of up to `per` records on one picture.

    A picture with more records has as many full groups as it can, and one of the rest; which of its records stand
    together, and in which order groups come, belongs to the pass.  Groups of each size are permuted among themselves,
    and the sizes spread evenly over the pass, as sets are in the mixture: so the place of every group is reckoned.
    """

    def __init__(self, sorted_records: ByPicture, per: int):
        self.per, self.records, self.pictures = per, sorted_records.records, sorted_records.pictures
        self.order = sorted_records.order
        stretches: dict[int, list[_Stretch]] = {}
        numbers: dict[int, int] = {}
        record = 0
        for many, pictures in sorted_records.counts:
            full, rest = divmod(many, per)
            for size, part, parts in ((per, 0, full), (rest, full, 1)):
                if size and parts:
                    first = numbers.get(size, 0)
                    stretches.setdefault(size, []).append(_Stretch(first, record, many, part, parts))
                    numbers[size] = first + pictures * parts
            record += many * pictures
        self.sizes = sorted(numbers, key=lambda size: (-numbers[size], size))
        self._numbers = [numbers[size] for size in self.sizes]
        self._stretches = [stretches[size] for size in self.sizes]
        self._shares = [(number, sum(self._numbers[place:])) for place, number in enumerate(self._numbers)]

    def __len__(self) -> int:
        """How many groups there are."""
        return sum(self._numbers)

    def start(self, group: int) -> int:
        """At which place of the order a group begins."""
        return sum(size * number for size, number in zip(self.sizes, apportioned(group, self._shares), strict=True))

    def take(self, place: int, *key: object) -> tuple[int, int]:
        """The record at a place of the order that belongs to the key, and the number of its group there."""
        group = bisect_right(range(len(self)), place, key=self.start) - 1
        before, after = apportioned(group, self._shares), apportioned(group + 1, self._shares)
        kind = next(kind for kind, number in enumerate(after) if number > before[kind])
        size, number = self.sizes[kind], self._numbers[kind]
        chosen = keyed.permute(before[kind], number, *key, "groups", size)
        stretches = self._stretches[kind]
        stretch = stretches[bisect_right(stretches, chosen, key=lambda each: each.group) - 1]
        picture, part = divmod(chosen - stretch.group, stretch.parts)
        first = stretch.record + picture * stretch.many
        mine = (stretch.part + part) * self.per + place - self.start(group)
        return int(self.order[first + keyed.permute(mine, stretch.many, *key, "picture", first)]), group


# -- sorting ----------------------------------------------------------------------------------------------------------


def sort_by_picture(names: Iterable[Any]) -> ByPicture:
    """Records by what tells their pictures apart, given as JSON can write it; None: a record shares its with none.

    They are told apart by 64 bits: that any two of fourteen million pictures are taken for one has a chance of 5 in a
    million, and no consequence but a group.
    """
    content = bytearray()
    for place, name in enumerate(names):
        told = b"\0%d" % place if name is None else encoded(name)
        content += hashlib.blake2b(told, digest_size=8).digest()
    marks = numpy.frombuffer(content, "<u8")
    order = numpy.argsort(marks, kind="stable")
    ranked = marks[order]
    firsts = numpy.flatnonzero(numpy.r_[True, ranked[1:] != ranked[:-1]])
    many = numpy.diff(firsts, append=len(marks))
    if len(firsts) == len(marks):
        return ByPicture(((1, len(marks)),), numpy.empty(0, numpy.uint32))
    chosen = numpy.lexsort((order[firsts], -many))  # the most records first; of equals, whose record comes first
    firsts, many = firsts[chosen], many[chosen]
    shifts = numpy.repeat(firsts - (numpy.cumsum(many) - many), many)
    values, pictures = numpy.unique(many, return_counts=True)
    counts = tuple((int(value), int(count)) for value, count in zip(values[::-1], pictures[::-1], strict=True))
    return ByPicture(counts, order[shifts + numpy.arange(len(marks))].astype(numpy.uint32))


def read_by_picture(records: Records, say: Callable[[str], object] = str) -> ByPicture:
    """The records of a set by picture, kept beside its index where it has one; `say` is told where they are sorted."""

    def make() -> pyarrow.Table:
        if records.looks_inside():
            say(f"{records.file}: nothing names its pictures, so each is read to tell them apart, once.")
        elif records.rows.indexed:
            say(f"{records.file}: its {len(records):,} records are sorted by picture, once.")
        found = sort_by_picture(records.looks())
        table = pyarrow.table({"record": pyarrow.array(found.order, pyarrow.uint32())})
        return table.replace_schema_metadata({"counts": json.dumps(found.counts)})

    table = records.rows.beside(f"pictures{FORMAT}", make)
    column = table["record"].chunk(0) if table.num_rows else pyarrow.array([], pyarrow.uint32())
    counts = tuple((many, pictures) for many, pictures in json.loads(table.schema.metadata[b"counts"]))
    return ByPicture(counts, column.to_numpy(zero_copy_only=True))
