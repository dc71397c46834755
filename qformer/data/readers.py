"""Readers, one per on-disk shape: official files in, `Sample`s out.

A reader yields a row for each record when it is opened and makes a `Sample` of one row when it is asked for; no
picture is opened here.  The table `READERS` is closed: cards name its keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import urlparse

from qformer.cards import MEDIA, EvalCard, TaskCard, TrainCard
from qformer.data import ocr
from qformer.data.columns import Columns
from qformer.data.dialogs import VisDial
from qformer.data.index import Index
from qformer.data.jsonl import JsonLines
from qformer.data.pictures import stands_for
from qformer.data.records import Records, Settings
from qformer.data.scienceqa import ScienceQA
from qformer.data.shards import Shards
from qformer.data.streams import iterate_items, iterate_json, iterate_lines, join, read_json
from qformer.data.values import RANKS, answers, chosen, number, offered, several, words
from qformer.data.videoqa import IVQA, VideoQA
from qformer.errors import ConfigError, DataError, did_you_mean, lookup
from qformer.sample import Sample, Turn


class CocoCaptions(Records):
    """COCO's caption annotations (`captions_train2014.json`), and NoCaps, which has their form.

    Option `per`: `caption` makes a record of every caption, `image` one of every picture with all its captions.
    """

    name = "coco_captions"
    roles = ("captions", "images")
    settings: ClassVar[Settings] = {"per": "caption"}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        kept = ("id", "file_name", "domain")
        shown = (
            (picture["id"], {name: picture[name] for name in kept if name in picture})
            for picture in iterate_json(self.file, "images")
        )
        pictures = dict(self.first(shown, "among 'images'"))
        if self.option("per", ("caption", "image")) == "caption":
            rows = iterate_json(self.file, "annotations")
            yield from self.once((row["id"], [pictures.get(row["image_id"]), [row]]) for row in rows)
            return
        captions: dict[Any, list[Any]] = {name: [] for name in pictures}
        annotations = ((row.get("id"), row) for row in iterate_json(self.file, "annotations"))
        for _, row in self.first(annotations, "among 'annotations'"):
            captions.setdefault(row["image_id"], []).append(row)
        yield from self.once((name, [pictures.get(name), said]) for name, said in captions.items())

    def _sample(self, key: Any, row: Any) -> Sample:
        picture, annotations = row
        if picture is None:
            missing = annotations[0]["image_id"]
            raise DataError(f"its image_id {missing} is not among 'images'; remove the caption, or add its picture")
        if not annotations:
            raise DataError("its picture has no caption; write one, or remove the picture")
        fields = {"image_id": picture["id"]}
        if "domain" in picture:
            fields["domain"] = picture["domain"]
        captions = tuple(words(each, "caption") for each in annotations)
        return Sample(self.id(key), self.task, self.image(words(picture, "file_name")), fields, references=captions)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`."""
        return row[0]["file_name"]


class Karpathy(Records):
    """Karpathy's split of COCO or Flickr30K (`dataset_coco.json`).

    Options: `splits`, the values of `split` that are taken; `per` as for COCO's own files.
    """

    name = "karpathy"
    roles = ("captions", "images")
    settings: ClassVar[Settings] = {"splits": ["train", "restval"], "per": "caption"}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(self._rows())

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        splits = self.listed("splits")
        per_caption = self.option("per", ("caption", "image")) == "caption"
        for picture in iterate_json(self.file, "images"):
            if picture["split"] not in splits:
                continue
            number = picture.get("cocoid", picture["imgid"])
            shown = {"filepath": picture.get("filepath") or "", "filename": picture["filename"], "image_id": number}
            sentences = picture["sentences"]
            if per_caption:
                for sentence in sentences:
                    yield sentence["sentid"], [shown, [{"raw": sentence.get("raw")}]]
            else:
                said = ((sentence.get("sentid"), {"raw": sentence.get("raw")}) for sentence in sentences)
                yield number, [shown, [raw for _, raw in self.first(said, "among 'sentences'")]]

    def _sample(self, key: Any, row: Any) -> Sample:
        picture, sentences = row
        path = str(PurePosixPath(picture["filepath"], words(picture, "filename")))
        captions = tuple(words(each, "raw") for each in several(sentences, "'sentences'"))
        fields = {"image_id": picture["image_id"]}
        return Sample(self.id(key), self.task, self.image(path), fields, references=captions)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`."""
        return [row[0]["filepath"], row[0]["filename"]]


class CaptionList(Records):
    """A list of pictures with their captions, as BLIP's CapFilt files and LAVIS's own: `[{"image", "caption"}]`.

    A caption is a text, or a list of texts.  Options: `image` and `caption`, the names of the two fields; `prefix`,
    what pictures' paths begin with and is taken off, as in lists that name them by their place on another disk.
    """

    name = "caption_list"
    roles = ("captions", "images")
    settings: ClassVar[Settings] = {"image": "image", "caption": "caption", "prefix": ""}

    def _prepare(self) -> None:
        self.fields = [str(self.options[name]) for name in ("image", "caption")]

    def _read(self) -> Iterator[tuple[Any, Any]]:
        for place, row in enumerate(iterate_json(self.file)):
            yield place, {name: row[name] for name in self.fields if name in row}

    def _sample(self, key: Any, row: Any) -> Sample:
        image, caption = self.fields
        captions = answers(row[caption], f"'{caption}'") if isinstance(row[caption], list) else (words(row, caption),)
        path, prefix = row[image], str(self.options["prefix"])
        if prefix and isinstance(path, str) and path.startswith(prefix):
            path = path.removeprefix(prefix).lstrip("/")
        elif isinstance(path, str) and path.startswith("/"):
            raise DataError(
                f"its picture '{path}' is an absolute path; say in options.prefix what is to be taken off, so that the "
                f"rest lies below files.images"
            )
        return Sample(self.id(key), self.task, self.image(path), {"image_id": row[image]}, references=captions)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`."""
        return row[self.fields[0]]


class TextVQA(Records):
    """TextCaps and TextVQA: `{"data": [...]}` over pictures with words in them, and those words in a file of their own.

    Under files.ocr may stand Rosetta's file (`TextVQA_Rosetta_OCR_v0.2_train.json`).  Options: `per`: `caption`,
    `image` (one record a picture with all its captions) or `question`; `image`, the picture's file name with a place
    for its id; `ocr_tokens`, how many words are kept; `answers`: `hidden` for the questions of test, whose answers a
    server has.
    """

    name = "textvqa"
    picture = "image_id"
    answered: ClassVar[Mapping[str, str]] = {"answers": "score val, or write the server's file with textvqa:test"}
    roles = ("records", "images")
    optional = ("ocr",)
    settings: ClassVar[Settings] = {"per": "caption", "image": "%s.jpg", "ocr_tokens": ocr.MOST, "answers": "given"}

    def _prepare(self) -> None:
        self.per = self.option("per", ("caption", "image", "question"))
        self.hidden = self.answers_hidden()

    def _read(self) -> Iterator[tuple[Any, Any]]:
        written = ocr.read_side_file(self.files.get("ocr"), ocr.limit(self.options))
        rows = self._with_words(iterate_json(self.file, "data"), written)
        if self.per == "image":
            yield from self._pictures(rows, written)
            return
        name = "caption_id" if self.per == "caption" else "question_id"
        kept = ("image_id", "caption_str") if self.per == "caption" else ("image_id", "question", "answers")
        yield from self.once(
            (row[name], {each: row[each] for each in kept if each in row} | _ocr(written, row)) for row in rows
        )

    def _with_words(self, rows: Iterable[Any], written: Mapping[str, str]) -> Iterator[Any]:
        """The rows; an error where none of their pictures is in the file of words, which would go unseen otherwise."""
        seen, met = False, "ocr" not in self.files
        for row in rows:
            seen, met = True, met or str(row["image_id"]) in written
            yield row
        if seen and not met:
            raise DataError(
                f"{self.files['ocr']}: none of its pictures is among those of {self.file}; is it the file of words of "
                f"another split?"
            )

    def _pictures(self, rows: Iterable[Any], written: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
        pictures: dict[Any, Any] = {}
        for _, row in self.first(((row.get("caption_id"), row) for row in rows), "among 'data'"):
            picture = pictures.setdefault(
                row["image_id"], {"image_id": row["image_id"], "captions": []} | _ocr(written, row)
            )
            picture["captions"].append(row["caption_str"])
        yield from pictures.items()

    def _sample(self, key: Any, row: Any) -> Sample:
        name = words(row, "image_id")
        fields = {"image_id": name, "ocr": row["ocr"]}
        if self.per == "question":
            fields["question"] = words(row, "question")
            said = () if self.hidden else answers(row["answers"], "'answers'", blank=True)
        elif self.per == "image":
            said = answers(row["captions"], "'caption_str'")
        else:
            said = (words(row, "caption_str"),)
        picture = self.image(_named(self.options["image"], name, self.task))
        return Sample(self.id(key), self.task, picture, fields, references=said)


class VQA(Records):
    """Questions and annotations of VQAv2 or OKVQA, joined by `question_id`; of test there are questions alone.

    Options: `image`, the picture's file name with a place for its number (`COCO_train2014_%012d.jpg`); `answer`, the
    field of an annotator's answer that is taken (`answer`; OKVQA's unstemmed words are in `raw_answer`); `per`:
    `question`, or `answer` for a record of each distinct answer to a question.
    """

    name = "vqa"
    picture = "image_id"
    roles = ("questions", "images")
    optional = ("annotations",)
    settings: ClassVar[Settings] = {"image": "%012d.jpg", "answer": "answer", "per": "question"}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(_per_answer(self._rows(), self.option("per", ("question", "answer"))))

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        field = self.options["answer"]

        def annotations() -> Iterator[Any]:
            rows = iterate_json(self.files["annotations"], "annotations") if "annotations" in self.files else ()
            return self.beside("annotations", (row for row in rows if "question_id" in row))

        def further(name: Any) -> None:
            self.twice(name, f"in {self.files['annotations']}")

        asked, annotated = 0, 0
        for question, annotation in join(iterate_json(self.file, "questions"), annotations, "question_id", further):
            row = {name: question[name] for name in ("question", "image_id") if name in question}
            row["annotated"] = annotation is not None
            if annotation is not None:
                row |= {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
                row["answers"] = [_answer(each, field) for each in annotation.get("answers") or ()]
            yield question["question_id"], row
            asked, annotated = asked + 1, annotated + row["annotated"]
        if asked and not annotated and "annotations" in self.files:
            raise DataError(
                f"{self.files['annotations']}: it has no answer to any question of {self.file}; is it the file of "
                f"another split?"
            )

    def _sample(self, key: Any, row: Any) -> Sample:
        fields = {"question": words(row, "question"), "image_id": row["image_id"]}
        picture = self.numbered(number(row, "image_id"))
        if "annotations" not in self.files:
            return Sample(self.id(key), self.task, picture, fields)
        if not row["annotated"]:
            raise DataError(f"its question_id is not in {self.files['annotations']}; add its answers, or remove it")
        fields |= {name: row[name] for name in ("question_type", "answer_type")}
        return Sample(
            self.id(key), self.task, picture, fields, references=answers(row["answers"], "'answers'", blank=True)
        )


class AOKVQA(Records):
    """A-OKVQA's list of questions with choices and ten direct answers.

    Options: `image`, the file name pattern (`%012d.jpg`); `form`: `direct_answer` or `multiple_choice`, which decides
    what the references are; `difficult`: `keep`, or `drop` for questions marked `difficult_direct_answer`, as the
    official scorer of direct answers does; `per`: `question`, or `answer` for a record of each distinct answer;
    `answers`: `hidden` for the questions of test, whose answers a server has.
    """

    name = "aokvqa"
    picture = "image_id"
    answered: ClassVar[Mapping[str, str]] = {
        "correct_choice_idx": "score val, or write the server's file with aokvqa:test or aokvqa:test_multiple_choice"
    }
    roles = ("questions", "images")
    settings: ClassVar[Settings] = {
        "image": "%012d.jpg", "form": "direct_answer", "difficult": "keep", "per": "question", "answers": "given",
    }  # fmt: skip

    def _prepare(self) -> None:
        self.form = self.option("form", ("direct_answer", "multiple_choice"))
        self.hidden = self.answers_hidden()

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(_per_answer(self._rows(), self.option("per", ("question", "answer"))))

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        drop = self.option("difficult", ("keep", "drop")) == "drop"
        kept = ("image_id", "question", "choices", "correct_choice_idx")
        for row in iterate_json(self.file):
            if not (drop and row["difficult_direct_answer"]):
                said = {"answers": row["direct_answers"]} if "direct_answers" in row else {}
                yield row["question_id"], {name: row[name] for name in kept if name in row} | said

    def _sample(self, key: Any, row: Any) -> Sample:
        choices = answers(row["choices"], "'choices'")
        picture = self.numbered(number(row, "image_id"))
        fields = {"question": words(row, "question"), "image_id": row["image_id"]}
        if self.hidden:
            return Sample(self.id(key), self.task, picture, fields, candidates=choices)
        right = (chosen(choices, row["correct_choice_idx"], "correct_choice_idx"),)
        if self.form == "direct_answer" and "answers" not in row:
            raise KeyError("direct_answers")
        said = right if self.form == "multiple_choice" else answers(row["answers"], "'direct_answers'")
        return Sample(self.id(key), self.task, picture, fields, references=said, candidates=choices)


class OCRVQA(Records):
    """OCR-VQA's dictionary of book covers, each with a list of questions and a list of answers.

    A picture is looked for as ID with the ending of its address, and as ID.jpg.  Options: `splits`, the numbers of
    `split` that are taken (1 train, 2 val, 3 test); `ocr_tokens`, how many words of files.ocr are kept, which is a
    file beside it of the form that `ocr.read_side_file` takes.
    """

    name = "ocrvqa"
    picture = "book"
    roles = ("books", "images")
    optional = ("ocr",)
    settings: ClassVar[Settings] = {"splits": [1], "ocr_tokens": ocr.MOST}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        written = ocr.read_side_file(self.files.get("ocr"), ocr.limit(self.options))
        yield from self.once(self._rows(written))

    def _rows(self, written: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
        splits = self.listed("splits")
        for name, book in iterate_items(self.file):
            if book["split"] not in splits:
                continue
            shown = {"book": name, "address": book.get("imageURL"), "ocr": written.get(name, "")}
            asked, said = book["questions"], book["answers"]
            if not isinstance(asked, list) or not isinstance(said, list) or len(asked) != len(said):
                yield name, shown | {"questions": asked, "answers": said}
                continue
            for place, (question, answer) in enumerate(zip(asked, said, strict=True)):
                yield f"{name}/{place}", shown | {"question": question, "answer": answer}

    def _sample(self, key: Any, row: Any) -> Sample:
        if "question" not in row:
            asked, said = (several(row[name], f"'{name}'") for name in ("questions", "answers"))
            raise DataError(f"it has {len(asked)} questions and {len(said)} answers; there must be as many")
        address = row["address"] if isinstance(row["address"], str) else ""
        ending = PurePosixPath(urlparse(address).path).suffix or ".jpg"
        return Sample(
            self.id(key),
            self.task,
            self.image(*dict.fromkeys((f"{row['book']}{ending}", f"{row['book']}.jpg"))),
            {"question": words(row, "question"), "image_id": row["book"], "ocr": row["ocr"]},
            references=answers([row["answer"]], "'answers'"),
        )


class LLaVA(Records):
    """LLaVA-Instruct's conversations; the `<image>` tag is taken off, since soft tokens come first anyway.

    Options: `per`: `dialogue`, `turn` for a record of each exchange with those before it as its history, or `first`
    for the first exchange alone; `image`: patterns of COCO's file names, where others than the file's own are wanted.
    """

    name = "llava"
    picture = "image"
    roles = ("conversations", "images")
    settings: ClassVar[Settings] = {"per": "dialogue", "image": None}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        per = self.option("per", ("dialogue", "turn", "first"))
        for place, row in enumerate(iterate_json(self.file)):  # `id` repeats between conversations about one picture
            kept = {name: row[name] for name in ("id", "image", "conversations") if name in row}
            said = kept.get("conversations")
            if per == "dialogue" or not isinstance(said, list) or len(said) < 2:
                yield place, kept
            elif per == "first":
                yield place, kept | {"conversations": said[:2]}
            else:
                for end in range(2, len(said) + 1, 2):
                    yield f"{place}/{end // 2}", kept | {"conversations": said[:end]}

    def _sample(self, key: Any, row: Any) -> Sample:
        said = several(row["conversations"], "'conversations'")
        speakers = [str(each["from"]) for each in said]
        if speakers != ["human", "gpt"] * (len(said) // 2):
            raise DataError(f"its turns are by {', '.join(speakers)}; they must be by human, gpt in turn")
        spoken = [each["value"].replace("<image>", "").strip() for each in said]
        if "" in spoken:
            raise DataError(f"turn {spoken.index('') + 1} is empty; fill it, or remove the dialogue")
        turns = tuple(Turn(*pair) for pair in zip(spoken[::2], spoken[1::2], strict=True))
        image = words(row, "image")
        stem = PurePosixPath(image).stem
        picture = self.numbered(number({"image": stem}, "image")) if "image" in self.options else self.image(image)
        return Sample(
            self.id(key), self.task, picture, {"image_id": row["id"]}, turns=turns, references=(turns[-1].answer,)
        )


class GQA(Records):
    """GQA's dictionary of questions; the field `kind` is the question's structural type."""

    name = "gqa"
    picture = "imageId"
    answered: ClassVar[Mapping[str, str]] = {"answer": "score testdev, or another split that has them"}
    roles = ("questions", "images")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        kept = ("question", "imageId", "answer", "fullAnswer", "types")
        rows = iterate_items(self.file)
        yield from self.once((key, {name: row[name] for name in kept if name in row}) for key, row in rows)

    def _sample(self, key: Any, row: Any) -> Sample:
        answer = words(row, "answer")
        fields = {
            "question": words(row, "question"),
            "image_id": row["imageId"],
            "full_answer": row.get("fullAnswer", ""),
            "kind": row["types"]["structural"],
        }
        picture = self.image(f"{words(row, 'imageId')}.jpg")
        return Sample(self.id(key), self.task, picture, fields, references=(answer,))


class VSR(Records):
    """VSR's statements, one JSON object a line.  Option `words`: what stands for label 0 and for label 1."""

    name = "vsr"
    picture = "image"
    answered: ClassVar[Mapping[str, str]] = {"label": "score a split that has them"}
    roles = ("statements", "images")
    settings: ClassVar[Settings] = {"words": None}

    def _prepare(self) -> None:
        _check_words(self.options.get("words"), self.task)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from _lines(self.file)

    def _sample(self, key: Any, row: Any) -> Sample:
        word = chosen(self.options["words"], number(row, "label"), "label")
        image = words(row, "image")
        fields = {"statement": words(row, "caption"), "relation": row.get("relation", ""), "image_id": Path(image).stem}
        return Sample(self.id(key), self.task, self.image(image), fields, references=(str(word),))


class HatefulMemes(Records):
    """HatefulMemes' pictures with the words on them, one JSON object a line.

    Option `words`: what stands for label 0 (not hateful) and for label 1.
    """

    name = "hateful_memes"
    picture = "img"
    answered: ClassVar[Mapping[str, str]] = {"label": "score dev_seen or dev_unseen"}
    roles = ("records", "images")
    settings: ClassVar[Settings] = {"words": None}

    def _prepare(self) -> None:
        _check_words(self.options.get("words"), self.task)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        kept = ("id", "img", "label", "text")
        rows = ((row["id"], {name: row[name] for name in kept if name in row}) for _, row in _lines(self.file))
        yield from self.once(rows)

    def _sample(self, key: Any, row: Any) -> Sample:
        word = chosen(self.options["words"], number(row, "label"), "label")
        fields = {"text": words(row, "text"), "image_id": row["id"]}
        return Sample(self.id(key), self.task, self.image(words(row, "img")), fields, references=(str(word),))


class VizWiz(Records):
    """VizWiz' list of questions, one about each picture, with ten answers.

    Option `answers`: `hidden` for the questions of test, whose answers a server has.
    """

    name = "vizwiz"
    picture = "image"
    answered: ClassVar[Mapping[str, str]] = {"answers": "score val, or write the server's file with vizwiz:test_dev"}
    roles = ("questions", "images")
    settings: ClassVar[Settings] = {"answers": "given"}

    def _prepare(self) -> None:
        self.hidden = self.answers_hidden()

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once((row["image"], self._kept(row)) for row in iterate_json(self.file))

    def _kept(self, row: Any) -> dict[str, Any]:
        kept = {name: row[name] for name in ("image", "question", "answer_type", "answers") if name in row}
        if isinstance(kept.get("answers"), list):
            kept["answers"] = [_answer(each, "answer") for each in kept["answers"]]
        return kept

    def _sample(self, key: Any, row: Any) -> Sample:
        fields = {"question": words(row, "question"), "image_id": words(row, "image")}
        picture = self.image(fields["image_id"])
        if self.hidden:
            return Sample(self.id(key), self.task, picture, fields)
        said = answers(row["answers"], "'answers'", blank=True)
        fields["answer_type"] = words(row, "answer_type")
        return Sample(self.id(key), self.task, picture, fields, references=said)


class IconQA(Records):
    """IconQA's problems with choices in words; files.images is the folder of one split and sub-task.

    Options: `split`, a key of `pid_splits.json`; `rank`, what is chosen from: the choices' `texts`, their `letters`, or
    both (`lettered`).
    """

    name = "iconqa"
    roles = ("problems", "splits", "images")
    settings: ClassVar[Settings] = {"split": "choose_txt_test", "rank": "texts"}

    def _prepare(self) -> None:
        self.rank = self.option("rank", RANKS)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        splits = read_json(self.files["splits"])
        split = self.options["split"]
        if split not in splits:
            raise ConfigError(f"{self.files['splits']}: no split '{split}'.{did_you_mean(str(split), splits)}")
        wanted = {str(name) for name in splits[split]}
        problems = dict(self.first((each for each in iterate_items(self.file) if each[0] in wanted), "in the file"))
        yield from self.once((name, problems.get(str(name))) for name in splits[split])

    def _sample(self, key: Any, row: Any) -> Sample:
        if row is None:
            raise DataError(f"it is in {self.files['splits']} and not among the problems; fetch both files again")
        options, choices = offered(answers(row["choices"], "'choices'"), self.rank)
        fields = {"question": words(row, "question"), "image_id": key, "grade": row.get("grade", ""), **options}
        return Sample(
            self.id(key),
            self.task,
            self.image(f"{key}/image.png"),
            fields,
            references=(chosen(choices, row["answer"], "answer"),),
            candidates=choices,
        )

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`: each problem has a picture of its own."""
        return key


READERS: dict[str, type[Records]] = {
    reader.name: reader
    for reader in (
        JsonLines, CocoCaptions, Karpathy, CaptionList, TextVQA, VQA, AOKVQA, OCRVQA, LLaVA, Shards, Columns,
        GQA, VSR, IconQA, ScienceQA, HatefulMemes, VizWiz, VisDial, VideoQA, IVQA,
    )
}  # fmt: skip


def open_records(section: TrainCard | EvalCard, root: Path, card: TaskCard, index: Index | None = None) -> Records:
    """The records of one section of a card, under `data.root`; out of the index, if one is given.

    Raises:
        ConfigError: an unknown reader, role or option.
        DataError: the root or a file is not there; says which, where it was expected and what to download.
    """
    check_files(section, root, card)
    return read_records(section, root, card, index)


def check_files(section: TrainCard | EvalCard, root: Path, card: TaskCard) -> None:
    """Whether reader and files of a section are there, none of which is read yet; raises as `open_records`."""
    reader = lookup(READERS, section.reader, "reader")
    download = f" To download: {card.source}" if card.source else ""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data.root is '{root}', and there is no such folder; {card.key} is read from it.{download}")
    for role, path in expected(section, root):
        if not is_there(role, path) and role not in reader.elsewhere:
            raise DataError(f"{card.key}: there is no '{path}' (files.{role} of the card, under data.root).{download}")


def read_records(section: TrainCard | EvalCard, root: Path, card: TaskCard, index: Index | None = None) -> Records:
    """As `open_records`, whether pictures are there or not; what is to be downloaded is not said."""
    files: dict[str, Path | list[Path]] = {
        role: root / name if isinstance(name, str) else [root / each for each in name]
        for role, name in section.files.items()
    }
    split = section.split if isinstance(section, EvalCard) else "train"
    return lookup(READERS, section.reader, "reader")(files, section.options, card.key, split, index)


def expected(section: TrainCard | EvalCard, root: Path) -> list[tuple[str, Path]]:
    """Roles and paths of the files and folders that a section is read from."""
    return [
        (role, root / each)
        for role, name in section.files.items()
        for each in ([name] if isinstance(name, str) else name)
    ]


def is_there(role: str, path: Path) -> bool:
    """Whether a file is there, or for pictures and videos an archive in a folder's place."""
    return stands_for(path) if role in (*MEDIA, "shards") else path.exists()


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The JSON objects of a file that has one a line, and their lines' numbers."""
    for line_number, line in iterate_lines(file):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = f"not valid JSON ({getattr(error, 'msg', str(error))}); mend or remove the line"
                raise DataError(f"{file}, line {line_number}: {problem}.") from None
            yield line_number, row


def _check_words(given: Any, task: str) -> None:
    if not isinstance(given, list | tuple) or [type(word) for word in given] != [str, str]:
        raise ConfigError(f"{task}: options.words must be two words, for label 0 and label 1, in quotes.")


def _ocr(written: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    return {"ocr": written.get(str(row["image_id"]), "")}


def _answer(given: Any, field: str) -> Any:
    """An annotator's answer; one without the field stays, so that its record is named when it is asked for."""
    return given.get(field) if isinstance(given, dict) else None


def _per_answer(rows: Iterable[tuple[Any, Any]], per: str) -> Iterator[tuple[Any, Any]]:
    """Rows as they are, or one for each distinct answer among theirs."""
    for key, row in rows:
        said = row.get("answers")
        if per == "question" or not isinstance(said, list) or not said:
            yield key, row
            continue
        for place, answer in enumerate(dict.fromkeys(json.dumps(each) for each in said)):
            yield f"{key}/{place}", row | {"answers": [json.loads(answer)]}


def _named(given: Any, name: str, task: str) -> str:
    """A picture's file name from its id and option `image`."""
    if not isinstance(given, str) or given.count("%s") != 1:
        raise ConfigError(f"{task}: options.image is {given!r}; it takes a file name with %s in the place of the id.")
    return given.replace("%s", name)
