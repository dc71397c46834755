"""Small videos for tests, really encoded: frame number k of n is of one grey, by which it is known again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

SIZE = (64, 48)


def grey(number: int, count: int) -> int:
    """The shade of a frame."""
    return 20 + round(210 * number / max(1, count - 1))


def film(path: Path, count: int, codec: str = "mpeg4", *, between: int = 0, group: int = 8, **options: Any) -> Path:
    """A video of `count` frames at ten a second; `between`: frames that point both ways, `group`: from key to key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", **options) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = group, between
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.options, stream.codec_context.bit_rate = {"qmin": "2", "qmax": "2"}, 4_000_000
        container.start_encoding()
        for number in range(count):
            pixels = np.full((SIZE[1], SIZE[0], 3), grey(number, count), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def folder(path: Path, names: Sequence[str]) -> Path:
    """A folder of frames with these names, in their order."""
    path.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", SIZE, (grey(number, len(names)),) * 3).save(path / name)
    return path


def numbers(pictures: Sequence[Image.Image], count: int) -> list[int]:
    """Which of `count` frames pictures are, by their shade."""
    seen = [float(np.asarray(picture).mean()) for picture in pictures]
    return [min(range(count), key=lambda k: abs(grey(k, count) - shade)) for shade in seen]
