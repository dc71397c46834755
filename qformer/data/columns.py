"""Tables of Hugging Face's hub, through `datasets`: a folder of parquet or Arrow files, or a hub id."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.data import ocr
from qformer.data.pictures import check_size
from qformer.data.records import Records
from qformer.data.values import answers, chosen, shown, text
from qformer.errors import ConfigError, DataError, did_you_mean
from qformer.sample import Packed, Sample

BATCH = 1000
"""Rows of a table that are read at a time."""
OWN = ("id", "image", "question", "answers", "captions", "choices", "right", "ocr")
"""What a column may be for; columns under other names become fields of the sample."""


class Columns(Records):
    """A table whose columns the card names.

    files.table is a folder under data.root that holds the table (a downloaded data set's repository, its parquet files
    alone, or what `save_to_disk` wrote); where it is not there, the hub id in option `repository` is asked for.
    Options:

    - `columns`: which column is for what: `id`, `image`, `question`, `answers`, `captions`, `choices`, `right` (the
      place of the right choice), `ocr`; others are fields of the sample.  A dot goes into a list of records
      (`answers.answer`).
    - `per`: `row`; `item`, a record of each caption, or of each question where `question` is a column of lists beside
      one of answers; `answer`, a record of each distinct answer.
    - `repository`, `revision`, `configuration`, `split`: what `datasets.load_dataset` is asked for.
    - `drop`: a column; rows that say true there are left out.
    - `form`: `multiple_choice` makes the right choice the reference, as for A-OKVQA.
    - `ocr_tokens`: how many words of `ocr` are kept.

    Pictures are read from the column when they are looked at, or below files.images where the column holds names.
    Under files.ocr the words in pictures may stand apart, by `image_id`.
    """

    name = "columns"
    roles = ("table",)
    optional = ("images", "ocr")
    elsewhere = ("table",)
    settings = ("columns", "per", "repository", "revision", "configuration", "split", "form", "ocr_tokens", "drop")

    def _prepare(self) -> None:
        columns = self.options.get("columns")
        if not isinstance(columns, Mapping) or "image" not in columns:
            raise ConfigError(f"{self.task}: options.columns must say which column is for what, and name an 'image'.")
        self.columns = {str(use): str(column) for use, column in columns.items()}
        self.form = self.option("form", ("direct_answer", "multiple_choice"))
        known = self.table.column_names
        for use, column in {
            **self.columns,
            **({"drop": self.options["drop"]} if "drop" in self.options else {}),
        }.items():
            if column.partition(".")[0] not in known:
                raise DataError(
                    f"{self.file}: there is no column '{column}' (options.columns.{use}).{did_you_mean(column, known)}"
                )

    def sources(self) -> dict[str, Path]:
        """What the table is read from: the folder, or files that the hub's client keeps; and the words beside it."""
        if self.file.is_dir():
            return dict(self.files)
        kept = {f"table {number}": Path(each["filename"]) for number, each in enumerate(self.table.cache_files)}
        return {role: path for role, path in self.files.items() if role != "table"} | kept if kept else {}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(self._rows())

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        per, most = self.option("per", ("row", "item", "answer")), ocr.limit(self.options)
        written, drop = ocr.read_side_file(self.files.get("ocr"), most), self.options.get("drop")
        packed = _holds_pictures(self.table, self.columns["image"])
        wanted = {use: column for use, column in self.columns.items() if use != "image" or not packed}
        heads = list(dict.fromkeys(column.partition(".")[0] for column in (*wanted.values(), drop) if column))
        place = 0
        for batch in self.table.select_columns(heads).iter(BATCH):
            for values in zip(*(batch[head] for head in heads), strict=True):
                cells = dict(zip(heads, values, strict=True))
                row = {use: _value(cells, column) for use, column in wanted.items()}
                try:
                    own = ocr.joined(_listed(row.get("ocr")), most)
                except DataError as error:
                    raise self.at_fault(row.get("id", place), str(error)) from None
                row |= {"place": place, "ocr": own or written.get(str(row.get("image_id")), "")}
                if not (drop and cells[drop]):
                    yield from _split(row.get("id", place), row, per)
                place += 1

    @functools.cached_property
    def table(self) -> Any:
        """The table, mapped into memory; pictures in it stay as they are stored."""
        return _undecoded(_load(self.file, self.options, self.task))

    @functools.cached_property
    def shown(self) -> Any:
        """The column of pictures alone."""
        return self.table.select_columns([self.columns["image"]])

    def _sample(self, key: Any, row: Any) -> Sample:
        picture: tuple[Path | Packed, ...]
        if "image" in row:
            picture = self.image(row["image"])
        else:
            picture = (Cell(self.file, str(row["place"]), self.shown, row["place"]),)
        fields = {name: value for name, value in row.items() if name not in (*OWN, "place")}
        fields |= {"image_id": row.get("image_id", row["place"]), "ocr": row["ocr"]}
        if "question" in row:
            fields["question"] = text(row["question"], "'question'")
        choices = answers(_listed(row["choices"]), "'choices'") if "choices" in row else ()
        if "captions" in row:
            said = answers(_listed(row["captions"]), "'captions'")
        elif choices and self.form == "multiple_choice":
            said = (chosen(choices, row["right"], "right"),)
        else:
            said = answers(_listed(row["answers"]), "'answers'", blank=True)
        return Sample(self.id(key), self.task, picture, fields, references=said, candidates=choices)


@dataclass(frozen=True)
class Cell(Packed):
    """A picture in a column of a table."""

    column: Any = field(default=None, compare=False, repr=False)
    row: int = field(default=0, compare=False)

    def read(self) -> bytes:
        """As `Packed.read`."""
        (value,) = self.column[self.row].values()
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes):
            raise DataError(f"the picture {self} is {shown(content)} where a file's bytes belong")
        check_size(len(content), str(self))
        return content


def _load(folder: Path, options: Mapping[str, Any], task: str) -> Any:
    """The table, from a folder or from the hub."""
    import datasets

    datasets.disable_progress_bars()
    repository = options.get("repository")
    split = options.get("split", "train")
    try:
        if (folder / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[split]
        if folder.is_dir():
            files = sorted(folder.rglob("*.parquet"))
            wanted = split.split("+")
            mine = [str(file) for file in files if {file.parent.name, file.name.partition("-")[0]} & set(wanted)]
            chosen_files = mine or ([] if _other_splits(files) else [str(file) for file in files])
            if not chosen_files:
                raise DataError(f"{folder}: there is no parquet file of the split '{split}' in it.")
            return datasets.load_dataset("parquet", data_files={"rows": chosen_files}, split="rows")
        if not repository:
            raise DataError(f"{task}: there is no '{folder}' (files.table of the card, under data.root).")
        return datasets.load_dataset(
            str(repository), options.get("configuration"), split=split, revision=options.get("revision")
        )
    except DataError:
        raise
    except Exception as error:  # the library, and the hub's client under it, raise many kinds
        reason = " ".join(str(error).split())
        where = folder if folder.is_dir() else f"{repository} on the hub, since there is no '{folder}'"
        raise DataError(f"{task}: the table cannot be read from {where} ({type(error).__name__}: {reason}).") from None


def _other_splits(files: list[Path]) -> bool:
    """Whether the files' names say what split they are of."""
    return any(file.name.partition("-")[0] in ("train", "validation", "val", "test", "testdev") for file in files)


def _undecoded(table: Any) -> Any:
    import datasets

    for name, kind in table.features.items():
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table.with_format(None)


def _holds_pictures(table: Any, column: str) -> bool:
    """Whether a column holds pictures themselves, and not the names of their files."""
    return getattr(table.features[column], "dtype", "") not in ("string", "large_string")


def _value(row: Mapping[str, Any], column: str) -> Any:
    """A cell; behind a dot, one field of each record in it."""
    head, dot, rest = column.partition(".")
    value = row[head]
    if not dot:
        return value
    if isinstance(value, Mapping):  # how some versions give a list of records: a record of lists
        return value.get(rest)
    return [each.get(rest) if isinstance(each, Mapping) else None for each in value or ()]


def _listed(value: Any) -> Any:
    """A list that some mirrors hold as text (`"['cab', 'taxi']"`), and a single text as a list of one."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return [value]


def _split(key: Any, row: dict[str, Any], per: str) -> Iterator[tuple[Any, Any]]:
    """The records of one row of the table."""
    name = "captions" if "captions" in row else "answers"
    said = _listed(row.get(name))
    if per == "row" or not isinstance(said, list) or not said:
        yield key, row
    elif per == "answer":
        for place, answer in enumerate({str(each): each for each in said}.values()):
            yield f"{key}/{place}", row | {name: [answer]}
    elif "question" in row:
        asked = row["question"]
        if not isinstance(asked, list) or len(asked) != len(said):
            yield key, row  # where its question is no text, asking for it says so
            return
        for place, (question, answer) in enumerate(zip(asked, said, strict=True)):
            yield f"{key}/{place}", row | {"question": question, name: [answer]}
    else:
        for place, each in enumerate(said):
            yield f"{key}/{place}", row | {name: [each]}
