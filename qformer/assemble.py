"""From pictures and rendered words to a `Batch`: each distinct picture once, one read per picture and instruction."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer import images, videos
from qformer.errors import DataError
from qformer.features import Cache, Tally
from qformer.sample import Batch, Packed, Read, Row, Slot, Text, Video, row_length
from qformer.text import Joiner, Rendered


@dataclass(frozen=True)
class Picture:
    """A picture or frame of a step: its pixels (3, H, W), opened and transformed, or its features (P, V)."""

    values: Tensor
    key: str = ""
    """By which a feature cache knows it."""
    encoded: bool = False
    """Whether it is there as features."""


Pixels = dict[str, Picture]
"""The pictures and frames of one step, by picture key."""


@dataclass(frozen=True)
class Item:
    """What one row is made of: its sample's name, its pictures (paths, bytes, PIL images or videos), its words."""

    name: str
    pictures: tuple[Any, ...]
    rendered: Rendered


@dataclass(frozen=True)
class Prepared:
    """An item in ids; its slots number its pictures and frames, which stand in a step's `Pixels` under their keys."""

    name: str
    pictures: tuple[str, ...]
    instruction: tuple[int, ...]
    row: Row


class Assembler:
    """Opens and transforms pictures and joins ids; holds tokenizers and no weights, so that workers can have it."""

    def __init__(
        self,
        joiner: Joiner,
        transform: Callable[[Any, tuple[object, ...]], Tensor],
        max_pixels: int,
        *,
        root: Path = Path(),
        room: tuple[int, int] | None = None,
        cache: Cache | None = None,
    ):
        """How items are made.

        Args:
            joiner: makes ids of words.
            transform: takes a PIL image and the key of its random choices, and gives (3, H, W).
            max_pixels: of a picture, before it is opened.
            root: the data root; pictures below it are known by their path from there, so that moving it changes no
                crop.
            room: positions of the LLM and those that a slot takes; null where nothing is to be held against them.
            cache: where features are; a picture that has some is not opened.
        """
        self.joiner, self.transform, self.max_pixels = joiner, transform, max_pixels
        self.root, self.room, self.cache = root, room, cache
        self.tally = Tally()

    def prepare(self, item: Item, pixels: Pixels, *, answered: bool, key: tuple[object, ...] = ()) -> Prepared:
        """One item in ids; pictures that `pixels` lacks are opened and put there.

        Pictures are told apart by path or content and cropped by (key, picture): rows of a step share one encoding.
        The frames of a video are cropped alike, by (key, video): otherwise what stands still would seem to move.

        Raises:
            DataError: a picture or video cannot be opened, an instruction's marks do not fit its pictures, or the row
                is too long for the LLM.
        """
        names: list[str] = []
        for picture in item.pictures:
            name = images.picture_key(picture, self.root)
            if isinstance(picture, Video):
                names += self._watch(picture, name, pixels, item.name, key)
                continue
            if name not in pixels:
                pixels[name] = self._look(picture, item.name, (*key, name))
            names.append(name)
        instruction = self.joiner.read_ids(_read_instruction(item.rendered))
        row = self.joiner.row(item.rendered, reads_of(item.pictures), answered=answered)
        if self.room is not None and row_length(row, self.room[1]) > self.room[0]:
            films = any(isinstance(picture, Video) for picture in item.pictures)
            raise DataError(
                f"{item.name}: its row takes {row_length(row, self.room[1])} positions, and the LLM has "
                f"{self.room[0]}; lower language.instruction_limit or qformer.queries, "
                f"{'look at fewer frames (options.frames), ' if films else ''}or split the dialogue."
            )
        return Prepared(item.name, tuple(names), instruction, row)

    def _watch(self, video: Video, name: str, pixels: Pixels, where: str, key: tuple[object, ...]) -> tuple[str, ...]:
        """The keys of a video's frames, which are had if `pixels` lacks one."""
        numbers = range(video.count) if isinstance(video.frames, int) else sorted(video.frames)
        spread = f"/{video.count}" if isinstance(video.frames, int) else ""
        keys = tuple(f"{name}#{number}{spread}" for number in numbers)
        if any(each not in pixels for each in keys):
            ends = [each.removeprefix(name).replace("/", "of") for each in keys]
            frames = self._frames(video, ends, where, (*key, name))
            pixels.update(zip(keys, frames, strict=True))
        return keys

    def _look(self, picture: Any, where: str, key: tuple[object, ...]) -> Picture:
        """One picture: the features that the cache has of it, or else its pixels."""
        began = time.perf_counter()
        content: bytes | None = None
        if self.cache is not None:
            # `load_image` has sentences for what is suppressed; a pipe in the picture's place would not come to it.
            with images.in_time(f"{where}: the picture {picture}"), suppress(OSError, DataError):
                content = images.content_of(picture)
        name = "" if content is None else hashlib.sha256(content).hexdigest()
        if (known := self._kept([name], began)) is not None:
            return known[0]
        image = images.load_image(picture, self.max_pixels, where, content)
        if self.cache is not None and not name:
            name = images.picture_key(image)
            if (known := self._kept([name], began)) is not None:
                return known[0]
        seen = Picture(self.transform(image, key), name)
        self.tally.opened, self.tally.opening = self.tally.opened + 1, self.tally.opening + time.perf_counter() - began
        return seen

    def _frames(self, video: Video, ends: Sequence[str], where: str, key: tuple[object, ...]) -> Iterator[Picture]:
        """The frames that are looked at, likewise; a file's all or none.  `ends`: of the names of a file's frames."""
        began = time.perf_counter()
        names = [""] * len(ends)
        if self.cache is not None:
            if (files := videos.chosen_stills(video, where)) is not None:
                yield from (self._look(file, where, key) for file in files)
                return
            version = _version(video)
            with suppress(OSError, DataError):  # `videos.frames` has sentences for these
                content = videos.content_hash(video)
                names = [f"{content}{end}" for end in ends]
            if (known := self._kept(names, began)) is not None:
                yield from known
                return
        for name, image in zip(names, videos.frames(video, self.max_pixels, where), strict=True):
            yield Picture(self.transform(image, key), name)
        if self.cache is not None and (version is None or _version(video) != version):
            raise DataError(f"{where}: the video {video.path} was changed while it was read; start again.")
        self.tally.opened += len(names)
        self.tally.opening += time.perf_counter() - began

    def _kept(self, names: Sequence[str], began: float) -> list[Picture] | None:
        """The features that the cache has under all of these names; None where it lacks one."""
        if self.cache is None or not all(names):
            return None
        found = []
        for name in names:
            values = self.cache.read(name, self.tally)
            if values is None:
                return None
            found.append(Picture(values, name, encoded=True))
        self.tally.read, self.tally.reading = (
            self.tally.read + len(found),
            self.tally.reading + time.perf_counter() - began,
        )
        return found

    def batch(self, prepared: Sequence[Prepared], pixels: Pixels) -> Batch:
        """Prepared items as one batch: their distinct pictures stacked, their distinct reads numbered.

        Pictures are numbered as they come, whether they are there as pixels or as features.
        """
        pictures: dict[str, int] = {}
        reads: dict[Read, int] = {}
        rows = []
        for each in prepared:
            mine = [
                reads.setdefault(Read(pictures.setdefault(name, len(pictures)), each.instruction), len(reads))
                for name in each.pictures
            ]
            rows.append(tuple(replace(p, read=mine[p.read]) if isinstance(p, Slot) else p for p in each.row))
        shown = [pixels[name] for name in pictures]
        opened = [picture for picture in shown if not picture.encoded]
        known = {number: picture.values for number, picture in enumerate(shown) if picture.encoded}
        return Batch(
            pixels=torch.stack([picture.values for picture in opened]) if opened else torch.empty(0),
            reads=tuple(reads),
            rows=tuple(rows),
            samples=tuple(each.name for each in prepared),
            features=torch.stack([*known.values()]) if known else None,
            featured=tuple(known),
            keys=() if self.cache is None else tuple(picture.key for picture in opened),
        )

    def __call__(self, items: Sequence[Item], *, answered: bool) -> Batch:
        """Items as one batch, with their targets (training) or as prompts alone."""
        pixels: Pixels = {}
        return self.batch([self.prepare(item, pixels, answered=answered) for item in items], pixels)

    def dummy(self, size: int) -> Batch:
        """A batch of weight zero: one black picture of (3, size, size), one trained token."""
        row = (Slot(0), Text(self.joiner.answer_ids(".")), Text(self.joiner.profile.end, trained=True))
        read = Read(0, self.joiner.read_ids("."))
        return Batch(torch.zeros(1, 3, size, size), (read,), (row,), ("dummy",), weight=0.0)


def reads_of(pictures: Sequence[Any]) -> list[int | range]:
    """Numbers of the reads of pictures, and of each video those of its frames, as `Joiner.row` takes them."""
    reads: list[int | range] = []
    taken = 0
    for picture in pictures:
        count = picture.count if isinstance(picture, Video) else 1
        reads.append(range(taken, taken + count) if isinstance(picture, Video) else taken)
        taken += count
    return reads


def _version(video: Video) -> tuple[int, ...] | None:
    """What changes where a video's file is replaced; None where there is no file."""
    path = video.path.container if isinstance(video.path, Packed) else video.path
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_instruction(rendered: Rendered) -> str:
    """What the Q-Former reads: the row's own instruction; with every answer trained in one row the first one, since
    later questions would be read by earlier answers.
    """
    return rendered.turns[0].instruction if rendered.turns else rendered.instruction
