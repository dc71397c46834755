"""The feature cache of a training run: what it will hold is said before it starts, and whether it pays."""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator

from qformer.assemble import Pixels
from qformer.backbones.vision import FrozenTower
from qformer.config import RunConfig
from qformer.data.batch import StepMaker
from qformer.errors import ConfigError, DataError
from qformer.features import UNFINISHED, Cache, Filler, Tally, filler, in_bytes
from qformer.images import picture_key
from qformer.sample import Batch, Video
from qformer.text import Truncations
from qformer.vlm import VLM

MEASURED = 8
"""Pictures that are opened, encoded, written and read to see whether the cache pays."""
MOST_RECORDS = 1_000_000
"""Records that are looked at to count a run's pictures; of a larger run not all are."""


def opened(settings: RunConfig, model: VLM, say: Callable[[str], None]) -> Filler | None:
    """What keeps the run's features; None where `vision.cache` is off.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if settings.vision.cache is None or not isinstance(model.vision, FrozenTower):
        return None
    return filler(settings, model.vision, training=True, say=say)


def announce(kept: Filler, maker: StepMaker, settings: RunConfig, start: int, say: Callable[[str], None]) -> None:
    """Say how large the cache will be and whether it pays.

    Raises:
        ConfigError: it does not fit on the disk.
    """
    there = kept.cache.count()
    pictures, uses, counted = _count(maker, start, most=there + kept.free // kept.size)
    total, left = pictures * kept.size, max(0, pictures - there) * kept.size
    many = f"{'' if counted else 'more than '}{pictures:,} pictures"
    if left > kept.free:
        smaller = "" if settings.vision.cache_dtype in ("float16", "bfloat16") else " set vision.cache_dtype: bfloat16,"
        raise ConfigError(
            f"vision.cache is {settings.vision.cache}, which has {in_bytes(kept.free)} left, and the features of the "
            f"{many} of this run take {in_bytes(total)} ({in_bytes(kept.size)} each); name a folder on a larger disk,"
            f"{smaller} draw from fewer pictures, or leave vision.cache out."
        )
    say(kept.told())
    say(f"vision.cache: {many} are drawn in this run, whose features take {in_bytes(total)}")
    if validated := settings.validation.tasks:
        limit = settings.validation.limit
        most = "those of" if limit is None else f"up to {len(validated) * limit:,} of"
        say(f"vision.cache: {most} the validation's samples come on top, as it meets them")
    if (cost := measure(kept, maker, start)) is not None:
        say(f"vision.cache: {cost.verdict(uses / max(1, pictures) if counted else None)}")


@dataclass(frozen=True)
class Cost:
    """Milliseconds a picture, over some pictures."""

    pictures: int
    opening: float
    encoding: float
    writing: float
    reading: float

    @property
    def pays_from(self) -> float:
        """How often a picture has to be seen for the cache to take less time than it saves; infinite: never."""
        made = self.opening + self.encoding
        if made <= self.reading:
            return math.inf
        # n uses: n · made without the cache; made + writing + (n - 1) · reading with it
        return max(2, math.floor((made + self.writing - self.reading) / (made - self.reading)) + 1)

    def verdict(self, uses: float | None) -> str:
        """In a sentence, for a run that sees each picture so often (None: not counted)."""
        told = (
            f"to open a picture takes {self.opening:.1f} ms and to encode it {self.encoding:.1f} ms, to write its "
            f"features {self.writing:.1f} ms and to read them from the disk {self.reading:.1f} ms ({self.pictures} "
            f"pictures): "
        )
        if self.pays_from == math.inf:
            return f"{told}reading is no faster, so it does not pay here, and is better left out"
        told += f"it pays from a picture's use number {self.pays_from:.0f}"
        if uses is None:
            return told
        pays = "it pays" if uses >= self.pays_from else "it does not pay in this run, but may in the next that reads it"
        return f"{told}, and each is seen {uses:.1f} times: {pays}"


def measure(kept: Filler, maker: StepMaker, start: int) -> Cost | None:
    """What pictures of the run's next draws cost with the cache and without; None where none can be opened.

    They are kept: nothing of this is done twice.
    """
    batch, opening = _prepared(maker, start, cached=False)
    if batch is None:
        return None
    count = min(MEASURED, len(batch.pixels))
    pixels = batch.pixels[:count]
    kept.encode(pixels[:1])  # the first call of a model takes longer
    began = time.perf_counter()
    features = kept.encode(pixels)
    encoding = time.perf_counter() - began
    with TemporaryDirectory(dir=kept.cache.folder / UNFINISHED) as folder:
        began = time.perf_counter()
        for number, values in enumerate(features):
            Cache(Path(folder)).write(f"trial{number}", values)
        writing = time.perf_counter() - began
    lacking, found = _prepared(maker, start, cached=True)
    if lacking is not None:
        kept.complete([lacking], Tally(damaged=found.damaged))
        kept.flush()
        for key in lacking.keys:
            _drop_from_memory(kept.cache.file(key))
    _, reading = _prepared(maker, start, cached=True)
    per = [opening.opening / opening.opened, encoding / count, writing / count, reading.reading / max(1, reading.read)]
    return Cost(count, *(1000 * seconds for seconds in per))


def _prepared(maker: StepMaker, start: int, *, cached: bool) -> tuple[Batch | None, Tally]:
    """The first draws from a step on, as many as bring enough pictures, and what it took; broken ones are left out."""
    assembler = copy.copy(maker.assembler)
    assembler.tally, assembler.joiner = Tally(), copy.copy(assembler.joiner)
    assembler.joiner.truncations = Truncations()
    if not cached:
        assembler.cache = None
    pixels: Pixels = {}
    prepared = []
    first = start * maker.batch_size
    for number in itertools.islice(range(first, maker.steps * maker.batch_size), 4 * MEASURED):
        if len(pixels) >= MEASURED:
            break
        with suppress(DataError):
            items = maker.items(maker.mixture.draw(number))
            prepared += [assembler.prepare(item, pixels, answered=True) for item in items]
    return (assembler.batch(prepared, pixels) if prepared else None), assembler.tally


def _drop_from_memory(file: Path) -> None:
    """Have a file read from the disk next time, where the system can be told so: that is how a large cache is read."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), file.open("rb+") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _count(maker: StepMaker, start: int, most: int) -> tuple[int, float, bool]:
    """Distinct pictures that a run draws from a step on, their uses, and whether all records were looked at.

    Nothing but records is read.  Counting ends where there are more than `most`, which is all that has to be known.
    """
    first, last = start * maker.batch_size, maker.steps * maker.batch_size
    before, after = maker.mixture.totals(first), maker.mixture.totals(last)
    seen: set[int] = set()
    uses, left = 0.0, MOST_RECORDS
    for name, places in maker.mixture.places(first, last).items():
        read = pictures = 0
        for place in itertools.islice(places, left):
            read += 1
            for picture in _pictures(maker, name, place):
                pictures += 1
                seen.add(hash(picture))
            if len(seen) > most:
                return len(seen), 0.0, False
        uses += (after[name] - before[name]) * pictures / max(1, read)
        left -= read
    records = sum(min(after[name] - before[name], maker.mixture.records[name]) for name in after)
    return len(seen), uses, records <= MOST_RECORDS


def _pictures(maker: StepMaker, name: str, place: int) -> Iterator[tuple[str, int]]:
    """What tells the pictures and frames of a record apart; nothing of one that is broken."""
    with suppress(DataError):
        for picture in maker.sources[name].records[place].images:
            frames = picture.count if isinstance(picture, Video) else 1
            yield from ((picture_key(picture), frame) for frame in range(frames))


def summary(kept: Filler, accelerator: Accelerator) -> str:
    """What the cache did in this start of the run, over all processes; waits for what is being written."""
    kept.flush()
    own = [kept.tally.read, kept.made, len(kept.tally.damaged)]
    read, made, damaged = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    again = f", {damaged:,} of them since a file was not whole" if damaged else ""
    return f"vision.cache: features were read {read:,} times and made for {made:,} pictures{again}"
