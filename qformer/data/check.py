"""What of a data root is there: the files, records and pictures of each card, and what is still to be downloaded.

No weight is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qformer import cards, keyed, resources
from qformer.cards import MEDIA, Download, EvalCard, TaskCard, TrainCard
from qformer.data.index import Index, Rows
from qformer.data.pictures import stands_for
from qformer.data.readers import READERS, expected, is_there, read_records
from qformer.data.records import Records
from qformer.errors import DataError, lookup
from qformer.images import load_image
from qformer.sample import Video
from qformer.videos import frames

SAMPLED = 100
"""Pictures of each set that are opened, unless all are."""
Track = Callable[[str, int], Callable[[int], None]]
"""Makes a progress bar of a name and a length, and gives what moves it."""


@dataclass(frozen=True)
class File:
    """A file or folder that a card's sections are read from."""

    role: str
    path: Path
    there: bool
    elsewhere: bool = False
    """Whether the reader asks the hub where it is not there."""


@dataclass
class Section:
    """What was found of a card's `train` or `eval`."""

    name: str
    published: int | None
    records: int | None = None
    """None: they were not read, for want of files or because of `error`."""
    error: str | None = None
    broken: list[str] = field(default_factory=list)
    """One sentence for each record that cannot be used, its picture aside."""
    looked: int = 0
    """Pictures that were opened, or should have been."""
    pictures: list[str] = field(default_factory=list)
    """One sentence for each picture that is missing or cannot be read."""
    unlooked: str | None = None
    """Why no picture was looked at."""


@dataclass
class Found:
    """What was found of a card."""

    card: TaskCard
    root: Path
    files: list[File]
    sections: list[Section] = field(default_factory=list)

    @property
    def missing(self) -> list[File]:
        """The files that are not there."""
        return [file for file in self.files if not file.there and not file.elsewhere]

    @property
    def downloads(self) -> list[Download]:
        """What brings the missing files: whatever goes where one of them belongs, or where there is nothing yet."""
        missing = [file.path for file in self.missing if file.path.is_relative_to(self.root)]
        gone = [PurePosixPath(path.relative_to(self.root).as_posix()) for path in missing]
        return [
            each
            for each in self.card.downloads
            if not stands_for(self.root / each.into)
            or any(path.is_relative_to(each.into) or PurePosixPath(each.into).is_relative_to(path) for path in gone)
        ]

    @property
    def lacking(self) -> bool:
        """Whether something is still to be put into the root."""
        return bool(self.missing or self.downloads)

    @property
    def sound(self) -> bool:
        """Whether nothing is missing or broken."""
        return not self.lacking and not any(each.error or each.broken or each.pictures for each in self.sections)


def chosen(names: Sequence[str]) -> list[TaskCard]:
    """Cards by name; "held_in" and "held_out" stand for those of that role, no name for all that are shipped.

    Raises:
        ConfigError: no such card.
    """
    shipped = [cards.load(name) for name in resources.names("tasks")] if {"held_in", "held_out"} & {*names} else []
    found: dict[str, TaskCard] = {}
    for name in names or resources.names("tasks"):
        for card in [each for each in shipped if each.role == name] or [cards.load(name)]:
            found[card.key] = card
    return list(found.values())


def sections_of(card: TaskCard) -> Iterator[tuple[str, TrainCard | EvalCard]]:
    """The sections that a card has, by name."""
    if card.train is not None:
        yield "train", card.train
    if card.eval is not None:
        yield "eval", card.eval


def check(card: TaskCard, root: Path, index: Index, *, every: bool, seed: int, max_pixels: int, track: Track) -> Found:
    """Look for a card's files, read its records, and open its pictures.

    Args:
        card: the card.
        root: data.root; need not be there.
        index: where records are kept that were read.
        every: all pictures are opened, and all records made into samples; otherwise a sample of them.
        seed: of the sample.
        max_pixels: of a picture, before it is opened.
        track: makes progress bars.
    """
    files: dict[Path, File] = {}
    for _, section in sections_of(card):
        elsewhere = lookup(READERS, section.reader, "reader").elsewhere
        for role, path in expected(section, root):
            files[path] = File(role, path, is_there(role, path), role in elsewhere)
    found = Found(card, root, list(files.values()))
    for name, section in sections_of(card):
        shown = Section(name, section.size)
        found.sections.append(shown)
        mine = [files[path] for _, path in expected(section, root)]
        if not all(file.there for file in mine if file.role not in MEDIA):
            continue
        try:
            records = read_records(section, root, card, index)
        except DataError as error:
            shown.error = str(error)
            continue
        shown.records = len(records)
        shown.broken = [str(error) for error in records.broken.values()]
        there = all(file.there for file in mine if file.role in MEDIA)
        if not there:
            shown.unlooked = "the folder of its pictures is not there"
        places = range(len(records)) if every else sample(len(records), SAMPLED, seed, card.key)
        _look(shown, records, places, there, max_pixels, track(f"{card.key} {name}", len(places)))
    return found


def sample(size: int, most: int, seed: int, key: str) -> list[int]:
    """Places of some records, the same for the same seed."""
    return sorted(keyed.permute(place, size, seed, key, "check") for place in range(min(size, most)))


def _look(
    shown: Section,
    records: Records,
    places: Iterable[int],
    open_them: bool,
    max_pixels: int,
    step: Callable[[int], None],
) -> None:
    """Make samples of some records and open each of their pictures once."""
    seen: set[int] = set()  # hashes: names of millions of pictures would take gigabytes
    for place in places:
        step(1)
        if place in records.broken:
            continue
        try:
            pictures = records[place].images
        except DataError as error:
            shown.broken.append(str(error))
            continue
        for picture in pictures if open_them else ():
            if hash(picture) not in seen:
                seen.add(hash(picture))
                shown.looked += 1
                problem = _problem(picture, f"record {records.key(place)}", max_pixels)
                if problem is not None:
                    shown.pictures.append(problem)


def _problem(picture: Any, where: str, max_pixels: int) -> str | None:
    """What keeps a picture or a video from being used."""
    try:
        if isinstance(picture, Video):
            for _ in frames(picture, max_pixels, where):
                pass
        else:
            load_image(picture, max_pixels, where)
    except DataError as error:
        return str(error)
    return None


def indexed(card: TaskCard, name: str, section: TrainCard | EvalCard, root: Path, index: Index) -> Rows:
    """The rows of a section, in the index from now on.

    Raises:
        DataError: a file is not there or cannot be read, or no index can be written.
    """
    elsewhere = lookup(READERS, section.reader, "reader").elsewhere
    for role, path in expected(section, root):
        if role not in (*MEDIA, *elsewhere) and not is_there(role, path):
            raise DataError(f"{card.key} {name}: there is no '{path}' (files.{role} of the card, under data.root).")
    return read_records(section, root, card, index).rows
