"""The records of one set: what every reader has in common, whatever the files look like."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qformer.data.index import Entry, Index, in_memory
from qformer.errors import ConfigError, DataError, did_you_mean
from qformer.sample import Sample


class Records(ABC):
    """The records of one set, in the file's order.

    `rows` holds them as parsed, each with its key, in Arrow; `broken` the errors of those that were found broken at
    reading, by their place: they keep it, and asking for one raises its error.
    """

    name: ClassVar[str]
    """What cards call the reader."""
    roles: ClassVar[tuple[str, ...]]
    """Names under `files` in a card; the first is the file that messages name."""
    pictures: ClassVar[tuple[str, ...]] = ("images",)
    """Roles that hold pictures: they are looked into when a picture is opened, and do not belong to the index."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Names that `options` in a card may have."""
    numbering: ClassVar[str] = "record"
    """What a record's key counts, in messages."""

    def __init__(
        self,
        files: Mapping[str, Path],
        options: Mapping[str, Any],
        task: str,
        split: str = "train",
        index: Index | None = None,
    ):
        """Find the records in the index, or read the files.

        Args:
            files: paths by role.
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
        for given, known, where in ((files, self.roles, "files"), (options, self.settings, "options")):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{reader} has no {where}.{name}.{did_you_mean(name, known)}")
        self.files, self.options, self.task, self.split = dict(files), dict(options), task, split
        self.file = self.files[self.roles[0]]
        self.broken: dict[int, DataError] = {}
        self._prepare()
        self.rows = in_memory(self.entries()) if index is None else index.rows(self)
        self.broken = {place: DataError(words) for place, words in self.rows.broken.items()}
        if not self.rows:
            raise DataError(f"{self.file}: holds no record.")

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
            return self._sample(key, self.rows.row(place))
        except DataError as error:
            raise DataError(f"{self.file}, {self.numbering} {key}: {error}.") from None
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{self.file}, {self.numbering} {key}: {_what_is_wrong(error)}.") from None

    def key(self, place: int) -> Any:
        """What messages call a record: its line, its number, or the file's own key."""
        return self.rows.key(place)

    def sources(self) -> dict[str, Path]:
        """The files that records are read from, by role."""
        return {role: path for role, path in self.files.items() if role not in self.pictures}

    def entries(self) -> Iterator[Entry]:
        """Key, row and error of every record, read from the files one by one.

        Raises:
            DataError: a file is not of the form expected.
        """
        rows = self._read()
        for place in itertools.count():
            try:
                key, row = next(rows)
            except StopIteration:
                return
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
                raise DataError(f"{self.file}: {_what_is_wrong(error)}; is it the file that the card means?") from None
            except OSError as error:
                raise DataError(f"{self.file}: it cannot be read: {error}.") from None
            yield key, row, str(self.broken[place]) if place in self.broken else None

    def _prepare(self) -> None:  # noqa: B027 (most readers have nothing to prepare)
        """Check and read the options; runs before `_read`, which does not run where an index holds the records."""

    @abstractmethod
    def _read(self) -> Iterator[tuple[Any, Any]]:
        """Key and content of every record, both such as JSON can write; files of any size, so as a stream."""

    @abstractmethod
    def _sample(self, key: Any, row: Any) -> Sample:
        """One record as a sample; may raise what Python raises at a missing or misformed field."""

    def id(self, key: Any) -> str:
        """A name that is unique over all sets and splits."""
        return f"{self.task}/{self.split}/{key}"

    def image(self, name: str) -> tuple[Path, ...]:
        """The one picture of a record, in the folder of the role `images`."""
        return (self.files["images"] / name,)

    def option(self, name: str, known: Sequence[str]) -> str:
        """An option that takes one of a few words, the first of them by default."""
        value = self.options.get(name, known[0])
        if value not in known:
            raise ConfigError(f"{self.task}: options.{name} is '{value}'; it takes {' or '.join(known)}.")
        return str(value)


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no field '{error.args[0]}'"
    return f"it is not of the form expected ({error})"
