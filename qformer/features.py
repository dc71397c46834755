"""What the frozen encoder gives for a picture, kept on disk, so that a picture is opened and encoded once.

A cache is a folder.  In it is a folder for every way to make features, named by a hash of the encoder's weights and
build, of the transform and of the precision; in that a file for every picture, named by a hash of its content.  A file
of its own each: it appears whole or not at all whatever is killed, any number of processes fill one folder without a
lock, and a hundred thousand of them stand in 256 folders.  Shards would save opening a file (a quarter of a
millisecond), and would need all of that made by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qformer.backbones.precision import HALVES
from qformer.backbones.vision import DTYPES, FrozenTower
from qformer.config import RunConfig
from qformer.errors import ConfigError, TrainingError, reason
from qformer.sample import Batch

FORMAT = 1
AT_ONCE = 8
"""Pictures that go through the encoder together, always so many."""
FEATURES, CHECK = "features", "crc32"
"""The tensor of a picture's file, and the checksum of its bytes in the file's header."""
UNFINISHED = "unfinished"
"""Where files are written before they are put in their place."""
FORGOTTEN = 86_400.0
"""Seconds after which an unfinished file is taken for that of a process that was killed."""


@dataclass
class Tally:
    """What it took to have the pictures of a step: how many were opened and how many read from the cache, seconds."""

    opened: int = 0
    opening: float = 0.0
    read: int = 0
    reading: float = 0.0
    damaged: list[str] = field(default_factory=list)
    """Files that were not whole."""

    def add(self, other: Tally) -> None:
        """Count another one in."""
        self.opened, self.opening = self.opened + other.opened, self.opening + other.opening
        self.read, self.reading = self.read + other.read, self.reading + other.reading
        self.damaged += other.damaged


@dataclass(frozen=True)
class Cache:
    """Features that were made in one way; holds no weights, so that data workers can have it."""

    folder: Path

    def file(self, key: str) -> Path:
        """Where a picture's features are, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str, tally: Tally | None = None) -> Tensor | None:
        """A picture's features (P, V), memory-mapped; None where they are not there, or not whole, which is noted."""
        file = self.file(key)
        try:
            with safe_open(file, framework="pt") as opened:
                values: Tensor = opened.get_tensor(FEATURES)
                if opened.metadata()[CHECK] == _checksum(values):
                    return values
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError):
            pass
        if tally is not None:
            tally.damaged.append(str(file))
        return None

    def write(self, key: str, values: Tensor) -> None:
        """Keep a picture's features (P, V).

        Raises:
            TrainingError: the disk is full, or may not be written to; nothing half-written is left.
        """
        whole_bytes(self.file(key), save({FEATURES: values}, {CHECK: _checksum(values)}), self.folder / UNFINISHED)

    def count(self) -> int:
        """How many pictures it holds."""
        folders = [entry.path for entry in os.scandir(self.folder) if entry.is_dir() and entry.name != UNFINISHED]
        return sum(len(os.listdir(folder)) for folder in folders)


def _checksum(values: Tensor) -> str:
    return f"{zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data):08x}"


def whole_bytes(file: Path, content: bytes, aside: Path) -> None:
    """Write a file that appears whole or not at all, by way of a folder beside it.

    It is not forced to the disk, which would take longer than all the rest: what a power cut leaves of it has another
    checksum.

    Raises:
        TrainingError: the file system refuses.
    """
    work = aside / f"{os.getpid()}.{secrets.token_hex(8)}"  # other machines have processes of the same number
    try:
        file.parent.mkdir(exist_ok=True)
        aside.mkdir(exist_ok=True)
        work.write_bytes(content)
        os.replace(work, file)
    except OSError as error:
        raise TrainingError(
            f"{file}: it cannot be written ({error.strerror or error}); make room there, or name another folder as "
            f"vision.cache, then start the same command again."
        ) from None
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


class Filler:
    """Makes features that are not kept yet, in the process that has the encoder.

    What is made of a picture does not depend on the pictures beside it: they go through the encoder `AT_ONCE` at a
    time, always so many, if a probe finds that a picture's place among them changes no bit, and one by one otherwise.
    So a run gives the same bits whatever was kept when it began: interrupted or not, alone or beside others.
    """

    def __init__(
        self, cache: Cache, tower: FrozenTower, *, precision: str, dtype: str | None, say: Callable[[str], None]
    ):
        """`precision`: of the computation; `dtype`: what is kept, by default what the encoder gives."""
        self.cache, self.tower, self.precision, self.dtype, self.say = cache, tower, precision, dtype, say
        self.made, self.making = 0, 0.0
        self.tally = Tally()
        self._told: set[str] = set()
        self._pending: Future[None] | None = None

    @cached_property
    def at_once(self) -> int:
        """How many pictures are encoded together."""
        size = self.tower.settings.size
        pictures = torch.randn(AT_ONCE, 3, size, size, generator=torch.Generator().manual_seed(0))
        return AT_ONCE if torch.equal(self._through(pictures), self._through(pictures.roll(1, 0)).roll(-1, 0)) else 1

    @cached_property
    def size(self) -> int:
        """Bytes of a picture's features."""
        side = self.tower.settings.size
        return self.encode(torch.zeros(1, 3, side, side)).nbytes

    @property
    def free(self) -> int:
        """Bytes that the disk has left."""
        return shutil.disk_usage(self.cache.folder).free

    def told(self, samples: int | None = None) -> str:
        """Where it is and what it takes, in a sentence; `samples` are about to be answered."""
        more = "" if samples is None else f"; {samples:,} samples of a picture each add {in_bytes(samples * self.size)}"
        return (
            f"vision.cache: features are kept in {self.cache.folder}, {in_bytes(self.size)} a picture; "
            f"{self.cache.count():,} are there already, and {in_bytes(self.free)} are free{more}"
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, P, V) as they are kept, on the CPU.

        Raises:
            TrainingError: `vision.cache_dtype` cannot hold them.
        """
        parts = []
        for start in range(0, len(pixels), self.at_once):
            part = pixels[start : start + self.at_once]
            filled = torch.cat([part, part.new_zeros(self.at_once - len(part), *part.shape[1:])])
            parts.append(self._through(filled)[: len(part)])
        values = torch.cat(parts)
        kept = values if self.dtype is None else values.to(DTYPES[self.dtype])
        if kept.dtype != values.dtype and values.isfinite().all() and not kept.isfinite().all():
            raise TrainingError(
                f"vision.cache_dtype is {self.dtype}, which ends at {torch.finfo(kept.dtype).max:g}, and the encoder "
                f"gives {float(values.abs().max()):g}; set it to bfloat16 or float32."
            )
        return kept.cpu()

    @torch.no_grad()
    def _through(self, pixels: Tensor) -> Tensor:
        device = next(self.tower.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.tower(pixels.to(device)).values

    def complete(self, batches: Sequence[Batch], tally: Tally | None = None) -> list[Batch]:
        """The batches of a step with features in the place of all pixels; what was not kept is made once, and kept.

        Writing goes on behind the step's back, and what it met is raised by the next call.

        Raises:
            TrainingError: the last features could not be written.
        """
        self.flush()
        if tally is not None:
            self.tally.add(tally)
            for file in tally.damaged:
                if file not in self._told:
                    self.say(f"{file}: its features are not whole, and are made again")
            self._told.update(tally.damaged)
        opened: dict[str, Tensor] = {}
        for batch in batches:
            opened.update(zip(batch.keys, batch.pixels, strict=True))
        features = {key: kept for key in opened if (kept := self.cache.read(key)) is not None}  # by another process
        lacking = [key for key in opened if key not in features]
        if lacking:
            began = time.perf_counter()
            made = dict(zip(lacking, self.encode(torch.stack([opened[key] for key in lacking])), strict=True))
            self.made, self.making = self.made + len(made), self.making + time.perf_counter() - began
            writer = ThreadPoolExecutor(1, "features")
            self._pending = writer.submit(self._write, made)
            writer.shutdown(wait=False)  # its thread ends with the work: data workers are forked from this process
            features |= made
        return [_completed(batch, features) for batch in batches]

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            TrainingError: something could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, features: Mapping[str, Tensor]) -> None:
        for key, values in features.items():
            self.cache.write(key, values)


def _completed(batch: Batch, features: Mapping[str, Tensor]) -> Batch:
    if not batch.keys:
        return batch
    known = dict(zip(batch.featured, () if batch.features is None else batch.features, strict=True))
    known |= {number: features[key] for number, key in zip(batch.opened, batch.keys, strict=True)}
    numbers = range(batch.pictures)
    whole = torch.stack([known[number] for number in numbers])
    return replace(batch, pixels=batch.pixels[:0], keys=(), features=whole, featured=tuple(numbers))


def filler(settings: RunConfig, tower: FrozenTower, *, training: bool, say: Callable[[str], None]) -> Filler:
    """What keeps an encoder's features in `vision.cache`, for training or for answering.

    Raises:
        ConfigError: the folder cannot be made.
    """
    vision = settings.vision
    assert vision.cache is not None
    half = next(tower.parameters()).dtype in HALVES  # computes in its own, as in `VLM.encode`
    precision = settings.train.precision if training and not half else "float32"
    mode = (vision.train_transform if training else vision.eval_transform).mode
    way = {
        "format": FORMAT,
        "tower": fingerprint(tower.model),
        "read": {"block": vision.block, "norm": vision.norm, "class_token": vision.class_token},
        "pictures": {**asdict(tower.settings), "mode": mode, "max_pixels": settings.data.max_pixels},
        "precision": precision,
        "kept": vision.cache_dtype,
    }
    told = json.dumps(way, sort_keys=True, indent=2)
    folder = Path(vision.cache) / hashlib.sha256(told.encode()).hexdigest()[:24]
    try:
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        _forget(folder / UNFINISHED)
        whole_bytes(folder / "way.json", told.encode(), folder / UNFINISHED)
    except (OSError, TrainingError) as error:
        what = error.strerror if isinstance(error, OSError) else reason(error)
        raise ConfigError(
            f"vision.cache is {vision.cache}, where nothing can be written ({what}); name another folder."
        ) from None
    return Filler(Cache(folder), tower, precision=precision, dtype=vision.cache_dtype, say=say)


def _forget(unfinished: Path) -> None:
    """Remove what killed processes have left."""
    for entry in unfinished.iterdir():
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime < FORGOTTEN:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights of a model, and of the plain values that its modules were built with (heads, epsilons)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in sorted(vars(module).items()) if _plain(value)}
        built = {key: value for key, value in plain.items() if key != "training" and not key.startswith("_")}
        digest.update(f"{name} {type(module).__qualname__} {built}\n".encode())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def in_bytes(count: int) -> str:
    """A number of bytes in words: 724 KB, 85.6 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.0f} {unit}" if count >= 100 * size else f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and all(map(_plain, value)))
