"""Opening videos safely: a file that PyAV decodes, or a folder of frames; the frames that are looked at, in time order.

Frame i of k lies at round(i · (n - 1) / (k - 1)) of n: the first, the last, and what is evenly spread between them, as
the original code's evaluation takes them; of k = 1 the one in the middle.  Nothing but these is kept, and a file is
decoded from the key frame before each of them on, not as a whole.

A damaged or hostile file ends in one sentence, within bounds that do not depend on what it claims of itself: pixels are
held against a limit before a decoder sees them and by the decoder itself, frames are counted up to a limit, and a clock
that every packet and every frame asks runs out in any thread or process, where a signal would reach the main one alone.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from qformer.errors import DataError
from qformer.images import load_image
from qformer.sample import Packed, Video

PATIENCE = 60.0
"""Seconds that reading one video may take: a hundred times what a clip of half a minute needs on a slow disk."""
MOST_FRAMES = 1_000_000
"""Frames of a video beyond which it is refused: nine hours of film.  Their times are all that is kept of them."""
MOST_PIXELS = 8192 * 4320
"""Pixels of a video's frame, beside `data.max_pixels`: decoders keep up to seventeen frames, 0.9 GB at this size."""
PADDING = 1 << 20
"""Pixels that a decoder may add to a frame's sides, for its own use."""
LEAST_SHARE = 0.9
"""Of what a file's header says it holds; below, it was cut short.  Headers are often wrong by a frame or two."""
ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")
"""Of files that are videos wherever a name alone says which kind a file is; a GIF may be a picture, and is taken for
one there."""
FILES = (*ENDINGS, ".gif")
"""Endings under which a video is looked for."""
STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
"""Endings of the files of a folder that are its frames."""
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif,m4v,ivf"
"""Containers that are opened.  Others, such as playlists, name further files, which would be opened unasked."""


def is_video(name: Path | str) -> bool:
    """Whether a path is that of a video: by its ending, or because it is a folder (of frames)."""
    return Path(name).suffix.lower() in ENDINGS or os.path.isdir(name)


def positions(video: Video, count: int) -> list[int]:
    """Which of `count` frames are looked at, from 0, in time order; short videos show some of them several times.

    Raises:
        DataError: it has no frame, one alone where several are looked at, or fewer than it was asked for by number.
    """
    if not count:
        raise DataError("holds no frame")
    if not isinstance(video.frames, int):
        beyond = [place for place in video.frames if not 0 <= place < count]
        if beyond:
            raise DataError(f"has {count} frames, counted from 0, and frame {beyond[0]} was asked for")
        return sorted(video.frames)
    wanted = video.frames
    if wanted == 1:
        return [(count - 1) // 2]
    if count == 1:
        raise DataError(
            f"holds a single frame where {wanted} are looked at, so it is cut short or no video; give a picture as a "
            f"picture, or have one frame looked at (options.frames: 1 in the card)"
        )
    return [(2 * place * (count - 1) + wanted - 1) // (2 * (wanted - 1)) for place in range(wanted)]


def frames(video: Video, max_pixels: int, where: str) -> Iterator[Image.Image]:
    """The frames that are looked at, in RGB and upright, one after the other in time order.

    Args:
        video: which, and how many of its frames.
        max_pixels: of a frame, before it is decoded.
        where: what the video belongs to, for messages.

    Raises:
        DataError: it is missing, cannot be decoded, is damaged or cut short, has too few frames, is too large, or takes
            too long; names the file.
    """
    try:
        if isinstance(video.path, Path) and os.path.isdir(video.path):
            yield from _of_folder(video.path, video, max_pixels, where)
        else:
            yield from _of_file(video, max_pixels, where)
    except _InsideError as error:
        raise DataError(str(error)) from None
    except DataError as error:
        raise DataError(f"{where}: the video {video.path} {error}.") from None


def content_hash(video: Video) -> str:
    """A hash of a video's file.

    Raises:
        OSError, DataError: it cannot be read.
    """
    if isinstance(video.path, Packed):
        return hashlib.sha256(video.path.read()).hexdigest()
    with video.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _InsideError(Exception):
    """The error of a frame or of a file in an archive, a whole sentence already."""


# -- a folder of frames -----------------------------------------------------------------------------------------------


def chosen_stills(video: Video, where: str) -> list[Path] | None:
    """The files of the frames that are looked at, of a folder of frames; None of a video that is a file.

    Raises:
        DataError: as `frames`.
    """
    if not isinstance(video.path, Path) or not os.path.isdir(video.path):
        return None
    try:
        return list(_chosen(video.path, video))
    except DataError as error:
        raise DataError(f"{where}: the video {video.path} {error}.") from None


def _chosen(path: Path, video: Video) -> Iterator[Path]:
    files = stills(path)
    for place in positions(video, len(files)):
        file = files[place]
        if file.is_symlink() and not file.resolve().is_relative_to(path.resolve()):
            raise DataError(f"has the frame '{file.name}', a link that leads out of its folder and is not followed")
        yield file


def _of_folder(path: Path, video: Video, max_pixels: int, where: str) -> Iterator[Image.Image]:
    for file in _chosen(path, video):
        try:
            image = load_image(file, max_pixels, where)
        except DataError as error:
            raise _InsideError(str(error)) from None
        yield image


def stills(path: Path) -> list[Path]:
    """The files of a folder of frames, in time order: by the numbers in their names, 2 before 10.

    Raises:
        DataError: it cannot be listed, or holds more frames than any video has.
    """
    found = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.lower().endswith(STILLS) and not entry.name.startswith("."):
                    found.append(entry.name)
                    if len(found) > MOST_FRAMES:
                        raise DataError(_too_many())
    except OSError as error:
        raise DataError(f"cannot be listed ({error})") from None
    return [path / name for name in sorted(found, key=_by_number)]


def _by_number(name: str) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() and part.isascii() else (0, 0, part) for part in parts], name


# -- a file -----------------------------------------------------------------------------------------------------------


def _of_file(video: Video, max_pixels: int, where: str) -> Iterator[Image.Image]:
    clock = _Clock(PATIENCE)
    limit = min(max_pixels, MOST_PIXELS)
    with _opened(video, limit, clock, where) as (container, stream):
        times, keys, begin = _timetable(container, stream, clock)
        decoder = _Decoder(container, stream, begin, limit, clock)
        if None not in times and len(set(times)) == len(times):
            ordered = sorted(times)
            wanted = [ordered[place] for place in positions(video, len(ordered))]
            shown = _at_times(decoder, wanted, sorted(keys))
        else:  # old files say of some frames alone when they are shown: then they are counted as they come out
            decoder.rewind()
            count = sum(1 for _ in decoder)
            decoder.rewind()
            shown = _at_places(decoder, positions(video, count))
        last: tuple[Any, Image.Image] | None = None
        for number, frame in enumerate(shown, 1):
            if last is None or frame is not last[0]:
                if frame.is_corrupt:
                    raise DataError(f"is damaged at frame {number} of those looked at; fetch it again")
                last = frame, _upright(frame)
            yield last[1]


class _Clock:
    """Runs out after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise DataError(
                f"is not read after {self.seconds:g} seconds, and is given up; cut or re-encode it, or put it on a "
                f"faster disk"
            )


@contextmanager
def _opened(video: Video, limit: int, clock: _Clock, where: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever the library raises while it is open becomes a DataError."""
    av = _library()
    path = video.path
    if isinstance(path, Packed):
        try:
            source: Any = io.BytesIO(path.read())
        except DataError as error:
            raise _InsideError(f"{where}: {error}.") from None
    elif not os.path.lexists(path):
        raise DataError("is missing; check its name and its folder")
    elif not os.path.isfile(path):
        raise DataError("is no file (a pipe or a device, or a link to nothing), and is not opened")
    else:
        source = f"file:{os.path.abspath(path)}"
    try:
        most = {"max_pixels": str(2 * limit + PADDING)}  # ours is held against the size itself, with a sentence
        options = {"format_whitelist": FORMATS, **most}
        with av.open(source, options=options, timeout=clock.seconds, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError("holds no pictures that move (no video stream)")
            if stream.codec_context is None:
                raise DataError("is in a codec that PyAV cannot decode; re-encode it, as H.264")
            _check_size(stream.codec_context, limit)
            # One thread: workers are processes already, and several of a decoder's threads hold more frames each.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = most
            yield container, stream
    except av.error.ExitError:  # the library's own clock, which watches single reads
        clock.end = 0.0
        clock.check()
    except av.error.FFmpegError as error:
        # The library itself may refuse what is larger than it was told, and calls that an argument.
        large = f", or has frames of more than the {limit:,} pixels that are decoded" * (error.errno == errno.EINVAL)
        raise DataError(
            f"cannot be decoded ({error.strerror}): it is damaged, cut short or no video{large}; fetch it again"
        ) from None
    except PermissionError:
        raise DataError("may not be read; change its permissions") from None
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        raise DataError(f"cannot be decoded ({error})") from None


def _library() -> Any:
    try:
        import av
    except ImportError:
        raise DataError("needs PyAV to be decoded: pip install 'qformer[video]'") from None
    return av


def _check_size(sized: Any, limit: int) -> None:
    if sized.width * sized.height > limit:
        raise DataError(
            f"has frames of {sized.width}×{sized.height} pixels, more than the {limit:,} that are decoded; make it "
            f"smaller"
        )


def _too_many() -> str:
    return f"has more than {MOST_FRAMES:,} frames, and is not read to its end; cut it"


def _timetable(container: Any, stream: Any, clock: _Clock) -> tuple[list[Any], list[tuple[int, int]], int]:
    """When each frame is shown, when each key frame is shown and where it is read, where the first one is read.

    All in the stream's own units; nothing is decoded.  Indices of containers go by the time of reading, if at all.
    """
    times: list[Any] = []
    keys: list[tuple[int, int]] = []
    end, begin = 0, None
    for packet in container.demux(stream):
        clock.check()
        if packet.is_corrupt:
            raise DataError(f"is cut short or damaged behind frame {len(times)}; fetch it again")
        if not packet.size or packet.is_discard:
            continue
        times.append(packet.pts)
        read = packet.pts if packet.dts is None else packet.dts
        begin = read if begin is None else begin
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append((packet.pts, read))
        if len(times) > MOST_FRAMES:
            raise DataError(_too_many())
    if len(times) < LEAST_SHARE * stream.frames:
        raise DataError(f"is cut short: {len(times)} of the {stream.frames} frames of its header are there")
    alone = len(container.streams) == 1  # otherwise the container's length may be that of the sound
    if times and alone and not stream.frames and container.duration and stream.time_base:
        seconds, said = float(end * stream.time_base), container.duration / 1_000_000
        if seconds + 0.2 < LEAST_SHARE * said:
            raise DataError(f"is cut short: {seconds:.1f} of the {said:.1f} seconds of its header are there")
    return times, keys, begin or 0


class _Decoder:
    """Decoded frames from a place on."""

    def __init__(self, container: Any, stream: Any, begin: int, limit: int, clock: _Clock):
        self.container, self.stream, self.begin, self.limit, self.clock = container, stream, begin, limit, clock
        self._frames: Iterator[Any] = iter(())

    def seek(self, read: int) -> None:
        """To the key frame that is read then, or an earlier one."""
        self.container.seek(read, stream=self.stream)
        self._frames = self.container.decode(self.stream)

    def rewind(self) -> None:
        """To the first frame."""
        self.seek(self.begin)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        frame = next(self._frames)
        self.clock.check()
        _check_size(frame, self.limit)
        return frame


def _at_times(decoder: _Decoder, wanted: Sequence[int], keys: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """For each time the frame that is shown then, or the next one that can be decoded, at the end the last one."""
    frame = None
    for moment in wanted:
        place = bisect.bisect_right(keys, moment, key=lambda key: key[0])
        shown, read = keys[place - 1] if place else (moment, decoder.begin)
        if frame is None or frame.pts < shown:
            decoder.seek(read)
            frame = next(decoder, None)
            if frame is None or frame.pts is None or frame.pts > moment:
                decoder.rewind()  # the container's index leads elsewhere
                frame = next(decoder, None)
        while frame is not None and frame.pts is not None and frame.pts < moment:
            following = next(decoder, None)
            if following is None or following.pts is None:
                break
            frame = following
        if frame is None or frame.pts is None:
            raise DataError("holds no frame that can be decoded")
        yield frame


def _at_places(decoder: _Decoder, wanted: Sequence[int]) -> Iterator[Any]:
    """The frames of these numbers, counted as they come out."""
    place, frame = -1, None
    for number in wanted:
        while place < number:
            place, frame = place + 1, next(decoder)
        yield frame


def _upright(frame: Any) -> Image.Image:
    """A frame in RGB, turned as the file says it was filmed."""
    image = frame.to_image()
    turns = round(frame.rotation / 90) % 4
    turned = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns]
    return image if turned is None else image.transpose(turned)
