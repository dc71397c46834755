"""Where the pictures of a set lie: below folders, or in zip and tar archives that stand in a folder's place.

A record names its picture by a path.  The path is looked for below one or several roots; where a folder of it is not
there, an archive of that name is (`coco/train2014.zip` for `coco/train2014`), and is read without being unpacked.
Nothing outside the roots is ever opened: neither by `..`, nor by an absolute path, nor through a link.
"""

from __future__ import annotations

import functools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qformer.errors import DataError
from qformer.sample import Packed

LARGEST = 64 << 20
"""Bytes of a packed picture or video beyond which it is refused before it is read."""
ARCHIVES = (".zip", ".tar")
"""Endings under which an archive may stand in the place of a folder."""
PLACES = 1 << 14
"""Folders whose place is remembered; some sets have one for each picture."""
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How members of a zip archive may be compressed: others unpack as a whole, whatever size they claim."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz"}


class Pictures:
    """Finds pictures below one or several roots."""

    def __init__(self, roots: Path | Sequence[Path]):
        self.roots = (roots,) if isinstance(roots, Path) else tuple(roots)
        self._places: dict[tuple[Path, str], _Place] = {}

    def find(self, *names: str) -> Path | Packed:
        """The picture that has one of the names; the first root wins, and of its names the first.

        A file below a single root is not looked at: whether it is there is found out when it is opened.

        Raises:
            DataError: a name leads out of the roots, or no root has it.
        """
        found = self.first(*names)
        if found is None:
            named = " or ".join(f"'{name}'" for name in names)
            roots = " or ".join(map(str, self.roots))
            raise DataError(f"there is no picture {named} in {roots}; check its name, and files.images of the card")
        return found

    def first(self, *names: str) -> Path | Packed | None:
        """As `find`, but None where no root has one of the names.

        Raises:
            DataError: a name leads out of the roots.
        """
        for name in names:
            _check_name(name)
        only = len(names) == len(self.roots) == 1
        for root in self.roots:
            for name in names:
                found = self._find(root, name, certain=only)
                if found is not None:
                    return found
        return None

    def _find(self, root: Path, name: str, *, certain: bool) -> Path | Packed | None:
        path = PurePosixPath(name)
        parent = str(path.parent)
        if (root, parent) not in self._places:
            if len(self._places) >= PLACES:
                self._places.clear()
            self._places[root, parent] = _place(root, path.parent)
        place = self._places[root, parent]
        if place.archive is not None:
            inside = f"{place.inside}/{path.name}" if place.inside else path.name
            return _member(place.archive, inside)
        file = root / path
        if os.path.islink(file) and not Path(os.path.realpath(file)).is_relative_to(place.root):
            raise DataError(_leads_out(file, place.root))
        return file if certain or os.path.exists(file) else None


@dataclass(frozen=True)
class _Place:
    """A folder, or an archive and the path inside it; `root` with all links followed."""

    root: Path
    archive: Path | None = None
    inside: str = ""


def _place(root: Path, parent: PurePosixPath) -> _Place:
    """What the folder `parent` of a root is on disk."""
    real = Path(os.path.realpath(root))
    folder, parts = root, parent.parts
    for number in range(len(parts) + 1):
        archive = _archive_at(folder)
        if archive is not None:
            if number and not Path(os.path.realpath(archive)).is_relative_to(real):
                raise DataError(_leads_out(archive, real))
            return _Place(real, archive, "/".join(parts[number:]))
        if number < len(parts):
            folder = folder / parts[number]
    there = Path(os.path.realpath(folder))
    if not there.is_relative_to(real):
        raise DataError(_leads_out(folder, real))
    return _Place(real)


def _archive_at(folder: Path) -> Path | None:
    """The archive that a path is, or that stands in its place."""
    if os.path.isdir(folder):
        return None
    if not folder.name:
        return None
    candidates = [folder, *(folder.with_name(folder.name + ending) for ending in ARCHIVES)]
    return next((each for each in candidates if each.suffix.lower() in ARCHIVES and os.path.isfile(each)), None)


def stands_for(path: Path) -> bool:
    """Whether a folder of pictures is there, or an archive in its place."""
    return os.path.exists(path) or _archive_at(path) is not None


def _leads_out(path: Path, root: Path) -> str:
    return (
        f"'{path}' is a link that leads out of {root}, and is not followed; make the folder itself that the card "
        f"names the link, or name the folder where the pictures are under files.images"
    )


def _check_name(name: Any) -> None:
    """Refuse a name that is none, or that leads out of where it is looked for."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"its picture is {name!r:.60}; it must be the path of a file below files.images")
    if name.startswith(("/", "\\")) or PurePosixPath(name).is_absolute() or name[1:3] in (":/", ":\\"):
        raise DataError(f"its picture '{name}' is an absolute path; it must be one below files.images")
    name.encode()  # half a character, which JSON may hold, is no name
    if ".." in name.replace("\\", "/").split("/"):
        raise DataError(f"its picture '{name}' leads out of files.images; a path may not hold '..'")


# -- archives ---------------------------------------------------------------------------------------------------------


def _member(archive: Path, name: str) -> Packed | None:
    """The member of that name, below a folder of the archive's own name or not."""
    find: Callable[[Path, str], Packed | None] = _in_zip if archive.suffix.lower() == ".zip" else _in_tar
    return find(archive, name) or find(archive, f"{archive.stem}/{name}")


@dataclass(frozen=True)
class ZipMember(Packed):
    """A file in a zip archive."""

    def read(self) -> bytes:
        """As `Packed.read`."""
        try:
            opened = _zip(self.container, os.getpid())
            info = opened.getinfo(self.name)
            check_size(info.file_size, str(self))
            if info.compress_type not in PLAIN:
                raise DataError(f"the file {self} is compressed otherwise than by deflate; unpack the archive once")
            with opened.open(info) as stream:
                return stream.read(info.file_size)
        except KeyError:
            raise DataError(f"there is no '{self.name}' in {self.container} any more; fetch it again") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
            raise DataError(f"the file {self} cannot be unpacked ({error}); fetch it again") from None
        except RuntimeError as error:  # a member that is encrypted
            raise DataError(f"the file {self} cannot be unpacked ({error}); unpack the archive once") from None


@dataclass(frozen=True)
class Span(Packed):
    """A stretch of bytes in a file: a member of a tar archive, which is not compressed."""

    start: int = field(default=0, compare=False)
    size: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """As `Packed.read`."""
        check_size(self.size, str(self))
        try:
            with self.container.open("rb") as stream:
                stream.seek(self.start)
                content = stream.read(self.size)
        except (OSError, ValueError) as error:
            raise DataError(f"the file {self} cannot be read ({error})") from None
        if len(content) < self.size:
            raise DataError(f"the file {self} is cut short: the archive ends within it; fetch it again")
        return content


def check_size(size: int, name: str) -> None:
    """Refuse what claims to be larger than a picture or a short video can be, before it is read.

    Raises:
        DataError: it is.
    """
    if size > LARGEST:
        raise DataError(
            f"the file {name} would take {size:,} bytes, more than the {LARGEST:,} that a picture or a video may have "
            f"in an archive; unpack the archive if it is sound"
        )


@functools.lru_cache(maxsize=32)
def _zip(path: Path, process: int) -> zipfile.ZipFile:
    """An opened archive; each process opens its own, since a fork would share the place in the file."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: it cannot be read as a zip archive ({error}); it may be cut short") from None


def _in_zip(archive: Path, name: str) -> ZipMember | None:
    info = _zip(archive, os.getpid()).NameToInfo.get(name)
    if info is None:
        return None
    if info.external_attr >> 16 & 0o170000 == 0o120000:
        raise DataError(f"'{name}' in {archive} is a link, and is not followed; pack the picture itself")
    return ZipMember(archive, name)


def _in_tar(archive: Path, name: str) -> Span | None:
    found = tar_members(archive).get(name)
    if found is None:
        return None
    if found[0] < 0:
        raise DataError(f"'{name}' in {archive} is a link, and is not followed; pack the picture itself")
    return Span(archive, name, *found)


@functools.lru_cache(maxsize=32)
def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Where the files of a tar archive begin and how long they are; links begin at -1.

    Raises:
        DataError: it cannot be read, or is compressed, so that no member can be had without all before it.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as stream:
            packed = COMPRESSED.get(stream.read(2))
        if packed is not None:
            raise DataError(f"{path}: it is compressed ({packed}), so its pictures cannot be reached; unpack it once")
        with tarfile.open(path, "r:") as opened:
            while (member := opened.next()) is not None:
                opened.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                if member.size < 0:  # the next header would be looked for before this one, for ever
                    raise tarfile.ReadError(f"'{member.name}' is of negative size")
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    members[name] = (member.offset_data, member.size)
                elif member.islnk() or member.issym():
                    members[name] = (-1, 0)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: it cannot be read as a tar archive ({error}); it may be cut short") from None
    return members
