"""Tables of Hugging Face's hub, through `datasets`: a folder of parquet or Arrow files, or a hub id."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from qformer.data import ocr
from qformer.data.pictures import check_size
from qformer.data.records import Records, Settings
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
    - `keep`: values by column; rows that have others are left out.
    - `form`: `multiple_choice` makes the right choice the reference, as for A-OKVQA.
    - `separator`: what stands between the choices in a column that holds them as one text.
    - `pictures`: how the table of files.pictures is asked for, where pictures are in one of their own: `repository`,
      `revision`, `configuration`, `split` as above, its columns `id` and `image`.  The column for `image` then holds
      ids.
    - `ocr_tokens`: how many words of `ocr` are kept.

    Pictures are read from the column when they are looked at, or below files.images where the column holds names.
    Under files.ocr the words in pictures may stand apart, by `image_id`.
    """

    name = "columns"
    roles = ("table",)
    optional = ("images", "ocr", "pictures")
    elsewhere = ("table", "pictures")
    settings: ClassVar[Settings] = {
        "columns": None, "per": "row", "repository": None, "revision": None, "configuration": None, "split": "train",
        "form": "direct_answer", "ocr_tokens": ocr.MOST, "drop": None, "keep": None, "separator": None,
        "pictures": None,
    }  # fmt: skip

    def _prepare(self) -> None:
        columns = self.options.get("columns")
        if not isinstance(columns, Mapping) or "image" not in columns:
            raise ConfigError(f"{self.task}: options.columns must say which column is for what, and name an 'image'.")
        self.columns = {str(use): str(column) for use, column in columns.items()}
        self._last: tuple[int, str] = (-1, "")
        self.form = self.option("form", ("direct_answer", "multiple_choice"))
        self.keep = self.options.get("keep") or {}
        if not isinstance(self.keep, Mapping):
            raise ConfigError(f"{self.task}: options.keep is {self.keep!r}; it takes values by column.")
        named = {f"columns.{use}": column for use, column in self.columns.items()}
        named |= {"drop": self.options["drop"]} if "drop" in self.options else {}
        _check_columns(self.file, self.table, named | {f"keep.{column}": column for column in self.keep})
        if ("pictures" in self.files) != ("pictures" in self.options):
            raise ConfigError(
                f"{self.task}: pictures in a table of their own take both files.pictures and options.pictures."
            )

    def sources(self) -> dict[str, Path]:
        """What the table is read from: the folder, or files that the hub's client keeps; and the words beside it."""
        found = dict(self.files)
        for role, table in (("table", self.table), ("pictures", self.gallery)):
            if role in found and not found[role].is_dir():
                kept = {f"{role} {number}": Path(each["filename"]) for number, each in enumerate(table.cache_files)}
                if not kept:
                    return {}
                found = {other: path for other, path in found.items() if other != role} | kept
        return found

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(self._rows())

    def _rows(self) -> Iterator[tuple[Any, Any]]:
        per, most = self.option("per", ("row", "item", "answer")), ocr.limit(self.options)
        written, drop = ocr.read_side_file(self.files.get("ocr"), most), self.options.get("drop")
        packed = _holds_pictures(self.table, self.columns["image"])
        wanted = {use: column for use, column in self.columns.items() if use != "image" or not packed}
        sifted = (*wanted.values(), drop, *self.keep)
        heads = list(dict.fromkeys(column.partition(".")[0] for column in sifted if column))
        hung = self._hung()
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
                if hung is not None:
                    row["hung"] = hung.get(str(row["image"]))
                kept = all(cells[column] == value for column, value in self.keep.items())
                if kept and not (drop and cells[drop]):
                    yield from _split(row.get("id", place), row, per)
                place += 1

    def _hung(self) -> dict[str, int] | None:
        """Rows of the pictures' own table by the id they have there; None where there is no such table."""
        if self.gallery is None:
            return None
        ids = self.gallery[self.options["pictures"]["id"]]
        return {str(name): place for place, name in enumerate(ids)}

    @functools.cached_property
    def table(self) -> Any:
        """The table, mapped into memory; pictures in it stay as they are stored."""
        return _undecoded(_load(self.file, self.options, self.task))

    @functools.cached_property
    def gallery(self) -> Any:
        """The table of pictures, where they are in one of their own."""
        if "pictures" not in self.files:
            return None
        given = self.options["pictures"]
        if not isinstance(given, Mapping) or not {"id", "image"} <= set(given):
            raise ConfigError(f"{self.task}: options.pictures must name the columns 'id' and 'image'.")
        table = _undecoded(_load(self.files["pictures"], given, self.task))
        _check_columns(self.files["pictures"], table, {f"pictures.{use}": given[use] for use in ("id", "image")})
        return table

    @functools.cached_property
    def shown(self) -> Any:
        """The column of pictures alone."""
        if self.gallery is not None:
            return self.gallery.select_columns([self.options["pictures"]["image"]])
        return self.table.select_columns([self.columns["image"]])

    def _picture(self, row: Mapping[str, Any]) -> tuple[Path | Packed, ...]:
        if "hung" in row:
            if row["hung"] is None:
                raise DataError(f"its picture '{row['image']}' is not in {self.files['pictures']}; fetch both again")
            return (Cell(self.files["pictures"], str(row["hung"]), self.shown, row["hung"], named=True),)
        if "image" in row:
            return self.image(row["image"])
        name = row.get("image_id")
        named = name is not None
        return (Cell(self.file, str(name if named else row["place"]), self.shown, row["place"], named),)

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`; a table that names no pictures has them read, each row's once."""
        named = next((row[name] for name in ("hung", "image", "image_id") if row.get(name) is not None), None)
        if named is not None or "hung" in row or "image" in row:
            return named
        place = row["place"]
        if self._last[0] != place:
            (cell,) = self._picture(row)
            self._last = (place, cell.identity)  # type: ignore[union-attr]  # pictures in the table are cells
        return self._last[1]

    def looks_inside(self) -> bool:
        """As `Records.looks_inside`."""
        packed = self.gallery is None and _holds_pictures(self.table, self.columns["image"])
        return packed and "image_id" not in self.columns

    def _sample(self, key: Any, row: Any) -> Sample:
        picture = self._picture(row)
        fields = {name: _line(value) for name, value in row.items() if name not in (*OWN, "place", "hung")}
        fields |= {"image_id": row.get("image_id", row["place"]), "ocr": row["ocr"]}
        if "question" in row:
            fields["question"] = text(row["question"], "'question'")
        choices = answers(self._parted(row["choices"]), "'choices'") if "choices" in row else ()
        if "captions" in row:
            said = answers(_listed(row["captions"]), "'captions'")
        elif choices and self.form == "multiple_choice":
            said = (chosen(choices, row["right"], "right"),)
        else:
            said = answers(_listed(row["answers"]), "'answers'", blank=True)
            if "separator" in self.options and not set(said) & set(choices):
                raise DataError(
                    f"its answer '{said[0]}' is not among its choices {', '.join(choices)}; a choice may hold the "
                    f"separator"
                )
        return Sample(self.id(key), self.task, picture, fields, references=said, candidates=choices)

    def _parted(self, choices: Any) -> Any:
        """A list of choices, also where the column holds them as one text."""
        if isinstance(choices, str) and "separator" in self.options:
            return [each for each in choices.split(str(self.options["separator"])) if each.strip()]
        return _listed(choices)


@dataclass(frozen=True, eq=False)
class Cell(Packed):
    """A picture in a column of a table, which may have a row for each question about it.

    Two cells are equal where they hold the same picture: by its id, if the table tells it, else by its bytes.
    """

    column: Any = field(default=None, repr=False)
    row: int = field(default=0, repr=False)
    named: bool = field(default=False, repr=False)
    """Whether `name` is the picture's id, and not its row's number."""

    @property
    def identity(self) -> str:
        """As `Packed.identity`."""
        return self.name if self.named else self._content

    @functools.cached_property
    def _content(self) -> str:
        try:
            return f"sha256:{hashlib.sha256(self.read()).hexdigest()[:16]}"
        except DataError:  # which is said when it is opened
            return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and (self.container, self.identity) == (other.container, other.identity)

    def __hash__(self) -> int:
        return hash((self.container, self.identity))

    def read(self) -> bytes:
        """As `Packed.read`."""
        (value,) = self.column[self.row].values()
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes):
            raise DataError(f"the picture {self} is {shown(content)} where a file's bytes belong")
        check_size(len(content), str(self))
        return content


def _check_columns(file: Path, table: Any, columns: Mapping[str, str]) -> None:
    """Refuse a column that a table has not; columns by the option that names them."""
    known = table.column_names
    for option, column in columns.items():
        if str(column).partition(".")[0] not in known:
            raise DataError(
                f"{file}: there is no column '{column}' (options.{option}).{did_you_mean(str(column), known)}"
            )


def _line(value: Any) -> Any:
    """A text on one line, as the readers of official files have it."""
    return " ".join(value.split()) if isinstance(value, str) else value


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
