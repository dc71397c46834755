"""Opening pictures safely, and turning them into tensors with random choices that are functions of their key."""

from __future__ import annotations

import hashlib
import io
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from qformer import keyed
from qformer.config import TransformConfig
from qformer.errors import DataError
from qformer.sample import Packed, Video

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 64 << 20
"""Of a picture's file that is held in memory as it is."""
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
PATIENCE = 60.0
"""Seconds that opening a picture may take.  A pipe in a file's place never ends, and a picture can be made so that its
decoder takes hours."""


def load_image(
    source: Path | str | bytes | Packed | Image.Image, max_pixels: int, where: str, content: bytes | None = None
) -> Image.Image:
    """A picture in RGB, upright as its EXIF says, transparency laid on white.

    Args:
        source: a path, the bytes of a file, a picture packed away, or an opened one.
        max_pixels: refused beyond this, before anything is decoded.
        where: what the picture belongs to, for messages.
        content: the bytes of its file, where they were read already.

    Raises:
        DataError: missing, not a picture, cut short, too large, or not open within `PATIENCE`; names the file.
    """
    name = f"{where}: the picture {source}" if isinstance(source, Path | str | Packed) else f"{where}: a picture"
    if content is not None:
        source = content
    with in_time(name):
        return _opened(source, max_pixels, where, name)


class _Late(BaseException):
    """Passes all that decoders catch."""


@contextmanager
def in_time(name: str) -> Iterator[None]:
    """Ends what takes longer than `PATIENCE`, by the system's alarm: threads, of which one alone has it, wait on.

    Raises:
        DataError: says so.
    """
    alarm = getattr(signal, "SIGALRM", None)
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    left, every = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left < PATIENCE:  # somebody else's comes first
        yield
        return

    def late(*_: object) -> None:
        raise _Late

    before, began = signal.signal(alarm, late), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    except _Late:
        raise DataError(
            f"{name} is not open after {PATIENCE:g} seconds; check the file, and the disk that it is on."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)) if left else 0.0, every)
        signal.signal(alarm, before)


def _opened(source: Path | str | bytes | Packed | Image.Image, max_pixels: int, where: str, name: str) -> Image.Image:
    if isinstance(source, Packed):
        try:
            source = source.read()
        except DataError as error:
            raise DataError(f"{where}: {error}.") from None
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked below, with a sentence
    try:
        if isinstance(source, Image.Image):
            return _plain(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if opened.width * opened.height > max_pixels:
                raise DataError(
                    f"{name} has {opened.width}×{opened.height} pixels, more than data.max_pixels ({max_pixels:,}); "
                    f"make it smaller, or raise the limit."
                )
            return _plain(opened)
    except FileNotFoundError:
        raise DataError(f"{name} is missing; check its name and its folder.") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder, not a picture; name a file in it.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a picture that can be read; fetch it again or save it as PNG.") from None
    except DataError:
        raise
    except PermissionError:
        raise DataError(f"{name} may not be read; change its permissions.") from None
    except Exception as error:  # each format's decoder raises kinds of its own
        raise DataError(f"{name} is cut short or broken ({error}); fetch it again.") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_key(source: Any, root: Path = Path()) -> str:
    """What tells pictures apart within a step: the path (from `root`, if it lies there), or a hash of the content."""
    if isinstance(source, Video):
        source = source.path
    if isinstance(source, Path | str | Packed):
        path = source.container / source.identity if isinstance(source, Packed) else Path(source)
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(source)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return hashlib.sha256(f"{source.mode} {source.size} ".encode() + source.tobytes()).hexdigest()


def content_of(source: Any) -> bytes | None:
    """The bytes of a picture's file; None of an opened picture, or where they are too many to be held.

    Raises:
        OSError, DataError: it cannot be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Packed):
        return source.read()
    if isinstance(source, Path | str) and os.stat(source).st_size <= MOST_BYTES:
        return Path(source).read_bytes()
    return None


class ImageTransform:
    """A picture to a normalised tensor (3, S, S); every random choice is drawn from the key it is given."""

    def __init__(
        self,
        settings: TransformConfig,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str,
    ):
        import torch  # here, so that pictures can be checked without it

        self.settings, self.size = settings, size
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.filter = FILTERS[interpolation]

    def __call__(self, picture: Image.Image, key: tuple[object, ...] = ()) -> Tensor:
        """RGB picture -> (3, S, S) float32."""
        import torch

        mode = self.settings.mode
        if mode == "squash":
            picture = picture.resize((self.size, self.size), self.filter)
        elif mode == "crop":
            picture = self._centre(picture)
        elif mode == "pad":
            picture = self._padded(picture)
        else:
            picture = self._random_crop(picture, key)
        if self.settings.flip and keyed.uniform(*key, "flip") < self.settings.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(numpy.asarray(picture).copy()).permute(2, 0, 1)
        return (values.to(torch.float32) / 255 - self.mean) / self.std

    def _centre(self, picture: Image.Image) -> Image.Image:
        """Short side to S, then the middle, as torchvision's Resize and CenterCrop round it."""
        width, height = picture.size
        if width <= height:
            scaled = (self.size, int(self.size * height / width))
        else:
            scaled = (int(self.size * width / height), self.size)
        picture = picture.resize(scaled, self.filter)
        left, top = round((scaled[0] - self.size) / 2), round((scaled[1] - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))

    def _padded(self, picture: Image.Image) -> Image.Image:
        """Long side to S, the mean colour around it."""
        share = self.size / max(picture.size)
        scaled = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
        canvas = Image.new("RGB", (self.size, self.size), tuple(round(255 * float(m)) for m in self.mean.flatten()))
        canvas.paste(picture.resize(scaled, self.filter), ((self.size - scaled[0]) // 2, (self.size - scaled[1]) // 2))
        return canvas

    def _random_crop(self, picture: Image.Image, key: tuple[object, ...]) -> Image.Image:
        """A part of random area and shape, resized at once (torchvision's RandomResizedCrop, ten tries)."""
        width, height = picture.size
        chances = keyed.stream(*key, "crop")
        (least, most), (narrow, wide) = self.settings.scale, self.settings.ratio
        for _ in range(10):
            area = width * height * (least + (most - least) * next(chances))
            ratio = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * next(chances))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(next(chances) * (width - w + 1)), int(next(chances) * (height - h + 1))
                return picture.resize((self.size, self.size), self.filter, box=(left, top, left + w, top + h))
        w, h = min(width, round(height * wide)), min(height, round(width / narrow))
        left, top = (width - w) // 2, (height - h) // 2
        return picture.resize((self.size, self.size), self.filter, box=(left, top, left + w, top + h))


def _plain(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture.alpha_composite(layer)
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits to 8: nearly all white
        picture = Image.fromarray((numpy.asarray(picture) >> 8).astype(numpy.uint8))
    return picture.convert("RGB")
