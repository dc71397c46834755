"""Readers, one per on-disk shape: official files in, `Sample`s out.

A reader parses its annotation files when it is opened and makes one record into a `Sample` when it is asked for; no
picture is touched here.  The table `READERS` at the end is closed: cards name its keys.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qformer.cards import EvalCard, TaskCard, TrainCard
from qformer.errors import ConfigError, DataError, did_you_mean, lookup
from qformer.sample import Sample, Turn


class Records(ABC):
    """The records of one set, in the file's order.

    `rows` holds them as parsed, each with its key; `broken` the errors of those that were found broken at opening,
    by their place: they keep it, and asking for one raises its error.
    """

    roles: ClassVar[tuple[str, ...]]
    """Names under `files` in a card; the first is the file that messages name."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Names that `options` in a card may have."""
    numbering: ClassVar[str] = "record"
    """What a record's key counts, in messages."""

    def __init__(self, files: Mapping[str, Path], options: Mapping[str, Any], task: str, split: str = "train"):
        """Read the files.

        Args:
            files: paths by role.
            options: the reader's own settings.
            task: the card's key; filed in each sample, and first part of its id.
            split: second part of the ids.

        Raises:
            ConfigError: a role or an option is missing or unknown.
            DataError: a file is not of the form expected, or holds no record.
        """
        reader = f"{task}: reader '{READER_NAMES[type(self)]}'"
        for role in self.roles:
            if role not in files:
                raise ConfigError(f"{reader} needs files.{role}; it takes {', '.join(self.roles)}.")
        for given, known, where in ((files, self.roles, "files"), (options, self.settings, "options")):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{reader} has no {where}.{name}.{did_you_mean(name, known)}")
        self.files, self.options, self.task, self.split = dict(files), dict(options), task, split
        self.file = self.files[self.roles[0]]
        self.broken: dict[int, DataError] = {}
        try:
            self.rows = list(self._read())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{self.file}: {_what_is_wrong(error)}; is it the file that the card means?") from None
        if not self.rows:
            raise DataError(f"{self.file}: holds no record.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Sample:
        """One record.

        Raises:
            DataError: it is broken; names file and record.
        """
        key, row = self.rows[place]
        if place % len(self.rows) in self.broken:
            raise self.broken[place % len(self.rows)]
        try:
            return self._sample(key, row)
        except DataError as error:
            raise DataError(f"{self.file}, {self.numbering} {key}: {error}.") from None
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{self.file}, {self.numbering} {key}: {_what_is_wrong(error)}.") from None

    @abstractmethod
    def _read(self) -> Iterator[tuple[Any, Any]]:
        """Key and content of every record."""

    @abstractmethod
    def _sample(self, key: Any, row: Any) -> Sample:
        """One record as a sample; may raise what Python raises at a missing or misformed field."""

    def id(self, key: Any) -> str:
        """A name that is unique over all sets and splits."""
        return f"{self.task}/{self.split}/{key}"

    def image(self, name: str) -> tuple[Path, ...]:
        """The one picture of a record, in the folder of the role `images`."""
        return (self.files["images"] / name,)

    def option(self, name: str, known: Sequence[str]) -> str:
        """An option that takes one of a few words, the first of them by default."""
        value = self.options.get(name, known[0])
        if value not in known:
            raise ConfigError(f"{self.task}: options.{name} is '{value}'; it takes {' or '.join(known)}.")
        return str(value)


def open_records(section: TrainCard | EvalCard, root: Path, card: TaskCard) -> Records:
    """The records of one section of a card, under `data.root`.

    Raises:
        ConfigError: an unknown reader, role or option.
        DataError: the root or a file is not there; says which, where it was expected and what to download.
    """
    reader = lookup(READERS, section.reader, "reader")
    download = f" To download: {card.source}" if card.source else ""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data.root is '{root}', and there is no such folder; {card.key} is read from it.{download}")
    files = {role: root / name for role, name in section.files.items()}
    for role, path in files.items():
        if not path.exists():
            raise DataError(f"{card.key}: there is no '{path}' (files.{role} of the card, under data.root).{download}")
    split = section.split if isinstance(section, EvalCard) else "train"
    return reader(files, section.options, card.key, split)


class JsonLines(Records):
    """A user's own records, one JSON object a line.

    `{"id", "image" | "images", "instruction", "target": text or list, "candidates"?, "turns"?}`; `turns` is a list of
    `{"instruction", "answer"}` and stands for instruction and target.  Other keys become fields.  Option `kind`: a
    regular expression over the id whose first group becomes the field `kind`.
    """

    roles = ("records", "images")
    settings = ("kind",)
    numbering = "line"

    def _read(self) -> Iterator[tuple[int, Any]]:
        try:
            self.kind = re.compile(self.options.get("kind", ""))
        except re.error as error:
            raise ConfigError(f"{self.task}: options.kind is not a regular expression: {error}.") from None
        first_line: dict[str, int] = {}
        place = 0
        for number, line in enumerate(_lines(self.file), 1):
            if not line.strip():
                continue
            row = None
            try:
                row = json.loads(line)
                name = str(row["id"]) if isinstance(row, dict) and "id" in row else None
                if name in first_line:
                    self._break(place, number, f"the id '{name}' was given in line {first_line[name]} already")
                elif name is not None:
                    first_line[name] = number
            except json.JSONDecodeError as error:
                self._break(place, number, f"not valid JSON ({error.msg} at column {error.colno})")
            yield number, row
            place += 1

    def _break(self, place: int, number: int, problem: str) -> None:
        self.broken[place] = DataError(f"{self.file}, line {number}: {problem}.")

    def _sample(self, key: Any, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise DataError(
                "holds no JSON object; it must be of the form {'id': …, 'image': …, 'instruction': …, 'target': …}"
            )
        names = row["images"] if "images" in row else [row["image"]]
        if not isinstance(names, list) or not names:
            raise DataError("'images' must be a list of at least one file name; give one name as 'image'")
        turns = tuple(Turn(_words(turn, "instruction"), _words(turn, "answer")) for turn in row.get("turns", ()))
        if turns:
            targets = [turns[-1].answer]
        else:
            _words(row, "instruction")
            targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
        candidates = row.get("candidates", [])
        for name, values in (("images", names), ("target", targets), ("candidates", candidates)):
            _all_words(values, name)
        if candidates and not set(targets) & set(candidates):
            raise DataError(f"the target '{targets[0]}' is not among the candidates {', '.join(candidates)}")
        if len(set(candidates)) < len(candidates):
            raise DataError("a candidate is given twice")
        taken = {"image", "images", "target", "candidates", "turns"}
        fields = {name: value for name, value in row.items() if name not in taken}
        if "kind" in self.options:
            found = self.kind.search(str(row["id"]))
            if found is None or not self.kind.groups:
                raise DataError(f"options.kind '{self.kind.pattern}' finds no group in the id '{row['id']}'")
            fields["kind"] = found[1]
        return Sample(
            id=str(row["id"]),
            task=self.task,
            images=tuple(self.files["images"] / name for name in names),
            fields=fields,
            turns=turns,
            references=tuple(targets),
            candidates=tuple(candidates),
        )


class CocoCaptions(Records):
    """COCO's caption annotations (`captions_train2014.json`), and NoCaps, which has their form.

    Option `per`: `caption` makes a record of every caption, `image` one of every picture with all its captions.
    """

    roles = ("captions", "images")
    settings = ("per",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        content = _json(self.file)
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

    roles = ("captions", "images")
    settings = ("splits", "per")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        splits = self.options.get("splits", ["train", "restval"])
        per_caption = self.option("per", ("caption", "image")) == "caption"
        for picture in _json(self.file)["images"]:
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

    roles = ("questions", "annotations", "images")
    settings = ("image", "answer")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        annotations = {row["question_id"]: row for row in _json(self.files["annotations"])["annotations"]}
        for row in _json(self.file)["questions"]:
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

    roles = ("questions", "images")
    settings = ("image", "form", "difficult")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        self.form = self.option("form", ("direct_answer", "multiple_choice"))
        drop = self.option("difficult", ("keep", "drop")) == "drop"
        for row in _json(self.file):
            if not (drop and row["difficult_direct_answer"]):
                yield row["question_id"], row

    def _sample(self, key: Any, row: Any) -> Sample:
        right = (row["choices"][row["correct_choice_idx"]],)
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

    roles = ("conversations", "images")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from enumerate(_json(self.file))  # `id` repeats between conversations about one picture

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

    roles = ("questions", "images")

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from _json(self.file).items()

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

    roles = ("statements", "images")
    settings = ("words",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        if not isinstance(self.options.get("words"), (list, tuple)) or len(self.options["words"]) != 2:
            raise ConfigError(f"{self.task}: options.words must be two words, for label 0 and label 1, in quotes.")
        for number, line in enumerate(_lines(self.file), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{self.file}, line {number}: not valid JSON ({error.msg}).") from None

    def _sample(self, key: Any, row: Any) -> Sample:
        word = self.options["words"][int(row["label"])]
        fields = {"statement": row["caption"], "relation": row.get("relation", ""), "image_id": Path(row["image"]).stem}
        return Sample(self.id(key), self.task, self.image(row["image"]), fields, references=(str(word),))


class IconQA(Records):
    """IconQA's problems with choices in words; files.images is the folder of one split and sub-task.

    Option `split`: a key of `pid_splits.json`.
    """

    roles = ("problems", "splits", "images")
    settings = ("split",)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        problems, splits = _json(self.file), _json(self.files["splits"])
        split = self.options.get("split", "choose_txt_test")
        if split not in splits:
            raise ConfigError(f"{self.files['splits']}: no split '{split}'.{did_you_mean(str(split), splits)}")
        for name in splits[split]:
            yield name, problems.get(str(name))

    def _sample(self, key: Any, row: Any) -> Sample:
        if row is None:
            raise DataError(f"it is in {self.files['splits']} and not among the problems")
        right = row["choices"][row["answer"]]
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
    "jsonl": JsonLines,
    "coco_captions": CocoCaptions,
    "karpathy": Karpathy,
    "vqa": VQA,
    "aokvqa": AOKVQA,
    "llava": LLaVA,
    "gqa": GQA,
    "vsr": VSR,
    "iconqa": IconQA,
}
READER_NAMES = {reader: name for name, reader in READERS.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read as text: {error}.") from None


def _json(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as stream:
            return json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON ({error.msg} at line {error.lineno}); was the download cut short?"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read: {error}.") from None


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no field '{error.args[0]}'"
    return f"it is not of the form expected ({error})"


def _words(row: Mapping[str, Any], name: str) -> str:
    _all_words([row[name]], name)
    return str(row[name])


def _all_words(values: Any, name: str) -> None:
    if not isinstance(values, list) or (name == "target" and not values):
        raise DataError(f"'{name}' is {json.dumps(values, ensure_ascii=False)}; it must be text or a list of texts")
    for value in values:
        if not isinstance(value, str):
            shown = json.dumps(value, ensure_ascii=False)
            raise DataError(f"'{name}' holds {shown} where text belongs; put it in quotes")
        if not value.strip():
            raise DataError(f"'{name}' is empty")


def _caption(text: str) -> str:
    """A caption on one line, without blanks at its ends."""
    return " ".join(text.split())


def _numbered(options: Mapping[str, Any], key: Any, row: Mapping[str, Any]) -> str:
    """A COCO picture's file name from its number."""
    return str(options.get("image", "%012d.jpg")) % int(row["image_id"])
