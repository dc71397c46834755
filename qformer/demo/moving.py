"""Scenes that move, in the official files of the three video question answering sets.

A film shows a scene of the kind that held-out sets show.  In its course one thing moves to a free cell of its row or
column, nothing in its way, and where a word is written another takes its place half-way.  Questions ask what any frame
tells, what a word says at one end, and what only several frames together tell: what moves, and where to.

MSVD-QA's clips are AVI files and MSRVTT-QA's are MP4 files, both really encoded; iVQA's are folders of frames.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from PIL import Image

from qformer.demo import formats, scenes
from qformer.demo.formats import BLOCK, put
from qformer.demo.scenes import CELL, PICTURE, VALUES, WORDS, Ask, Dice, Form, Scene, Thing
from qformer.errors import DataError

LENGTH = 12
"""Frames of a film."""
RATE = 6
"""Frames a second."""
MSVD, MSRVTT, IVQA, MSVD_TRAIN, MSRVTT_TRAIN, IVQA_TRAIN = range(40, 46)
"""Blocks of scene numbers, far from those of the sets of pictures."""
MSVD_FORMS = ("attribute", "mover", "way", "word")
MSRVTT_FORMS = ("count", "way", "attribute", "mover", "word")
IVQA_FORMS = ("name", "place", "word", "way")
TEST_IDS = {"msvd_qa": (1301, 0), "msrvtt_qa": (7010, 170859)}
"""The first video of test, and the first question about one."""
CATEGORIES = 20
"""MSR-VTT's, which say what a clip is about."""
WAYS = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}
SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"


# -- films ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Film(Scene):
    """A scene at its begin, and what happens then: thing `mover` goes to a cell, the word that stands there changes."""

    mover: int = 0
    column: int = 0
    row: int = 0
    word: str | None = None

    @property
    def way(self) -> str:
        """Where the thing moves to: left, right, up or down."""
        return _way(self.things[self.mover], self.column, self.row)

    def at(self, share: float) -> Scene:
        """The scene when this share of the film is over, from 0 to 1."""
        things = [replace(thing, word=self.word) if thing.word and share >= 0.5 else thing for thing in self.things]
        thing = things[self.mover]
        right, down = ((self.column - thing.column) * CELL / PICTURE, (self.row - thing.row) * CELL / PICTURE)
        moved = replace(thing, x=thing.x + share * right, y=thing.y + share * down)
        things[self.mover] = replace(moved, column=self.column, row=self.row) if share == 1 else moved
        return Scene(self.seed, self.number, tuple(things), self.held_out)

    def pictures(self) -> list[Image.Image]:
        """All frames in time order."""
        return [scenes.draw(self.at(place / (LENGTH - 1))) for place in range(LENGTH)]


def sample_film(seed: int, number: int) -> Film | None:
    """The film of a scene's number; None where nothing in it has room to move."""
    scene = scenes.sample_scene(seed, number, held_out=True)
    dice = Dice("film", seed, number)
    found = [(mover, *cell) for mover in range(len(scene.things)) for cell in _free_cells(scene, mover)]
    if not found:
        return None
    ways: dict[str, list[tuple[int, int, int]]] = {}
    for mover, column, row in found:
        ways.setdefault(_way(scene.things[mover], column, row), []).append((mover, column, row))
    mover, column, row = dice.choose(ways[dice.choose(sorted(ways))])
    written = next((thing.word for thing in scene.things if thing.word), None)
    word = dice.choose([each for each in WORDS if each != written]) if written else None
    return Film(seed, number, scene.things, True, mover, column, row, word)


def films(seed: int, block: int, count: int) -> list[Film]:
    """The films of one set."""
    found = (sample_film(seed, number) for number in itertools.count(block * BLOCK))
    return list(itertools.islice((film for film in found if film is not None), count))


def _free_cells(scene: Scene, mover: int) -> Iterator[tuple[int, int]]:
    """Where a thing without a word can go straight."""
    thing = scene.things[mover]
    if thing.word:
        return
    taken = {(other.column, other.row) for other in scene.things if other is not thing}
    for right, down in WAYS:
        column, row = thing.column + right, thing.row + down
        while 0 <= column < 3 and 0 <= row < 3 and (column, row) not in taken:
            yield column, row
            column, row = column + right, row + down


def _way(thing: Thing, column: int, row: int) -> str:
    sign = [(there > here) - (there < here) for here, there in ((thing.column, column), (thing.row, row))]
    return WAYS[sign[0], sign[1]]


# -- questions --------------------------------------------------------------------------------------------------------


def mover_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What colour is the thing that moves?"""
    film = cast(Film, scene)
    for attribute in ("colour", "shape", "material"):
        answer = scenes.value_of(film.things[film.mover], attribute)
        yield Ask(scenes.QUERY[attribute].format("thing that moves"), answer, "mover", attribute)


def name_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What moves?"""
    film = cast(Film, scene)
    yield Ask("What moves?", scenes.name(film.things[film.mover]), "name", "name")


def way_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Where does the red cube move?"""
    film = cast(Film, scene)
    words = scenes.referent(film.things[film.mover], film.things, dice)
    if words is not None:
        yield Ask(f"Where does the {words} move?", film.way, "way", "way")


def end_word_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What word is written at the end?"""
    film = cast(Film, scene)
    for when, share in (("at first", 0.0), ("at the end", 1.0)):
        for thing in film.at(share).things:
            if thing.word:
                yield Ask(f"What word is written {when}?", thing.word, "word", "word")


def end_place_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Where is the red cube at the end?  Asked of what has moved."""
    film = cast(Film, scene)
    words = scenes.referent(film.things[film.mover], film.things, dice)
    if words is not None:
        place = film.at(1.0).things[film.mover].place
        yield Ask(f"Where is the {words} at the end?", place, "place", "place")


FORMS: dict[str, Form] = {
    "attribute": scenes.attribute_asks,
    "count": scenes.count_asks,
    "mover": mover_asks,
    "name": name_asks,
    "way": way_asks,
    "word": end_word_asks,
    "place": end_place_asks,
}


def asked(made: Sequence[Film], forms: Sequence[str], name: str) -> list[tuple[Film, Ask]]:
    """Two questions on every film, answers as even as in the other sets; lower-case, as the official ones are."""
    found = scenes.balanced(made, forms, 2, name, table=FORMS)
    return [(cast(Film, film), replace(ask, question=ask.question.lower())) for film, ask in found]


# -- files ------------------------------------------------------------------------------------------------------------


def write(root: Path, seed: int, *, films_test: int, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write MSVD-QA, MSRVTT-QA and iVQA under `root`, `films_test` clips each; the same files for the same arguments.

    Their training files ask about further films, which are not drawn: only the answers in them are needed.

    Raises:
        DataError: PyAV is missing, or the folder cannot be written.
    """
    need_av(root)
    try:
        _msvd(root, seed, films_test, advance)
        _msrvtt(root, seed, films_test, advance)
        _ivqa(root, seed, films_test, advance)
    except OSError as error:
        raise DataError(f"{root}: the films cannot be written: {error}.") from None


def need_av(where: Path) -> None:
    """Refuse to begin where no video can be encoded.

    Raises:
        DataError: PyAV is missing.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise DataError(f"{where}: writing a video needs PyAV: pip install 'qformer[video]'.") from None


def film_count(films_test: int) -> int:
    """How many films `write` draws."""
    return 3 * films_test


def _msvd(root: Path, seed: int, count: int, advance: Callable[[int], None]) -> None:
    made = films(seed, MSVD, count)
    first, question = TEST_IDS["msvd_qa"]
    numbers = {film.number: first + place for place, film in enumerate(made)}
    lines = []
    for film in made:
        clip = f"{_youtube_id('msvd', film)}_{_seconds(film)}"
        encode(root / f"msvd_qa/YouTubeClips/{clip}.avi", film.pictures())
        lines.append(f"{clip} vid{numbers[film.number]}\n")
        advance(1)
    (root / "msvd_qa/youtube_mapping.txt").write_text("".join(lines), encoding="utf-8")
    put(root / "msvd_qa/test_qa.json", _questions(asked(made, MSVD_FORMS, "msvd"), numbers, question))
    train = films(seed, MSVD_TRAIN, _trained(count))
    numbers = {film.number: place for place, film in enumerate(train, 1)}
    put(root / "msvd_qa/train_qa.json", _questions(asked(train, MSVD_FORMS, "msvd train"), numbers, 0))


def _msrvtt(root: Path, seed: int, count: int, advance: Callable[[int], None]) -> None:
    made = films(seed, MSRVTT, count)
    first, question = TEST_IDS["msrvtt_qa"]
    numbers = {film.number: first + place for place, film in enumerate(made)}
    for film in made:
        encode(root / f"msrvtt_qa/videos/video{numbers[film.number]}.mp4", film.pictures())
        advance(1)
    rows = _questions(asked(made, MSRVTT_FORMS, "msrvtt"), numbers, question)
    put(root / "msrvtt_qa/test_qa.json", [_categorised(row) for row in rows])
    train = films(seed, MSRVTT_TRAIN, _trained(count))
    numbers = {film.number: place for place, film in enumerate(train)}
    rows = _questions(asked(train, MSRVTT_FORMS, "msrvtt train"), numbers, 0)
    put(root / "msrvtt_qa/train_qa.json", [_categorised(row) for row in rows])


def _trained(count: int) -> int:
    """Films that a training file asks about: enough that it holds every answer."""
    return max(120, 2 * count)


def _questions(found: Sequence[tuple[Film, Ask]], numbers: dict[int, int], first: int) -> list[dict[str, Any]]:
    return [
        {"id": first + place, "video_id": numbers[film.number], "question": ask.question, "answer": ask.answer}
        for place, (film, ask) in enumerate(found)
    ]


def _categorised(row: dict[str, Any]) -> dict[str, Any]:
    names = ("id", "answer", "category_id", "question", "video_id")
    whole = {**row, "category_id": row["video_id"] % CATEGORIES}
    return {name: whole[name] for name in names}


IVQA_COLUMNS = (
    "video_id",
    "start",
    "end",
    "question",
    "answer1",
    "answer2",
    "answer3",
    "answer4",
    "answer5",
    "confidence",
)


def _ivqa(root: Path, seed: int, count: int, advance: Callable[[int], None]) -> None:
    made = films(seed, IVQA, count)
    for film in made:
        folder = root / f"ivqa/videos/{_youtube_id('ivqa', film)}_{_seconds(film)}"
        folder.mkdir(parents=True, exist_ok=True)
        for place, picture in enumerate(film.pictures(), 1):
            picture.save(folder / f"{place:04d}.jpg", quality=95, subsampling=0)
        advance(1)
    for split, shown in (("test", made), ("train", films(seed, IVQA_TRAIN, _trained(count)))):
        with (root / f"ivqa/{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(IVQA_COLUMNS)
            for film, ask in asked(shown, IVQA_FORMS, f"ivqa {split}"):
                start, end = _seconds(film).split("_")
                said = five_answers(ask, split, film.number)
                table.writerow([_youtube_id("ivqa", film), start, end, ask.question, *said, max(map(said.count, said))])


def five_answers(ask: Ask, *key: object) -> list[str]:
    """What five people would say: three to five of them the right answer, the others one that is near it."""
    dice = Dice("five", *key, ask.question)
    wrong = _near(ask)
    right = 3 + dice.below(3)
    return dice.shuffled([ask.answer] * right + [dice.choose(wrong) for _ in range(5 - right)])


def _near(ask: Ask) -> Sequence[str]:
    """Wrong answers of the right kind."""
    if ask.type == "way":
        return [way for way in WAYS.values() if way != ask.answer]
    if ask.type == "name":
        colour, shape = ask.answer.split()
        return [shape, *(f"{other} {shape}" for other in VALUES["colour"] if other != colour)]
    return formats.near_answers(ask)


def _youtube_id(name: str, film: Film) -> str:
    dice = Dice("youtube", name, film.seed, film.number)
    return "".join(dice.choose(SYMBOLS) for _ in range(11))


def _seconds(film: Film) -> str:
    """Where a clip begins and ends in the video it is cut from."""
    begin = Dice("seconds", film.seed, film.number).below(200)
    return f"{begin}_{begin + LENGTH // RATE}"


def encode(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write pictures as a video: H.264 in MP4 where the library has an encoder of it, MPEG-4 otherwise and in AVI.

    The same bytes for the same pictures and the same version of PyAV: x264 goes without code of the processor's own,
    which gives other bytes on others, and of frames so small reads, with AVX-512, what nothing was written to.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    modern = path.suffix == ".mp4" and "libx264" in av.codec.codecs_available
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = cast(Any, container.add_stream("libx264" if modern else "mpeg4", rate=RATE))
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        sharp = {"crf": "12", "preset": "fast", "x264-params": "asm=0"}
        stream.options = sharp if modern else {"qmin": "2", "qmax": "3"}
        stream.codec_context.thread_count = 1
        stream.codec_context.bit_rate = 0 if modern else 2_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
