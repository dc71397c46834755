"""Readers, one per on-disk shape: official files in, `Sample`s out.

A reader parses its annotation files when it is opened and makes one record into a `Sample` when it is asked for; no
picture is touched here.  The table `READERS` is closed: cards name its keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qformer.cards import EvalCard, TaskCard, TrainCard
from qformer.data.jsonl import JsonLines
from qformer.data.records import Records, read_json, read_lines
from qformer.errors import ConfigError, DataError, did_you_mean, lookup
from qformer.sample import Sample, Turn


class CocoCaptions(Records):
    """COCO's caption annotations (`captions_train2014.json`), and NoCaps, which has their form.

    Option `per`: `caption` makes a record of every caption, `image` one of every picture with all its captions.
    """

    name = "coco_captions"
    roles = ("captions", "images")
    settings = ("per",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        content = read_json(self.file)
        pictures = {picture["id"]: picture for picture in content["images"]}
        if self.option("per", ("caption", "image")) == "caption":
            for row in content["annotations"]:
                yield row["id"], (pictures.get(row["image_id"]), [row])
            return
        captions: dict[Any, list[Any]] = {name: [] for name in pictures}
        for row in content["annotations"]:
            captions.setdefault(row["image_id"], []).append(row)
        for name, rows in captions.items():
            yield name, (pictures.get(name), rows)

    def _sample(self, key: Any, row: Any) -> Sample:
        picture, annotations = row
        if picture is None:
            raise DataError(f"its image_id {annotations[0]['image_id']} is not among 'images'")
        if not annotations:
            raise DataError("its picture has no caption")
        fields = {"image_id": picture["id"]}
        if "domain" in picture:
            fields["domain"] = picture["domain"]
        captions = tuple(_caption(each["caption"]) for each in annotations)
        return Sample(self.id(key), self.task, self.image(picture["file_name"]), fields, references=captions)


class Karpathy(Records):
    """Karpathy's split of COCO or Flickr30K (`dataset_coco.json`).

    Options: `splits`, the values of `split` that are taken; `per` as for COCO's own files.
    """

    name = "karpathy"
    roles = ("captions", "images")
    settings = ("splits", "per")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        splits = self.options.get("splits", ["train", "restval"])
        if not isinstance(splits, list | tuple):  # in a text, any part of it would be found
            raise ConfigError(f"{self.task}: options.splits is '{splits}'; it takes a list, even of one.")
        per_caption = self.option("per", ("caption", "image")) == "caption"
        for picture in read_json(self.file)["images"]:
            if picture["split"] not in splits:
                continue
            if per_caption:
                for sentence in picture["sentences"]:
                    yield sentence["sentid"], (picture, [sentence])
            else:
                yield picture.get("cocoid", picture["imgid"]), (picture, picture["sentences"])

    def _sample(self, key: Any, row: Any) -> Sample:
        picture, sentences = row
        path = str(Path(picture.get("filepath", ""), picture["filename"]))
        fields = {"image_id": picture.get("cocoid", picture["imgid"])}
        captions = tuple(_caption(each["raw"]) for each in sentences)
        return Sample(self.id(key), self.task, self.image(path), fields, references=captions)


class VQA(Records):
    """Questions and annotations of VQAv2 or OKVQA, joined by `question_id`.

    Options: `image`, the picture's file name with a place for its number (`COCO_train2014_%012d.jpg`); `answer`, the
    field of an annotator's answer that is taken (`answer`; OKVQA's unstemmed words are in `raw_answer`).
    """

    name = "vqa"
    roles = ("questions", "annotations", "images")
    settings = ("image", "answer")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        annotations = {row["question_id"]: row for row in read_json(self.files["annotations"])["annotations"]}
        for row in read_json(self.file)["questions"]:
            yield row["question_id"], (row, annotations.get(row["question_id"]))

    def _sample(self, key: Any, row: Any) -> Sample:
        question, annotation = row
        if annotation is None:
            raise DataError(f"there is no such question_id in {self.files['annotations']}")
        fields = {
            "question": question["question"],
            "image_id": question["image_id"],
            "question_type": annotation["question_type"],
            "answer_type": annotation["answer_type"],
        }
        answers = tuple(str(each[self.options.get("answer", "answer")]) for each in annotation["answers"])
        return Sample(
            self.id(key), self.task, self.image(_numbered(self.options, key, question)), fields, references=answers
        )


class AOKVQA(Records):
    """A-OKVQA's list of questions with choices and ten direct answers.

    Options: `image`, the file name pattern (`%012d.jpg`); `form`: `direct_answer` or `multiple_choice`, which decides
    what the references are; `difficult`: `keep`, or `drop` for questions marked `difficult_direct_answer`, as the
    official scorer of direct answers does.
    """

    name = "aokvqa"
    roles = ("questions", "images")
    settings = ("image", "form", "difficult")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        self.form = self.option("form", ("direct_answer", "multiple_choice"))
        drop = self.option("difficult", ("keep", "drop")) == "drop"
        for row in read_json(self.file):
            if not (drop and row["difficult_direct_answer"]):
                yield row["question_id"], row

    def _sample(self, key: Any, row: Any) -> Sample:
        right = (_chosen(row["choices"], row["correct_choice_idx"], "correct_choice_idx"),)
        return Sample(
            self.id(key),
            self.task,
            self.image(_numbered(self.options, key, row)),
            {"question": row["question"], "image_id": row["image_id"]},
            references=right if self.form == "multiple_choice" else tuple(row["direct_answers"]),
            candidates=tuple(row["choices"]),
        )


class LLaVA(Records):
    """LLaVA-Instruct's conversations; the `<image>` tag is taken off, since soft tokens come first anyway."""

    name = "llava"
    roles = ("conversations", "images")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from enumerate(read_json(self.file))  # `id` repeats between conversations about one picture

    def _sample(self, key: Any, row: Any) -> Sample:
        said = row["conversations"]
        speakers = [each["from"] for each in said]
        if not said or speakers != ["human", "gpt"] * (len(said) // 2):
            raise DataError(f"its turns are by {', '.join(speakers) or 'nobody'}; they must be by human, gpt in turn")
        words = [each["value"].replace("<image>", "").strip() for each in said]
        if "" in words:
            raise DataError(f"turn {words.index('') + 1} is empty")
        turns = tuple(Turn(*pair) for pair in zip(words[::2], words[1::2]))
        return Sample(
            self.id(key),
            self.task,
            self.image(row["image"]),
            {"image_id": row["id"]},
            turns=turns,
            references=(turns[-1].answer,),
        )


class GQA(Records):
    """GQA's dictionary of questions; the field `kind` is the question's structural type."""

    name = "gqa"
    roles = ("questions", "images")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from read_json(self.file).items()

    def _sample(self, key: Any, row: Any) -> Sample:
        fields = {
            "question": row["question"],
            "image_id": row["imageId"],
            "full_answer": row.get("fullAnswer", ""),
            "kind": row["types"]["structural"],
        }
        return Sample(self.id(key), self.task, self.image(f"{row['imageId']}.jpg"), fields, references=(row["answer"],))


class VSR(Records):
    """VSR's statements, one JSON object a line.  Option `words`: what stands for label 0 and for label 1."""

    name = "vsr"
    roles = ("statements", "images")
    settings = ("words",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        words = self.options.get("words")
        if not isinstance(words, list | tuple) or [type(word) for word in words] != [str, str]:
            raise ConfigError(f"{self.task}: options.words must be two words, for label 0 and label 1, in quotes.")
        for number, line in enumerate(read_lines(self.file), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{self.file}, line {number}: not valid JSON ({error.msg}).") from None

    def _sample(self, key: Any, row: Any) -> Sample:
        word = _chosen(self.options["words"], int(row["label"]), "label")
        fields = {"statement": row["caption"], "relation": row.get("relation", ""), "image_id": Path(row["image"]).stem}
        return Sample(self.id(key), self.task, self.image(row["image"]), fields, references=(str(word),))


class IconQA(Records):
    """IconQA's problems with choices in words; files.images is the folder of one split and sub-task.

    Option `split`: a key of `pid_splits.json`.
    """

    name = "iconqa"
    roles = ("problems", "splits", "images")
    settings = ("split",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        problems, splits = read_json(self.file), read_json(self.files["splits"])
        split = self.options.get("split", "choose_txt_test")
        if split not in splits:
            raise ConfigError(f"{self.files['splits']}: no split '{split}'.{did_you_mean(str(split), splits)}")
        for name in splits[split]:
            yield name, problems.get(str(name))

    def _sample(self, key: Any, row: Any) -> Sample:
        if row is None:
            raise DataError(f"it is in {self.files['splits']} and not among the problems")
        right = _chosen(row["choices"], row["answer"], "answer")
        fields = {"question": row["question"], "image_id": key, "grade": row.get("grade", "")}
        return Sample(
            self.id(key),
            self.task,
            self.image(f"{key}/image.png"),
            fields,
            references=(right,),
            candidates=tuple(row["choices"]),
        )


READERS: dict[str, type[Records]] = {
    reader.name: reader for reader in (JsonLines, CocoCaptions, Karpathy, VQA, AOKVQA, LLaVA, GQA, VSR, IconQA)
}


def open_records(section: TrainCard | EvalCard, root: Path, card: TaskCard) -> Records:
    """The records of one section of a card, under `data.root`.

    Raises:
        ConfigError: an unknown reader, role or option.
        DataError: the root or a file is not there; says which, where it was expected and what to download.
    """
    reader, files = located(section, root, card)
    split = section.split if isinstance(section, EvalCard) else "train"
    return reader(files, section.options, card.key, split)


def located(section: TrainCard | EvalCard, root: Path, card: TaskCard) -> tuple[type[Records], dict[str, Path]]:
    """Reader and files of one section of a card, nothing of which is read yet; raises as `open_records`."""
    reader = lookup(READERS, section.reader, "reader")
    download = f" To download: {card.source}" if card.source else ""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data.root is '{root}', and there is no such folder; {card.key} is read from it.{download}")
    files = {role: root / name for role, name in section.files.items()}
    for role, path in files.items():
        if not path.exists():
            raise DataError(f"{card.key}: there is no '{path}' (files.{role} of the card, under data.root).{download}")
    return reader, files


def _chosen(choices: Sequence[Any], place: int, name: str) -> Any:
    """The choice that a field numbers; a negative number would silently count from the end."""
    if not 0 <= place < len(choices):
        raise DataError(f"'{name}' is {place}; it must be at least 0 and below {len(choices)}, the number of choices")
    return choices[place]


def _caption(text: str) -> str:
    """A caption on one line, without blanks at its ends."""
    return " ".join(text.split())


def _numbered(options: Mapping[str, Any], key: Any, row: Mapping[str, Any]) -> str:
    """A COCO picture's file name from its number."""
    return str(options.get("image", "%012d.jpg")) % int(row["image_id"])
