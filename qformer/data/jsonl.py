"""A user's own records: one JSON object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from qformer.data.records import Records, Settings
from qformer.data.streams import iterate_lines
from qformer.data.values import identifies, shown
from qformer.errors import ConfigError, DataError
from qformer.sample import FRAMES, Packed, Sample, Turn, Video
from qformer.videos import ENDINGS


class JsonLines(Records):
    """A user's own records, one JSON object a line.

    `{"id", "image" | "images" | "video", "instruction", "target": text or list, "candidates"?, "turns"?}`; `turns` is a
    list of `{"instruction", "answer"}` and stands for instruction and target.  Other keys become fields.  `video` is a
    file or a folder of frames; among `images` there may be video files, but a GIF is a picture there.  Option `kind`: a
    regular expression over the id whose first group becomes the field `kind`; option `frames`: how many of each video
    are looked at (4).
    """

    name = "jsonl"
    roles = ("records", "images")
    settings: ClassVar[Settings] = {"kind": None, "frames": FRAMES}
    numbering = "line"

    def _prepare(self) -> None:
        self.frames()
        try:
            self.kind = re.compile(self.options.get("kind", ""))
        except re.error as error:
            raise ConfigError(f"{self.task}: options.kind is not a regular expression: {error}.") from None

    def _read(self) -> Iterator[tuple[int, Any]]:
        first_line: dict[str, int] = {}
        place = 0
        for number, line in iterate_lines(self.file):
            if not line.strip():
                continue
            row = None
            try:
                row = json.loads(line)
                name = str(row["id"]) if isinstance(row, dict) and "id" in row else None
                if name in first_line:
                    told = f"the id '{name}' was given in line {first_line[name]} already; give each line its own"
                    self.broken[place] = self.at_fault(number, told)
                elif name is not None:
                    first_line[name] = number
            except json.JSONDecodeError as error:
                told = f"not valid JSON ({error.msg} at column {error.colno}); mend or remove the line"
                self.broken[place] = self.at_fault(number, told)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                self.broken[place] = self.at_fault(number, f"not JSON that can be read ({error}); mend or remove it")
            yield number, row
            place += 1

    def _sample(self, key: Any, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise DataError(
                "holds no JSON object; it must be of the form {'id': …, 'image': …, 'instruction': …, 'target': …}"
            )
        if not identifies(row["id"]):
            raise DataError(f"'id' is {shown(row['id'])}; it must be text or a number")
        given = next((name for name in ("video", "images", "image") if name in row), "image")
        if given == "video" and ("image" in row or "images" in row):
            raise DataError("it has a 'video' and pictures beside it; name all it is about as 'images'")
        names = row[given] if given == "images" else [row[given]]
        if not isinstance(names, list) or not names:
            raise DataError("'images' must be a list of at least one file name; give one name as 'image'")
        turns = tuple(Turn(_words(turn, "instruction"), _words(turn, "answer")) for turn in row.get("turns", ()))
        if turns:
            targets = [turns[-1].answer]
        else:
            _words(row, "instruction")
            targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
        candidates = row.get("candidates", [])
        for name, values in ((given, names), ("target", targets), ("candidates", candidates)):
            _all_words(values, name)
        if candidates and not set(targets) & set(candidates):
            listed = ", ".join(candidates)
            raise DataError(
                f"the target '{targets[0]}' is not among the candidates {listed}; add it to them, or mend it"
            )
        if len(set(candidates)) < len(candidates):
            raise DataError("a candidate is given twice; name each once")
        taken = {"image", "images", "video", "target", "candidates", "turns"}
        fields = {name: value for name, value in row.items() if name not in taken}
        if "kind" in self.options:
            found = self.kind.search(str(row["id"]))
            if found is None or not self.kind.groups:
                raise DataError(f"options.kind '{self.kind.pattern}' finds no group in the id '{row['id']}'")
            fields["kind"] = found[1]
        return Sample(
            id=str(row["id"]),
            task=self.task,
            images=tuple(self._seen(name, film="video" in row) for name in names),
            fields=fields,
            turns=turns,
            references=tuple(targets),
            candidates=tuple(candidates),
        )

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`: all pictures and videos of a record together."""
        given = next((name for name in ("video", "images") if name in row), "image")
        return row[given] if given == "images" else [row[given]]

    def _seen(self, name: str, *, film: bool) -> Path | Packed | Video:
        found = self.pictures.find(name)
        return Video(found, self.frames()) if film or name.lower().endswith(ENDINGS) else found


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
            raise DataError(f"'{name}' is empty; fill it, or remove the record")
