"""What readers make of their files, written once to memory-mapped Arrow and found again at every start.

An index is a file of two columns, the JSON of each record's key and of its row: rows of any shape fit, decoding one
costs microseconds, and processes share its pages.  Beside it lies a manifest: which files it was made of, by which
reader and options, and the records that were found broken.  With `data.per_picture` the places of records, sorted by
picture, lie beside it too.

An index holds as long as its sources do.  Hashing a gigabyte at every start would cost seconds, so the manifest notes
size, modification and change time of each source, and only where one of them differs is the content hashed: the same
content (a copied or touched file) keeps the index, another content, reader, option or format makes a new one.  Of files
that hold pictures too, size, modification time and both ends stand for the content.

Files appear whole, by renaming, or not at all.  There are no locks: two processes that build the same index write the
same file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import orjson
import pyarrow

from qformer import __version__
from qformer.errors import DataError

if TYPE_CHECKING:
    from qformer.data.records import Records

Entry = tuple[bytes, bytes, str | None]
"""A record's key and row as JSON, and its error where it was found broken."""
FORMAT = 2
"""Rises when the files below are written otherwise, or when what readers share (streams, OCR) reads otherwise."""
FOLDER = ".qformer-index"
"""Where indices are kept under data.root."""
SMALL = 8 << 20
"""Bytes of sources that are read faster than an index is worth."""
CONTAINERS = (".tar", ".parquet", ".arrow")
"""Endings of files that hold pictures beside their records, and may be terabytes."""
END = 1 << 20
"""Bytes at either end of such a file that are hashed."""
BATCH = 16 << 20
"""Bytes of rows that are held before they are written."""
DAY = 24 * 60 * 60
SCHEMA = pyarrow.schema([("key", pyarrow.binary()), ("row", pyarrow.binary())])


class Rows:
    """Keys and rows of one set, in an Arrow file that is memory-mapped or in memory; no object stands for a record."""

    def __init__(self, source: Path | pyarrow.Buffer, broken: Mapping[int, str], content: str | None = None):
        """Open the rows.

        Args:
            source: the Arrow file, or its bytes.
            broken: errors of records by their place.
            content: see the property, where it is known.

        Raises:
            OSError, ValueError: no such file, or not whole.
        """
        self.source, self.broken = source, dict(broken)
        table = _table(source)
        self._keys, self._rows, self._content = table["key"], table["row"], content

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.source, self.broken, self._content)

    @property
    def content(self) -> str:
        """A hash of all keys and rows, whatever file they came from and however they lie."""
        if self._content is None:
            whole = hashlib.blake2b(digest_size=8)
            for column in (self._keys, self._rows):
                chunks = [chunk for chunk in column.chunks if len(chunk)]
                ends = [
                    numpy.frombuffer(chunk.buffers()[1], numpy.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                    for chunk in chunks
                ]
                for each in ends:  # first the lengths of all, then the bytes of all
                    whole.update(numpy.diff(each).tobytes())
                for chunk, each in zip(chunks, ends, strict=True):
                    whole.update((chunk.buffers()[2] or b"")[int(each[0]) : int(each[-1])])
            self._content = whole.hexdigest()
        return self._content

    @property
    def indexed(self) -> bool:
        """Whether they lie in a file of an index."""
        return isinstance(self.source, Path)

    def walk(self) -> Iterator[tuple[Any, Any]]:
        """Key and row of every record, as fast as can be.

        Whole numbers beyond 64 bits come as floats, which is enough to tell a group by; `row` gives them exactly.
        """
        for keys, rows in zip(self._keys.chunks, self._rows.chunks, strict=True):
            for key, row in zip(keys.to_pylist(), rows.to_pylist(), strict=True):
                yield _decoded(key), _decoded(row)

    def beside(self, name: str, make: Callable[[], pyarrow.Table]) -> pyarrow.Table:
        """A table that is made of the rows, and kept beside their file if they lie in one and it can be written."""
        if not isinstance(self.source, Path):
            return make()
        file = self.source.with_name(f"{self.source.stem}-{name}-{self.content}.arrow")
        with suppress(OSError, ValueError):  # not there, or not whole
            return _table(file)
        made = make()
        with suppress(OSError):  # where it cannot be written, it is made again at the next start
            with _whole(file) as work, pyarrow.ipc.new_file(str(work), made.schema) as writer:
                writer.write_table(made)
            return _table(file)
        return made

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, place: int) -> Any:
        """The key of the record at a place."""
        return json.loads(self._keys[place].as_py())

    def row(self, place: int) -> Any:
        """The row of the record at a place."""
        return json.loads(self._rows[place].as_py())


def encoded(value: Any) -> bytes:
    """A key or a row as JSON.

    Raises:
        TypeError, ValueError: JSON has nothing for it.
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # whole numbers beyond 64 bits, halves of characters: what Python's own JSON writes
        return json.dumps(value).encode()


def _decoded(value: bytes) -> Any:
    try:
        return orjson.loads(value)
    except ValueError:  # what Python's own JSON wrote: see `encoded`
        return json.loads(value)


def _table(source: Path | pyarrow.Buffer) -> pyarrow.Table:
    """The table in an Arrow file, which is mapped into memory, or in its bytes."""
    opened = pyarrow.memory_map(str(source)) if isinstance(source, Path) else pyarrow.BufferReader(source)
    return pyarrow.ipc.open_file(opened, options=pyarrow.ipc.IpcReadOptions(use_threads=False)).read_all()


def in_memory(entries: Iterable[Entry]) -> Rows:
    """Entries as rows without a file."""
    sink = pyarrow.BufferOutputStream()
    broken = _pack(entries, sink)
    return Rows(sink.getvalue(), broken)


class Index:
    """The indices of the sets under one data root."""

    def __init__(
        self, root: Path, folder: str | Path | None = None, *, always: bool = False, say: Callable[[str], object] = str
    ):
        """Where indices are looked for, and written.

        Args:
            root: data.root.
            folder: data.index; None: `.qformer-index` under the root or, where that cannot be written, a folder of the
                user's cache; where neither can be, records are held in memory.
            always: whether an index is written of small files too, and failing to is an error.
            say: is given a line where an index is built, or cannot be.
        """
        own = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        self.given = folder is not None
        self.folders = [Path(folder)] if folder is not None else [root / FOLDER, cache / "qformer" / "index" / own]
        self.always, self.say = always or self.given, say

    def rows(self, records: Records) -> Rows:
        """The rows of a set: found, or read from its files and written.

        Raises:
            DataError: the files cannot be read, or `folder` or `always` was given and no index can be written.
        """
        roles = records.sources()
        if not roles or not all(path.exists() for path in roles.values()):  # a table that the hub's client holds
            return in_memory(records.entries())
        sources = _Sources(roles)
        stems = {folder: _stem(records, sources, folder) for folder in self.folders}
        for folder, stem in stems.items():
            rows = _find(folder, stem, records, sources)
            if rows is not None:
                return rows
        if not self.always and sources.size < SMALL:
            return in_memory(records.entries())
        for folder, stem in stems.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.say(f"{records.file}: {sources.size / 1e9:.2f} GB are read into an index, once ({folder}).")
                return _build(folder, stem, records, sources)
            except OSError as error:
                problem = f"no index can be written to '{folder}' ({error.strerror or error})"
        if self.always:
            raise DataError(f"{records.file}: {problem}; make room, or set data.index to a folder with room.")
        self.say(f"{records.file}: {problem}; its records are held in memory.  Set data.index to a folder with room.")
        return in_memory(records.entries())


class _Sources:
    """The files that an index is made of."""

    def __init__(self, roles: Mapping[str, Path]):
        self.files = [file for _, path in sorted(roles.items()) for file in _files(path)]
        self.state = self.now()

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(size for size, _, _ in self.state)

    def now(self) -> list[list[int]]:
        """What changes when a file does; DataError if one is gone."""
        try:
            found = [file.stat() for file in self.files]
        except OSError as error:
            raise DataError(f"{error.filename}: it cannot be read: {error.strerror}.") from None
        return [[each.st_size, each.st_mtime_ns, each.st_ctime_ns] for each in found]

    @cached_property
    def content(self) -> str:
        """A hash of what is in them."""
        whole = hashlib.sha256()
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    if file.suffix in CONTAINERS:
                        state = file.stat()
                        whole.update(f"{state.st_size} {state.st_mtime_ns} ".encode() + stream.read(END))
                        stream.seek(max(0, state.st_size - END))
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file}: it cannot be read: {error.strerror}.") from None
        return whole.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def _stem(records: Records, sources: _Sources, folder: Path) -> str:
    """What the files of an index are called: the same for all sets that read the same files alike.

    Sources are named by their way from the index, so that a data root may be moved together with its index.
    """
    ways = [os.path.relpath(file, folder) for file in sources.files]
    key = hashlib.sha256(json.dumps([records.name, records.options, ways], sort_keys=True).encode()).hexdigest()
    return f"{records.name}-{re.sub(r'[^A-Za-z0-9._-]', '_', records.file.stem)[:60]}-{key[:16]}"


def _find(folder: Path, stem: str, records: Records, sources: _Sources) -> Rows | None:
    """The index in a folder, if it is whole and its sources are what they were."""
    manifest = folder / f"{stem}.json"
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        if [told["format"], told["code"]] != [FORMAT, _code(type(records))]:
            return None
        touched = told["state"] != sources.state
        if touched and told["content"] != sources.content:
            return None
        file = folder / told["file"]
        if file.stat().st_size != told["size"]:
            return None
        broken = {place: _with_paths(words, records) for place, words in told["broken"]}
        rows = Rows(file, broken, told.get("rows"))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        return None
    if touched:
        with suppress(OSError):  # in a folder that cannot be written, the sources are hashed again next time
            _write(manifest, json.dumps({**told, "state": sources.state}))
    return rows


def _build(folder: Path, stem: str, records: Records, sources: _Sources) -> Rows:
    """Read the sources and write the index; OSError where it cannot be written."""
    _sweep(folder)
    file = folder / f"{stem}-{sources.content[:16]}.arrow"
    with _whole(file) as work:
        with pyarrow.OSFile(str(work), "wb") as sink:
            broken = _pack(records.entries(), sink)
        if sources.now() != sources.state:
            raise DataError(f"{records.file}: it was written to while it was read; start again when it is whole.")
    rows = Rows(file, broken)
    told = {
        "format": FORMAT,
        "code": _code(type(records)),
        "state": sources.state,
        "content": sources.content,
        "file": file.name,
        "size": file.stat().st_size,
        "rows": rows.content,
        "broken": [[place, _without_paths(words, records)] for place, words in broken.items()],
    }
    _write(folder / f"{stem}.json", json.dumps(told))
    for older in folder.glob(f"{stem}-*.arrow"):
        if older != file:
            older.unlink(missing_ok=True)
    return rows


def _pack(entries: Iterable[Entry], sink: Any) -> dict[int, str]:
    """Write entries as Arrow; the errors of broken ones by place."""
    broken: dict[int, str] = {}
    keys, rows = _Column(), _Column()
    with pyarrow.ipc.new_file(sink, SCHEMA) as writer:

        def write() -> None:
            writer.write_batch(pyarrow.record_batch([keys.array(), rows.array()], schema=SCHEMA))

        for place, (key, row, error) in enumerate(entries):
            if error is not None:
                broken[place] = error
            keys.append(key)
            rows.append(row)
            if len(keys.values) + len(rows.values) > BATCH:
                write()
                keys, rows = _Column(), _Column()
        write()
    return broken


class _Column:
    """Values one behind the other, as Arrow has them: each would take some 4 KB as orjson gives them."""

    def __init__(self) -> None:
        self.values, self.ends = bytearray(), array("i", [0])

    def append(self, value: bytes) -> None:
        self.values += value
        self.ends.append(len(self.values))

    def array(self) -> pyarrow.Array:
        buffers = [None, pyarrow.py_buffer(self.ends), pyarrow.py_buffer(self.values)]
        return pyarrow.Array.from_buffers(pyarrow.binary(), len(self.ends) - 1, buffers)


def _code(reader: type) -> str:
    """A hash of a reader's own source, so that a change of how it reads makes a new index."""
    whole = hashlib.sha256()
    for each in reader.__mro__:
        if each.__module__ in ("abc", "builtins"):
            continue
        try:
            whole.update(Path(inspect.getfile(each)).read_bytes())
        except (OSError, TypeError):  # there is no source: a release has its number
            whole.update(__version__.encode())
    return whole.hexdigest()[:16]


def _without_paths(words: str, records: Records) -> str:
    """A message without the places of files, which may be moved together with the index."""
    for role, path in records.sources().items():
        words = words.replace(str(path), f"\0{role}\0")
    return words


def _with_paths(words: str, records: Records) -> str:
    for role, path in records.sources().items():
        words = words.replace(f"\0{role}\0", str(path))
    return words


class _whole:
    """A file that appears in its place when it is complete, and not at all if anything stops it before."""

    def __init__(self, file: Path):
        self.file = file
        self.work = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> Path:
        return self.work

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                with self.work.open("rb+") as written:
                    os.fsync(written.fileno())
                os.replace(self.work, self.file)
        finally:
            self.work.unlink(missing_ok=True)


def _write(file: Path, content: str) -> None:
    with _whole(file) as work:
        work.write_text(content, encoding="utf-8")


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed a day ago or before had begun to write."""
    for left in folder.glob(".*.tmp"):
        try:
            if time.time() - left.stat().st_mtime > DAY:
                left.unlink()
        except OSError:
            continue
