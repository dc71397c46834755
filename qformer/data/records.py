"""The records of one set: what every reader has in common, whatever the files look like."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qformer.cards import MEDIA
from qformer.data.index import Entry, Index, encoded, in_memory
from qformer.data.pictures import Pictures
from qformer.data.values import identifies, shown
from qformer.errors import ConfigError, DataError, did_you_mean
from qformer.images import picture_key
from qformer.sample import Packed, Sample, Video
from qformer.videos import FILES

MISFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RecursionError)
"""What Python raises where a file or a record is of another form than its reader takes it for."""
Settings = Mapping[str, Any]
"""Names of options, with what holds where none is given."""
MOST_FRAMES = 1024
"""Frames of a video that can be looked at: at 32 soft tokens each, more positions than LLMs have."""


class Records(ABC):
    """The records of one set, in the file's order.

    `rows` holds them as parsed, each with its key, in Arrow; `broken` the errors of those that were found broken at
    reading, by their place: they keep it, and asking for one raises its error.
    """

    name: ClassVar[str]
    """What cards call the reader."""
    roles: ClassVar[tuple[str, ...]]
    """Names under `files` in a card; the first is the file that messages name."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Further names under `files`, which a card may leave out."""
    elsewhere: ClassVar[tuple[str, ...]] = ()
    """Roles whose file need not be under data.root."""
    settings: ClassVar[Settings] = {}
    """Names that `options` in a card may have, and what holds where a card has them not; None: nothing."""
    picture: ClassVar[str | None] = None
    """The field of a row that tells its picture from others; None: `looks_at` finds out otherwise."""
    answered: ClassVar[Mapping[str, str]] = {}
    """Fields that hold answers, and what to do with a file none of whose records has them, as a server keeps those of
    a test split."""
    numbering: ClassVar[str] = "record"
    """What a record's key counts, in messages."""

    def __init__(
        self,
        files: Mapping[str, Path | Sequence[Path]],
        options: Mapping[str, Any],
        task: str,
        split: str = "train",
        index: Index | None = None,
    ):
        """Find the records in the index, or read the files.

        Args:
            files: paths by role; under `images` and `videos` there may be several.
            options: the reader's own settings.
            task: the card's key; filed in each sample, and first part of its id.
            split: second part of the ids.
            index: where records are kept that were read before; None: they are read, and held in memory.

        Raises:
            ConfigError: a role or an option is missing or unknown.
            DataError: a file is not of the form expected, or holds no record.
        """
        reader = f"{task}: reader '{self.name}'"
        for role in self.roles:
            if role not in files:
                raise ConfigError(f"{reader} needs files.{role}; it takes {', '.join(self.roles)}.")
        roles = (*self.roles, *self.optional)
        for given, known, where in ((files, roles, "files"), (options, self.settings, "options")):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{reader} has no {where}.{name}.{did_you_mean(name, known)}")
        for role, path in files.items():
            if role not in MEDIA and not isinstance(path, Path):
                raise ConfigError(
                    f"{reader} takes one file as files.{role}; only files.images and files.videos may be several "
                    f"folders."
                )
        self.files = {role: path for role, path in files.items() if isinstance(path, Path) and role not in MEDIA}
        self.pictures, self.videos = Pictures(files.get("images", ())), Pictures(files.get("videos", ()))
        defaults = {name: value for name, value in self.settings.items() if value is not None}
        self.options, self.task, self.split = {**defaults, **options}, task, split
        self.file = self.files[self.roles[0]]
        self.broken: dict[int, DataError] = {}
        self.surplus: list[Entry] = []
        self._prepare()
        self.rows = in_memory(self.entries()) if index is None else index.rows(self)
        self.broken = {place: DataError(words) for place, words in self.rows.broken.items()}
        if not self.rows:
            raise DataError(f"{self.file}: holds no record; is it the file that the card means?")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample:
        """One record.

        Raises:
            DataError: it is broken; names file and record.
        """
        place = range(len(self.rows))[place]
        if place in self.broken:
            raise self.broken[place]
        key = self.rows.key(place)
        try:
            return _encodable(self._sample(key, self.rows.row(place)))
        except DataError as error:
            raise self.at_fault(key, str(error)) from None
        except MISFORMED as error:
            remedy = "; mend or remove the record"
            lacking = error.args[0] if isinstance(error, KeyError) and error.args else None
            if lacking in self.answered and lacking in self.unanswered:
                remedy = f" in any record, as where the answers are a server's; {self.answered[lacking]}"
            raise self.at_fault(key, f"{_what_is_wrong(error)}{remedy}") from None

    @functools.cached_property
    def unanswered(self) -> set[str]:
        """Fields of answers that no record has."""
        lacking = set(self.answered)
        for _, row in self.rows.walk():
            lacking = {name for name in lacking if not isinstance(row, dict) or name not in row}
            if not lacking:
                break
        return lacking

    def at_fault(self, key: Any, problem: str) -> DataError:
        """The error of one record, which names it; the problem says what would work too."""
        return DataError(f"{self.file}, {self.numbering} {_printable(key)}: {_printable(problem)}.")

    def once(self, pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Keys and rows as they come; a record whose key is none, or one that an earlier has, is noted as broken."""
        seen: set[Any] = set()
        for place, (key, row) in enumerate(pairs):
            if not identifies(key):
                self.broken[place] = self.at_fault(key, f"its id is {shown(key)}; it must be text or a number")
            elif key in seen:
                self.broken[place] = self.at_fault(key, "an earlier record has the same id; remove one of them")
            else:
                seen.add(key)
            yield key, row

    def first(self, parts: Iterable[tuple[Any, Any]], where: str) -> Iterator[tuple[Any, Any]]:
        """Ids and parts of records as they come; one whose id an earlier part has is listed instead.

        Args:
            parts: what is no record by itself, as a caption where records are pictures; None for an id is none.
            where: what messages say of the place where they stand.
        """
        seen: set[Any] = set()
        for key, part in parts:
            if key in seen:
                self.twice(key, where)
                continue
            if key is not None:
                seen.add(key)
            yield key, part

    def twice(self, key: Any, where: str) -> None:
        """List a part of a record that is there more than once: behind the records, as a broken one."""
        told = self.at_fault(key, f"it stands {where} more than once; the first is taken")
        self.surplus.append((encoded(key), b"null", str(told)))

    def key(self, place: int) -> Any:
        """What messages call a record: its line, its number, or the file's own key."""
        return self.rows.key(place)

    def looks(self) -> Iterator[Any]:
        """What tells the pictures of each record apart, as JSON can write it; None of a record that is broken."""
        for place, (key, row) in enumerate(self.rows.walk()):
            try:
                yield None if place in self.broken else self.looks_at(key, row)
            except (*MISFORMED, DataError):
                yield None

    def looks_at(self, key: Any, row: Any) -> Any:
        """What tells the pictures of one record apart; where a row names them, none is looked for on the disk."""
        if self.picture is not None:
            return row[self.picture]
        return [picture_key(each) for each in self._sample(key, row).images]

    def looks_inside(self) -> bool:
        """Whether `looks` has to read the pictures themselves."""
        return False

    def sources(self) -> dict[str, Path]:
        """The files that records are read from, by role; pictures are looked for when one is opened."""
        return dict(self.files)

    def entries(self) -> Iterator[Entry]:
        """Key, row and error of every record, read from the files one by one.

        Raises:
            DataError: a file is not of the form expected.
        """
        self.surplus, rows = [], self._read()
        for place in itertools.count():
            try:
                key, row = next(rows)
            except StopIteration:
                break
            except MISFORMED as error:
                raise _misformed(self.file, error) from None
            except OSError as error:
                raise DataError(f"{self.file}: it cannot be read: {error}.") from None
            try:
                entry = encoded(key), encoded(row)
            except (TypeError, ValueError, RecursionError) as error:
                raise self.at_fault(key, f"it holds what JSON cannot ({error}); mend or remove the record") from None
            yield *entry, str(self.broken[place]) if place in self.broken else None
        yield from self.surplus

    def beside(self, role: str, rows: Iterable[Any]) -> Iterator[Any]:
        """What is read from another file than the first, so that an error names the right one."""
        try:
            yield from rows
        except MISFORMED as error:
            raise _misformed(self.files[role], error) from None

    def _prepare(self) -> None:  # noqa: B027 (most readers have nothing to prepare)
        """Check and read the options; runs before `_read`, which does not run where an index holds the records."""

    @abstractmethod
    def _read(self) -> Iterator[tuple[Any, Any]]:
        """Key and content of every record, both such as JSON can write; files of any size, so as a stream."""

    @abstractmethod
    def _sample(self, key: Any, row: Any) -> Sample:
        """One record as a sample; may raise what Python raises at a missing or misformed field."""

    def id(self, key: Any) -> str:
        """A name that is unique over all sets and splits, and the same for all variants of a card."""
        return f"{self.task.partition(':')[0]}/{self.split}/{key}"

    def image(self, *names: str) -> tuple[Path | Packed]:
        """The one picture of a record, under the first of its possible names that the role `images` has."""
        return (self.pictures.find(*names),)

    def numbered(self, number: int) -> tuple[Path | Packed]:
        """COCO's picture of a number; option `image` is the pattern of its file name, or a list of patterns."""
        patterns = self.options["image"]
        try:
            names = [pattern % number for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.task}: options.image is {patterns!r}; it takes a file name with a place for a number, as "
                f"'%012d.jpg', or a list of such."
            ) from None
        return self.image(*names)

    def video(self, *names: str) -> tuple[Video]:
        """The one video of a record: a file that has one of its possible names, or a folder of frames."""
        found = self.videos.first(*(name + ending for name in names for ending in ("", *FILES)))
        if found is None:
            named = " or ".join(f"'{name}'" for name in names)
            raise DataError(
                f"there is no video {named} in {' or '.join(map(str, self.videos.roots))}, neither as a file (with an "
                f"ending like {FILES[0]} or {FILES[1]}) nor as a folder of frames"
            )
        return (Video(found, self.frames()),)

    def option(self, name: str, known: Sequence[str]) -> str:
        """An option that takes one of a few words."""
        value = self.options[name]
        if value not in known:
            raise ConfigError(f"{self.task}: options.{name} is '{value}'; it takes {' or '.join(known)}.")
        return str(value)

    def answers_hidden(self) -> bool:
        """Whether option `answers` says that only a test server has them; such samples have no references."""
        return self.option("answers", ("given", "hidden")) == "hidden"

    def frames(self) -> int:
        """The option `frames`: how many of each video are looked at."""
        value = self.options["frames"]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_FRAMES:
            raise ConfigError(
                f"{self.task}: options.frames is {value!r}; it takes a whole number from 1 to {MOST_FRAMES}."
            )
        return value

    def listed(self, name: str) -> Sequence[Any]:
        """An option that takes a list; in a text, any part of it would be found."""
        value = self.options[name]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{self.task}: options.{name} is '{value}'; it takes a list, even of one.")
        return value


def _encodable(sample: Sample) -> Sample:
    """The sample, if its words can be written down: JSON may hold halves of characters, which no tokenizer takes."""
    said = (word for turn in sample.turns for word in (turn.instruction, turn.answer))
    for word in (sample.id, *sample.references, *said, *sample.fields.values()):
        if isinstance(word, str):
            word.encode()
    _encode(sample.candidates)
    return sample


@functools.lru_cache(8)
def _encode(words: tuple[str, ...]) -> None:
    """Once: thousands of records share a vocabulary of thousands."""
    for word in words:
        word.encode()


def _printable(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()


def _misformed(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: {_what_is_wrong(error)}; is it the file that the card means?")


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no field '{error.args[0]}'"
    return f"it is not of the form expected ({error})"
