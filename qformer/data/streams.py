"""Annotation files as streams: one record after the other, so that a gigabyte of JSON is never held as objects.

JSON is parsed by Python's own parser, value by value under a window that moves over the file; what has been parsed is
dropped.  Every function reads a byte-order mark and any line ends, and says where a file breaks off.
"""

from __future__ import annotations

import codecs
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qformer.errors import DataError

PIECE = 1 << 20
"""Bytes that are read at a time."""
TOKEN = 16
"""Characters that hold any JSON token but a string; an error further from the window's end is no matter of its end."""
BLANK = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def iterate_json(path: Path, name: str | None = None) -> Iterator[Any]:
    """The elements of a JSON file's list, or of the list that a file's dictionary has under `name`, one by one.

    The file is read to its end, so that one that was cut short behind the list is noticed too.

    Raises:
        DataError: the file cannot be read, or is not valid JSON; says where.
        KeyError: the dictionary has no such name.
        TypeError: another shape than that.
    """
    for _, value in _members(path, name, "["):
        yield value


def iterate_items(path: Path, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """The keys and values of a JSON file's dictionary, or of the one it has under `name`, one by one.

    Raises:
        DataError, KeyError, TypeError: as `iterate_json`.
    """
    yield from _members(path, name, "{")


def iterate_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1; without line ends.

    Raises:
        DataError: it cannot be read as text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read as text: {error}.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file, for small ones.

    Raises:
        DataError: it cannot be read, or is not valid JSON; says where.
    """
    with _Reading(path) as window:
        value = window.value()
        window.end()
    return value


def join(
    rows: Iterable[Any], others: Callable[[], Iterable[Any]], name: str, further: Callable[[Any], object]
) -> Iterator[tuple[Any, Any]]:
    """Each row with the other that has the same value under `name`, or with None; the first of several others counts.

    Official files list both in one order, so the two streams walk side by side.  At the first place where they differ
    the others are put into a temporary table on disk, and the remaining rows are looked up there.

    Args:
        rows: dictionaries, in the order they are wanted.
        others: opens the other stream; called again where the orders differ.
        name: the field that both have.
        further: is given, behind the last row, the value of every other but the first that has it.

    Raises:
        DataError: the temporary table cannot be written.
    """
    beside = iter(others())
    looked_up: _Table | None = None
    try:
        for row in rows:
            if looked_up is None:
                other = next(beside, None)
                if other is not None and other[name] == row[name]:
                    yield row, other
                    continue
                looked_up = _Table((each[name], each) for each in others())
            yield row, looked_up.get(row[name])
        if looked_up is None and next(beside, None) is not None:  # what is left may have been there before
            looked_up = _Table((each[name], each) for each in others())
        for value in looked_up.further if looked_up is not None else ():
            further(value)
    finally:
        if looked_up is not None:
            looked_up.close()


class _Table:
    """Values by key in a temporary file of SQLite's, which is gone when it is closed.

    `further` holds the keys of values that are not the first of their key, and not kept.
    """

    def __init__(self, items: Iterable[tuple[Any, Any]]):
        self.base, self.further = sqlite3.connect(""), list[Any]()
        try:
            self.base.execute("CREATE TABLE held (key TEXT PRIMARY KEY, value TEXT)")
            for key, value in items:
                written = json.dumps(key), json.dumps(value)
                if not self.base.execute("INSERT OR IGNORE INTO held VALUES (?, ?)", written).rowcount:
                    self.further.append(key)
        except sqlite3.Error as error:
            raise DataError(
                f"records cannot be joined ({error}); make room where temporary files go, or set TMPDIR to a folder "
                f"with room."
            ) from None

    def get(self, key: Any) -> Any:
        found = self.base.execute("SELECT value FROM held WHERE key = ?", (json.dumps(key),)).fetchone()
        return None if found is None else json.loads(found[0])

    def close(self) -> None:
        self.base.close()


def _members(path: Path, name: str | None, opening: str) -> Iterator[tuple[str, Any]]:
    """Members of the list ("[", keys are empty) or dictionary ("{") that the file is, or has under `name`."""
    with _Reading(path) as window:
        if name is None:
            yield from window.members(opening, "the file")
        else:
            found = False
            for key in window.keys("the file"):
                if key == name and not found:
                    found = True
                    yield from window.members(opening, f"'{name}'")
                else:
                    window.skip()
            if not found:
                raise KeyError(name)
        window.end()


class _Reading:
    """Opens a file as a window, and makes a DataError of whatever is wrong with it."""

    def __init__(self, path: Path):
        self.path = path
        self.stream: BinaryIO | None = None

    def __enter__(self) -> _Window:
        try:
            self.stream = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: it cannot be read: {error}.") from None
        self.window = _Window(self.stream)
        return self.window

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        assert self.stream is not None
        self.stream.close()
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg.removesuffix(' at')} {self.window.place(error.pos)}"
            raise DataError(f"{self.path}: not valid JSON ({what}); was the download cut short?") from None
        if isinstance(error, RecursionError):
            raise DataError(
                f"{self.path}: its JSON is nested too deeply {self.window.place()}; fetch it again."
            ) from None
        if isinstance(error, OSError | UnicodeDecodeError):
            raise DataError(f"{self.path}: it cannot be read: {error}.") from None
        if isinstance(error, _NumberError):
            raise DataError(f"{self.path}: a number cannot be read {self.window.place()} ({error}); mend it.") from None


class _NumberError(Exception):
    """Python refuses whole numbers of more than some thousand digits."""


class _Window:
    """A part of a JSON file, from where reading stands.

    `text` is the part, `at` where reading stands in it; `passed` and `lines` count what was dropped before it.
    """

    def __init__(self, stream: BinaryIO):
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.passed, self.lines = "", 0, 0, 0
        self.ended = False

    def more(self) -> bool:
        """Take in a further piece, at least as long as what is left, and drop what was read; False at the end."""
        if self.ended:
            return False
        piece = self.stream.read(max(PIECE, len(self.text) - self.at))
        if not piece:
            self.ended = True
            self.decoder.decode(b"", final=True)  # raises where the last character is not whole
            return False
        self.lines += self.text.count("\n", 0, self.at)
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + self.decoder.decode(piece), 0
        return True

    def next(self) -> str:
        """The next character that is not blank, which is not taken; empty at the file's end."""
        if self.at < len(self.text) and self.text[self.at] > " ":
            return self.text[self.at]
        while True:
            found = BLANK.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, wanted: str, instead: str) -> str:
        """The next character, which must be one of the wanted."""
        found = self.next()
        if not found or found not in wanted:
            raise json.JSONDecodeError(instead, self.text, self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The value that comes next."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                open_ended = error.msg.startswith("Unterminated string") or error.pos + TOKEN > len(self.text)
                if not (open_ended and self.more()):
                    raise
            except ValueError as error:
                raise _NumberError(error) from None
            else:
                if end + TOKEN <= len(self.text) or not self.more():  # near the window's end a number may go on
                    self.at = end
                    return value

    def members(self, opening: str, what: str) -> Iterator[tuple[str, Any]]:
        """The members of the list or dictionary that comes next."""
        if opening == "[":
            for _ in self.elements(what):
                yield "", self.value()
        else:
            for key in self.keys(what):
                yield key, self.value()

    def elements(self, what: str) -> Iterator[None]:
        """Steps through the list that comes next; at each step an element is to be read."""
        self.enter("[", f"{what} must be a list")
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield
            if self.take(",]", "Expecting ',' delimiter") == "]":
                return

    def keys(self, what: str) -> Iterator[str]:
        """Steps through the dictionary that comes next; at each key its value is to be read."""
        self.enter("{", f"{what} must be a dictionary")
        if self.next() == "}":
            self.at += 1
            return
        while True:
            if self.next() != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", self.text, self.at)
            key = self.value()
            self.take(":", "Expecting ':' delimiter")
            yield key
            if self.take(",}", "Expecting ',' delimiter") == "}":
                return

    def enter(self, opening: str, otherwise: str) -> None:
        """Step into a list or dictionary; TypeError if a whole value of another kind stands there."""
        if self.next() != opening:
            self.skip()
            raise TypeError(otherwise)
        self.at += 1

    def skip(self) -> None:
        """Pass over the value that comes next, a long list member by member."""
        if self.next() == "[":
            for _ in self.elements(""):
                self.value()
        elif self.next() == "{":
            for _ in self.keys(""):
                self.value()
        else:
            self.value()

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.next():
            raise json.JSONDecodeError("Extra data", self.text, self.at)

    def place(self, at: int | None = None) -> str:
        """Where a place in the window is in the file, in words."""
        at = self.at if at is None else at
        return f"at line {self.lines + self.text.count(chr(10), 0, at) + 1}, character {self.passed + at + 1:,}"
