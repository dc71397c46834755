"""Readers of questions about videos, and the vocabulary of answers that their training files give.

A video is a file, or a folder of its frames, below files.videos; it is not opened here.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from qformer.data.records import Records, Settings
from qformer.data.streams import iterate_items, iterate_json, iterate_lines
from qformer.data.values import answers, number, shown, words
from qformer.errors import ConfigError, DataError
from qformer.sample import FRAMES, Sample
from qformer.videos import FILES

ANSWERS = tuple(f"answer{place}" for place in range(1, 6))
"""Columns of iVQA's five annotators."""


class _Videos(Records):
    """What both readers share: the frames that are looked at, and the answers to choose from.

    Under files.vocabulary may stand the set's own training file, whose answers every question then offers, the most
    frequent first.  Options: `frames`, how many of each video are looked at (4); `most`, how many answers are kept;
    `least`, how often one must be given there.
    """

    optional: ClassVar[tuple[str, ...]] = ("vocabulary",)
    settings: ClassVar[Settings] = {"frames": FRAMES, "most": None, "least": 1}

    def _prepare(self) -> None:
        self.frames()
        self.vocabulary: tuple[str, ...] = ()
        given = {name: self.options.get(name) for name in ("most", "least")}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{self.task}: options.{name} is {shown(value)}; it takes a whole number from 1.")
        if "vocabulary" in self.files:
            self.vocabulary = read_vocabulary(self.files["vocabulary"], given["most"], given["least"] or 1)


class VideoQA(_Videos):
    """MSVD-QA's and MSRVTT-QA's lists of questions (`test_qa.json`), and LAVIS' lists about the same videos.

    Under files.mapping may stand MSVD's `youtube_mapping.txt`, which names the clip of each number; a video is looked
    for under that name and under its number.  Options: `video`, the name of a video's file without its ending, with a
    place for the number (`vid%d`); `frames`, `most` and `least` as above.
    """

    name = "video_qa"
    roles = ("questions", "videos")
    optional = ("vocabulary", "mapping")
    settings: ClassVar[Settings] = {**_Videos.settings, "video": "video%d"}

    def _prepare(self) -> None:
        super()._prepare()
        self.named = self.options["video"]
        try:
            fits = isinstance(self.named, str) and bool(self.named % 1)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{self.task}: options.video is {self.named!r}; it takes a name with a place for a number, as "
                f"'video%d'."
            )

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(self._rows())

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        clips = read_mapping(self.files["mapping"]) if "mapping" in self.files else {}
        for place, row in enumerate(iterate_json(self.file)):
            kept = {name: row[name] for name in ("video", "video_id", "question", "answer") if name in row}
            if "video_id" in row:
                kept["clip"] = clips.get(f"vid{row['video_id']}")
            yield row.get("id", row.get("question_id", place)), kept

    def _sample(self, key: Any, row: Any) -> Sample:
        if "video" in row:
            path = PurePosixPath(words(row, "video"))
            names = [str(path), *([str(path.with_suffix(""))] if path.suffix in FILES else ())]
        else:
            names = [*([row["clip"]] if row.get("clip") else ()), self.named % number(row, "video_id")]
        question = words(row, "question")
        fields = {"question": question, "image_id": names[0], "kind": question.split()[0].lower()}
        said = (words(row, "answer"),)
        return Sample(self.id(key), self.task, self.video(*names), fields, references=said, candidates=self.vocabulary)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`."""
        return row["video"] if "video" in row else row["video_id"]


class IVQA(_Videos):
    """iVQA's tables (`test.csv`) with five answers to a question about a clip.

    A clip is looked for as `ID_START_END`, and as `ID` where the table has no other clip of that video.  Options:
    `frames`, `most` and `least` as above.
    """

    name = "ivqa"
    roles = ("questions", "videos")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        kept = ("video_id", "start", "end", "question", *ANSWERS)
        clips: dict[Any, set[tuple[Any, Any]]] = {}
        for row in read_table(self.file):
            clips.setdefault(row.get("video_id"), set()).add((row.get("start"), row.get("end")))
        for place, row in enumerate(read_table(self.file)):
            told = {name: row[name] for name in kept if name in row}
            alone = len(clips[row.get("video_id")]) == 1
            yield place, {**told, "alone": alone, "short": None in row.values()}

    def _sample(self, key: Any, row: Any) -> Sample:
        name = words(row, "video_id")
        clip = [f"{name}_{row['start']}_{row['end']}"] if row.get("start") and row.get("end") else []
        names = [*clip, *([name] if row["alone"] or not clip else ())]
        fields = {"question": words(row, "question"), "image_id": names[0]}
        if row["short"]:
            raise DataError("it has fewer columns than the table's head; was the download cut short?")
        given = [row[column] for column in ANSWERS if row.get(column)]
        said = answers(given, " to ".join((ANSWERS[0], ANSWERS[-1])))
        return Sample(self.id(key), self.task, self.video(*names), fields, references=said, candidates=self.vocabulary)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`."""
        return [row["video_id"], row.get("start"), row.get("end")]


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file by their columns' names.

    Raises:
        DataError: it cannot be read as a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream, strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: it cannot be read as a table ({error}).") from None


def read_mapping(path: Path) -> dict[str, str]:
    """Clips by the name that questions have for them: lines of `CLIP vidN`.

    Raises:
        DataError: a line is of another form.
    """
    clips: dict[str, str] = {}
    for line_number, line in iterate_lines(path):
        parts = line.split()
        if parts and len(parts) != 2:
            raise DataError(f"{path}, line {line_number}: it must be a clip and its number, as 'CLIP vid7'.")
        if parts:
            clips[parts[1]] = parts[0]
    return clips


def read_vocabulary(path: Path, most: int | None, least: int) -> tuple[str, ...]:
    """The distinct answers of a training file, the most frequent first (of equals the first met).

    Args:
        path: a list of questions with an `answer`, a table with `answer1` to `answer5`, or LAVIS' dictionary of
            answers.
        most: how many are kept; None: all.
        least: how often an answer must be given.

    Raises:
        DataError: the file is of another form, or no answer is left.
    """
    try:
        counts = Counter(" ".join(each.split()) for each in _training_answers(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: it is neither a list of questions with an 'answer', nor a table with '{ANSWERS[0]}', nor a "
            f"dictionary of answers ({type(error).__name__}: {error})."
        ) from None
    del counts[""]
    kept = [answer for answer, count in counts.most_common(most) if count >= least]
    if not kept:
        raise DataError(f"{path}: no answer stands in it {least} time(s) or more, so there is nothing to choose from.")
    return tuple(kept)


def _training_answers(path: Path) -> Iterator[str]:
    if path.suffix == ".csv":
        for row in read_table(path):
            row[ANSWERS[0]]  # a table of something else
            yield from (row[column] for column in ANSWERS if row.get(column))
        return
    try:
        for row in iterate_json(path):
            yield row["answer"]
    except TypeError as error:
        if "must be a list" not in str(error):
            raise
        yield from (answer for answer, _ in iterate_items(path))
