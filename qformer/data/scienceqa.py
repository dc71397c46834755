"""The reader of ScienceQA's problems with a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from qformer.data.records import Records, Settings
from qformer.data.streams import iterate_items, read_json
from qformer.data.values import RANKS, answers, chosen, offered, shown, words
from qformer.errors import ConfigError, DataError, did_you_mean
from qformer.sample import Sample


class ScienceQA(Records):
    """ScienceQA's problems that have a picture; files.images is the folder of `SPLIT/ID/image.png`.

    Options: `split`, a key of `pid_splits.json`; `context`, what stands in the field of that name: the `hint`,
    `hint_and_lecture`, or nothing (`none`); `rank`, what is chosen from: the choices' `texts`, their `letters`, or both
    (`lettered`).
    """

    name = "scienceqa"
    roles = ("problems", "splits", "images")
    settings: ClassVar[Settings] = {"split": "train", "context": "hint", "rank": "texts"}

    def _prepare(self) -> None:
        self.rank = self.option("rank", RANKS)
        self.context = {
            "hint": ("hint",),
            "hint_and_lecture": ("hint", "lecture"),
            "none": (),
        }[self.option("context", ("hint", "hint_and_lecture", "none"))]

    def _read(self) -> Iterator[tuple[Any, Any]]:
        splits = read_json(self.files["splits"])
        split = self.options["split"]
        if split not in splits:
            raise ConfigError(f"{self.files['splits']}: no split '{split}'.{did_you_mean(str(split), splits)}")
        wanted = {str(number) for number in splits[split]}
        problems = dict(self.first((each for each in iterate_items(self.file) if each[0] in wanted), "in the file"))
        numbered = ((number, problems.get(str(number))) for number in splits[split])
        yield from self.once((number, row) for number, row in numbered if row is None or row["image"] is not None)

    def _sample(self, key: Any, row: Any) -> Sample:
        if row is None:
            raise DataError(f"it is in {self.files['splits']} and not among the problems; fetch both files again")
        options, choices = offered(answers(row["choices"], "'choices'"), self.rank)
        fields = {
            "question": words(row, "question"),
            "context": " ".join(filter(None, (_optional(row, name) for name in self.context))),
            "image_id": key,
            "subject": row.get("subject", ""),
            **options,
        }
        return Sample(
            self.id(key),
            self.task,
            self.image(f"{words(row, 'split')}/{key}/{words(row, 'image')}"),
            fields,
            references=(chosen(choices, row["answer"], "answer"),),
            candidates=choices,
        )

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`: each problem has a picture of its own."""
        return key


def _optional(row: Any, name: str) -> str:
    """A text that a record may leave empty, on one line."""
    value = row.get(name) or ""
    if not isinstance(value, str):
        raise DataError(f"'{name}' is {shown(value)} where text belongs")
    return " ".join(value.split())
