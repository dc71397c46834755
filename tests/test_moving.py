"""Scenes that move: official files, questions that need the right frames, and the same films from the same seed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

from qformer import videos
from qformer.demo import moving, scenes
from qformer.demo.moving import Film
from qformer.demo.scenes import CELL, HELD_OUT_PAIRS, PICTURE, Dice, Scene
from qformer.errors import DataError
from qformer.sample import Video

FILMS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    moving.write(folder, 3, films_test=FILMS)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def made(count: int = 60) -> list[Film]:
    return moving.films(7, 90, count)


def test_what_moves_goes_straight_to_a_free_cell_with_nothing_in_its_way() -> None:
    for film in made():
        thing = film.things[film.mover]
        here, there = (thing.column, thing.row), (film.column, film.row)
        assert here != there and thing.word is None and (here[0] == there[0] or here[1] == there[1])
        taken = {(other.column, other.row) for other in film.things if other is not thing}
        between = {(x, y) for x in range(min(here[0], there[0]), max(here[0], there[0]) + 1)
                   for y in range(min(here[1], there[1]), max(here[1], there[1]) + 1)}  # fmt: skip
        assert not between & taken
        assert all((each.colour, each.shape) in HELD_OUT_PAIRS for each in film.things)
    assert {film.way for film in made()} == {"left", "right", "up", "down"}


def test_a_film_begins_as_its_scene_and_ends_with_all_in_place() -> None:
    for film in made(20):
        begin, end = film.at(0.0), film.at(1.0)
        assert begin == Scene(film.seed, film.number, film.things, True)
        moved = end.things[film.mover]
        assert (moved.column, moved.row) == (film.column, film.row)
        assert (round(moved.x * PICTURE) // CELL, round(moved.y * PICTURE) // CELL) == (film.column, film.row)
        others = [thing for place, thing in enumerate(film.things) if place != film.mover]
        kept = [thing for place, thing in enumerate(end.things) if place != film.mover]
        assert [each.place for each in kept] == [each.place for each in others]
        words = {thing.word for thing in begin.things} | {thing.word for thing in end.things}
        assert len(words - {None}) in (0, 2)


def test_answers_follow_from_the_frames_looked_at() -> None:
    """Everything asked is told by the four frames, the first and the last among them; motion by no single one."""
    places = videos.positions(Video(Path("f")), moving.LENGTH)
    assert places[0] == 0 and places[-1] == moving.LENGTH - 1
    for film in made(20):
        dice = Dice("test", film.number)
        first, last = film.pictures()[0], film.pictures()[-1]
        assert ImageChops.difference(first, last).getbbox() is not None
        [way] = list(moving.way_asks(film, dice)) or [None]
        here, there = film.at(0.0).things[film.mover], film.at(1.0).things[film.mover]
        right, down = there.x - here.x, there.y - here.y
        seen = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        assert film.way == seen and (way is None or way.answer == seen)
        [ask] = list(moving.name_asks(film, dice))
        assert ask.answer == scenes.name(here)
        for ask in moving.end_place_asks(film, dice):
            assert ask.answer == there.place and ask.answer != here.place
        said = {ask.question: ask.answer for ask in moving.end_word_asks(film, dice)}
        written = {
            when: [t.word for t in film.at(share).things if t.word] for when, share in (("first", 0), ("end", 1))
        }
        assert [said.get("What word is written at first?")] == (written["first"] or [None])
        assert [said.get("What word is written at the end?")] == (written["end"] or [None])
        for ask in moving.mover_asks(film, dice):
            assert ask.answer in (here.colour, here.shape, here.material)


def test_the_files_are_those_of_the_sets(root: Path) -> None:
    msvd = loaded(root / "msvd_qa/test_qa.json")
    assert all(set(row) == {"id", "video_id", "question", "answer"} for row in msvd)
    mapping = dict(line.split()[::-1] for line in (root / "msvd_qa/youtube_mapping.txt").read_text().splitlines())
    assert len(mapping) == FILMS
    clips = {path.stem for path in (root / "msvd_qa/YouTubeClips").glob("*.avi")}
    assert {mapping[f"vid{row['video_id']}"] for row in msvd} <= clips == set(mapping.values())
    msrvtt = loaded(root / "msrvtt_qa/test_qa.json")
    assert all(list(row) == ["id", "answer", "category_id", "question", "video_id"] for row in msrvtt)
    assert {path.name for path in (root / "msrvtt_qa/videos").iterdir()} == {
        f"video{number}.mp4" for number in range(7010, 7010 + FILMS)
    }
    assert {row["video_id"] for row in msrvtt} <= set(range(7010, 7010 + FILMS))
    for rows in (msvd, msrvtt):
        assert len({row["id"] for row in rows}) == len(rows) >= FILMS // 2  # few films are hard to balance
        assert all(row["question"] == row["question"].lower() and row["question"].endswith("?") for row in rows)
        assert all(len(row["answer"].split()) == 1 for row in rows)
        assert {row["question"].split()[0] for row in rows} <= {"what", "where", "how"}
    ivqa = table(root / "ivqa/test.csv")
    folders = {path.name for path in (root / "ivqa/videos").iterdir()}
    assert len(folders) == FILMS
    for row in ivqa:
        assert tuple(row) == moving.IVQA_COLUMNS
        assert f"{row['video_id']}_{row['start']}_{row['end']}" in folders and len(row["video_id"]) == 11
        said = [row[f"answer{number}"] for number in range(1, 6)]
        assert all(said) and max(map(said.count, said)) == int(row["confidence"]) >= 3


def test_every_answer_of_test_is_one_of_training(root: Path) -> None:
    for name in ("msvd_qa", "msrvtt_qa"):
        train, test = (
            {row["answer"] for row in loaded(root / name / f"{split}_qa.json")} for split in ("train", "test")
        )
        assert test <= train
    assert len(table(root / "ivqa/train.csv")) > len(table(root / "ivqa/test.csv"))


def test_answers_are_balanced() -> None:
    found = moving.asked(made(200), moving.MSVD_FORMS, "balance")
    ways = [ask.answer for _, ask in found if ask.type == "way"]
    assert len(ways) > 40 and max(map(ways.count, ways)) <= 1.3 * len(ways) / 4
    assert {ask.form for _, ask in found} == set(moving.MSVD_FORMS)
    wrong = moving.five_answers(found[0][1], "key")
    assert len(wrong) == 5 and wrong.count(found[0][1].answer) >= 3


def test_clips_hold_the_films_whether_encoded_or_as_frames(root: Path) -> None:
    for block, paths in (
        (moving.MSRVTT, sorted((root / "msrvtt_qa/videos").iterdir())),
        (moving.MSVD, [root / f"msvd_qa/YouTubeClips/{line.split()[0]}.avi"
                       for line in (root / "msvd_qa/youtube_mapping.txt").read_text().splitlines()]),
        (moving.IVQA, None),
    ):  # fmt: skip
        for number, film in enumerate(moving.films(3, block, FILMS)[:3]):
            name = f"ivqa/videos/{moving._youtube_id('ivqa', film)}_{moving._seconds(film)}"
            path = paths[number] if paths else root / name
            seen = list(videos.frames(Video(path, moving.LENGTH), 10**6, ""))
            for ours, theirs in zip(film.pictures(), seen, strict=True):
                difference = ImageChops.difference(ours, theirs).convert("L").histogram()
                assert sum(level * count for level, count in enumerate(difference)) / (PICTURE * PICTURE) < 4


def test_the_same_seed_writes_the_same_files(root: Path, tmp_path: Path) -> None:
    def state(folder: Path) -> str:
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()

    told: list[int] = []
    moving.write(tmp_path / "again", 3, films_test=FILMS, advance=told.append)
    assert sum(told) == moving.film_count(FILMS) == 3 * FILMS
    assert state(tmp_path / "again") == state(root)
    assert moving.films(4, moving.MSVD, 3) != moving.films(3, moving.MSVD, 3)


def test_a_clip_does_not_hold_what_was_in_memory_before(tmp_path: Path) -> None:
    """glibc fills what it hands out with a byte of one's choice; on other systems the two are alike in any case."""
    code = (
        "import sys; from pathlib import Path; from qformer.demo import moving\n"
        "for film in moving.films(3, moving.MSRVTT, 12): "
        "moving.encode(Path(sys.argv[1]) / f'{film.number}.mp4', film.pictures())"
    )
    written = []
    for byte in ("0", "85"):
        folder = tmp_path / byte
        folder.mkdir()
        called = [sys.executable, "-c", code, str(folder)]
        subprocess.run(called, check=True, env=os.environ | {"MALLOC_PERTURB_": byte})
        written.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(written[0]) == 12 and written[0] == written[1]


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the films cannot be written"):
        moving.write(tmp_path / "file", 0, films_test=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"writing a video needs PyAV: pip install 'qformer\[video\]'"):
        moving.write(tmp_path / "none", 0, films_test=1)
