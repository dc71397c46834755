"""Videos: which frames are looked at, from whatever file, and that what is wrong with one ends in a sentence."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from qformer import videos
from qformer.data import pictures
from qformer.data.pictures import Pictures
from qformer.errors import DataError
from qformer.sample import Video
from tests.films import film, folder, grey, numbers

COUNT = 40
LIMIT = 10_000_000
FORMS: dict[str, Callable[[Path], Path]] = {
    "avi": lambda place: film(place / "f.avi", COUNT),
    "avi, frames that point both ways": lambda place: film(place / "f.avi", COUNT, between=2),
    "mp4": lambda place: film(place / "f.mp4", COUNT, "libx264", between=2),
    "mkv": lambda place: film(place / "f.mkv", COUNT, "libx264", between=2),
    "webm": lambda place: film(place / "f.webm", COUNT, "libvpx"),
    "transport stream": lambda place: film(place / "f.ts", COUNT, "libx264", between=2),
    "one key frame": lambda place: film(place / "f.mp4", COUNT, "libx264", between=2, group=1000),
    "folder": lambda place: folder(place / "f", [f"frame{k}.png" for k in range(COUNT)]),
}


def seen(path: Path, frames: int | tuple[int, ...] = 4, limit: int = LIMIT) -> list[int]:
    return numbers(list(videos.frames(Video(path, frames), limit, "sample 7")), COUNT)


def refused(path: Path, frames: int | tuple[int, ...] = 4, limit: int = LIMIT) -> str:
    with pytest.raises(DataError) as caught:
        list(videos.frames(Video(path, frames), limit, "sample 7"))
    message = str(caught.value)
    assert message.startswith(f"sample 7: the video {path} ") and message.endswith(".") and "\n" not in message
    return message.removeprefix(f"sample 7: the video {path} ")


# -- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "count", "places"),
    [
        (4, 40, [0, 13, 26, 39]),
        (4, 300, [0, 100, 199, 299]),
        (8, 15, [0, 2, 4, 6, 8, 10, 12, 14]),
        (2, 9, [0, 8]),
        (1, 9, [4]),
        (1, 1, [0]),
        (4, 3, [0, 1, 1, 2]),
        (4, 2, [0, 0, 1, 1]),
        ((5, 2), 9, [2, 5]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(
    frames: int | tuple[int, ...], count: int, places: list[int]
) -> None:
    assert videos.positions(Video(Path("f"), frames), count) == places
    assert Video(Path("f"), frames).count == len(places)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_just_these_frames(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path)
    assert seen(path) == [0, 13, 26, 39]
    assert seen(path, 7) == videos.positions(Video(path, 7), COUNT)
    assert seen(path, (3, 31)) == [3, 31]
    everything = seen(path, COUNT)
    assert everything == list(range(COUNT)), everything


def test_frames_without_a_time_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "f.avi", COUNT)
    with_times = videos._timetable
    monkeypatch.setattr(videos, "_timetable", lambda *given: ([None] * COUNT, *with_times(*given)[1:]))
    monkeypatch.setattr(videos, "_at_times", None)
    assert seen(path) == [0, 13, 26, 39]
    assert refused(path, (3, 40)) == "has 40 frames, counted from 0, and frame 40 was asked for."


def test_only_what_leads_to_the_frames_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "f.mp4", 200, "libx264", group=10)
    decoded = []
    check = videos._check_size
    monkeypatch.setattr(videos, "_check_size", lambda sized, limit: (decoded.append(sized), check(sized, limit)))
    list(videos.frames(Video(path), LIMIT, ""))
    assert len(decoded) < 60


def test_frames_are_upright(tmp_path: Path) -> None:
    path = film(tmp_path / "f.mp4", 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    quarter = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # as a telephone held upright has it
    content[matrix : matrix + 36] = struct.pack(">9i", *quarter)
    path.write_bytes(content)
    assert {picture.size for picture in videos.frames(Video(path), LIMIT, "")} == {(48, 64)}


def test_a_video_in_an_archive_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "f.avi", COUNT)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.write(tmp_path / "f.avi", "a.avi")
    packed = Pictures(tmp_path).find("clips/a.avi")
    assert numbers(list(videos.frames(Video(packed), LIMIT, "")), COUNT) == [0, 13, 26, 39]
    monkeypatch.setattr(pictures, "LARGEST", 1000)
    with pytest.raises(DataError) as caught:
        list(videos.frames(Video(packed), LIMIT, "sample 7"))
    size = (tmp_path / "f.avi").stat().st_size
    assert str(caught.value) == (
        f"sample 7: the file {tmp_path / 'clips.zip'}/a.avi would take {size:,} bytes, more than the 1,000 that a "
        f"picture or a video may have in an archive; unpack the archive if it is sound."
    )


def test_frames_of_a_folder_go_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", [f"{k}.jpg" for k in (1, 2, 9, 10, 11, 100)])
    (path / "notes.txt").write_text("no frame")
    (path / ".1.jpg").write_text("no frame either")
    assert [each.name for each in videos.stills(path)] == [
        "1.jpg",
        "2.jpg",
        "9.jpg",
        "10.jpg",
        "11.jpg",
        "100.jpg",
    ]
    assert numbers(list(videos.frames(Video(path, 6), LIMIT, "")), 6) == [0, 1, 2, 3, 4, 5]


def test_a_path_is_known_as_a_video_by_ending_or_folder(tmp_path: Path) -> None:
    assert videos.is_video("a/b.MP4") and videos.is_video(tmp_path)
    assert not videos.is_video("a.gif"), "it may be a picture"
    assert not videos.is_video("a.jpg") and not videos.is_video(tmp_path / "nothing")


# -- what is wrong with it --------------------------------------------------------------------------------------------


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    for path in (film(tmp_path / "one.mp4", 1), folder(tmp_path / "one", ["a.png"])):
        assert refused(path) == (
            "holds a single frame where 4 are looked at, so it is cut short or no video; give a picture as a picture, "
            "or have one frame looked at (options.frames: 1 in the card)."
        )
        [picture] = videos.frames(Video(path, 1), LIMIT, "")
        assert abs(picture.getpixel((5, 5))[0] - grey(0, 1)) < 4  # type: ignore[index]


def test_a_video_of_no_frames(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert refused(tmp_path / "none") == "holds no frame."
    assert refused(film(tmp_path / "f.avi", 0)) == "holds no frame."
    assert "no pictures that move" in refused(film(tmp_path / "f.mp4", 0))
    assert refused(film(tmp_path / "f.mkv", 0)).startswith("cannot be decoded (End of file)")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(tmp_path / "sound.mp4") == "holds no pictures that move (no video stream)."


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    def cut(name: str, share: float, **options: object) -> Path:
        path = film(tmp_path / name, COUNT, **options)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return path

    assert refused(cut("index at the end.mp4", 0.9)).startswith("cannot be decoded (Invalid data found when")
    first = cut("index first.mp4", 0.7, container_options={"movflags": "+faststart"})
    assert "is cut short" in refused(first) or "cannot be decoded" in refused(first)
    assert refused(cut("a.avi", 0.6)).startswith("is cut short")
    assert refused(cut("a.mkv", 0.6, codec="libx264")).endswith("of the 4.0 seconds of its header are there.")
    assert refused(cut("a.mp4", 0.0)).startswith("cannot be decoded (Invalid data found when")


def test_a_stream_that_is_damaged(tmp_path: Path) -> None:
    path = film(tmp_path / "f.avi", COUNT)
    content = bytearray(path.read_bytes())
    first = content.index(b"00dc", content.index(b"movi"))
    size = int.from_bytes(content[first + 4 : first + 8], "little")
    for place in range(first + 8 + 70, first + 8 + size):  # behind what says how the frame is coded
        content[place] ^= 0x5A
    path.write_bytes(content)
    assert refused(path) == "is damaged at frame 1 of those looked at; fetch it again."
    garbage = tmp_path / "g.mp4"
    garbage.write_bytes(bytes(range(256)) * 40)
    assert refused(garbage) == (
        "cannot be decoded (Invalid data found when processing input): it is damaged, cut short or no video; fetch it "
        "again."
    )


def test_whatever_is_broken_ends_in_a_sentence_or_in_frames(tmp_path: Path) -> None:
    import random

    path = tmp_path / "broken.mp4"
    content = film(tmp_path / "f.mp4", COUNT, "libx264", between=2).read_bytes()
    chance = random.Random(3)
    ended = set()
    for number in range(40):
        broken = bytearray(content)
        for _ in range(1 + number):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            assert len(list(videos.frames(Video(path), LIMIT, ""))) == 4
            ended.add("frames")
        except DataError:
            ended.add("sentence")
    assert ended == {"frames", "sentence"}


def test_pixels_are_held_against_the_limit_before_they_are_decoded(tmp_path: Path) -> None:
    path = film(tmp_path / "f.avi", 4, "msmpeg4v2")  # which takes the size from the file's header
    content = bytearray(path.read_bytes())
    sizes = content.index(b"strf") + 8 + 4

    def said(width: int, height: int, limit: str) -> tuple[str, str]:
        """Ours, and the library's own where it looks first."""
        return (
            f"has frames of {width}×{height} pixels, more than the {limit} that are decoded; make it smaller.",
            f"cannot be decoded (Invalid argument): it is damaged, cut short or no video, or has frames of more than "
            f"the {limit} pixels that are decoded; fetch it again.",
        )

    for side in (8_000, 100_000):
        content[sizes : sizes + 8] = struct.pack("<ii", side, side)
        path.write_bytes(content)
        assert refused(path, limit=100_000_000) == said(side, side, "35,389,440")[side == 100_000]
    assert refused(film(tmp_path / "g.mp4", 4), limit=64 * 48 - 1) == said(64, 48, "3,071")[0]
    assert len(seen(tmp_path / "g.mp4", limit=64 * 48)) == 4
    assert "more than data.max_pixels (3,071)" in _refused_frame(folder(tmp_path / "g", ["1.png", "2.png"]), 3071)


def _refused_frame(path: Path, limit: int = LIMIT) -> str:
    with pytest.raises(DataError) as caught:
        list(videos.frames(Video(path), limit, "sample 7"))
    return str(caught.value)


def test_frames_without_end_are_counted_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MOST_FRAMES", 30)
    words = "has more than 30 frames, and is not read to its end; cut it."
    assert refused(film(tmp_path / "f.mp4", 31)) == words
    assert refused(folder(tmp_path / "f", [f"{k}.png" for k in range(31)])) == words


def test_the_clock_runs_out_in_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "f.mp4", COUNT)
    monkeypatch.setattr(videos, "PATIENCE", -1.0)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(_refused_frame(path)))
    thread.start()
    thread.join()
    assert said == [
        f"sample 7: the video {path} is not read after -1 seconds, and is given up; cut or re-encode it, or put it on "
        f"a faster disk."
    ]


def test_a_clock_that_runs_out_while_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "f.mp4", COUNT, group=1000)
    upright = videos._upright

    def slow(frame: av.VideoFrame) -> object:
        time.sleep(0.3)
        return upright(frame)

    monkeypatch.setattr(videos, "PATIENCE", 0.25)
    monkeypatch.setattr(videos, "_upright", slow)
    assert refused(path).startswith("is not read after 0.25 seconds")


def test_only_files_are_opened_and_only_those_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing.mp4") == "is missing; check its name and its folder."
    os.mkfifo(tmp_path / "pipe.mp4")
    pipe = "is no file (a pipe or a device, or a link to nothing), and is not opened."
    assert refused(tmp_path / "pipe.mp4") == pipe
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    assert refused(tmp_path / "link.mp4") == pipe
    film(tmp_path / "other.ts", COUNT, "libx264")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nother.ts\n#EXT-X-ENDLIST\n")
    assert refused(tmp_path / "list.mp4").startswith("cannot be decoded (")
    outside = folder(tmp_path / "outside", ["1.png"])
    inside = folder(tmp_path / "inside", ["1.png"])
    (inside / "2.png").symlink_to(outside / "1.png")
    assert refused(inside) == "has the frame '2.png', a link that leads out of its folder and is not followed."
    (inside / "2.png").unlink()
    (inside / "2.png").symlink_to("1.png")
    assert len(list(videos.frames(Video(inside), LIMIT, ""))) == 4


def test_a_broken_frame_of_a_folder_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", ["1.png", "2.png"])
    (path / "2.png").write_bytes(b"no picture")
    told = "is not a picture that can be read; fetch it again or save it as PNG."
    assert _refused_frame(path) == f"sample 7: the picture {path / '2.png'} {told}"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "f.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    assert refused(path) == "needs PyAV to be decoded: pip install 'qformer[video]'."
    assert len(list(videos.frames(Video(folder(tmp_path / "f", ["1.png", "2.png"])), LIMIT, ""))) == 4
