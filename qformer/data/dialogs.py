"""The reader of Visual Dialog: each round of a dialogue is a question with a hundred answers to rank."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from qformer.cards import check_template
from qformer.data.records import Records, Settings
from qformer.data.streams import iterate_json, read_json
from qformer.data.values import answers, chosen, number, several, shown, text
from qformer.errors import ConfigError, DataError
from qformer.sample import Sample


class VisDial(Records):
    """Visual Dialog's file (`visdial_1.0_val.json`), whose dialogues number their questions and answers.

    Under files.dense may stand how fitting people found the candidates of one round a dialogue
    (`visdial_1.0_val_dense_annotations.json`).  Options:

    - `image`: the picture's file name with a place for its number.
    - `exchange`: how a question and its answer stand in the field `history`, over `question` and `answer`.
    - `between`: what stands between two of them.
    - `rounds`: `all`, `last`, or `dense`, those that files.dense has, whose field `relevance` is a number for each
      candidate.
    """

    name = "visdial"
    picture = "image_id"
    roles = ("dialogs", "images")
    optional = ("dense",)
    settings: ClassVar[Settings] = {"image": "%012d.jpg", "exchange": None, "between": " ", "rounds": "all"}

    def _prepare(self) -> None:
        self.exchange, self.between = self._text("exchange"), self._text("between")
        check_template(self.exchange, f"{self.task}: options.exchange")
        wanted = {name for _, name, _, _ in string.Formatter().parse(self.exchange) if name is not None}
        if not wanted <= {"question", "answer"}:
            raise ConfigError(
                f"{self.task}: options.exchange is '{self.exchange}'; it may name question and answer alone."
            )
        if self.option("rounds", ("all", "last", "dense")) == "dense" and "dense" not in self.files:
            raise ConfigError(f"{self.task}: options.rounds is 'dense', and there is no files.dense to say which.")

    def _text(self, name: str) -> str:
        """An option that takes a text."""
        value = self.options.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.task}: options.{name} is {value!r}; it takes a text in quotes.")
        return value

    def _read(self) -> Iterator[tuple[Any, Any]]:
        yield from self.once(self._rounds())

    def _rounds(self) -> Iterator[tuple[Any, Any]]:
        data = read_json(self.file)["data"]  # as a whole: what dialogues number may stand before them or behind
        rounds, judged = self.options["rounds"], self._judged()
        met = not judged
        for dialog in data["dialogs"]:
            said = [_spoken(data, exchange) for exchange in dialog["dialog"]]
            for place, exchange in enumerate(dialog["dialog"]):
                relevance = judged.get(f"{dialog['image_id']}/{place + 1}")
                met = met or relevance is not None
                if (rounds == "last" and place + 1 < len(said)) or (rounds == "dense" and relevance is None):
                    continue
                row = {"image_id": dialog["image_id"], "caption": dialog["caption"], "history": said[:place]}
                row |= {"question": said[place][0], "relevance": relevance, "gt_index": exchange.get("gt_index")}
                row["options"] = [_numbered(data["answers"], each) for each in exchange["answer_options"]]
                yield f"{dialog['image_id']}/{place + 1}", row
        if not met:
            raise DataError(
                f"{self.files['dense']}: none of its rounds is in {self.file}; is it the file of another split?"
            )

    def _judged(self) -> dict[str, Any]:
        """Relevances by dialogue and round."""
        if "dense" not in self.files:
            return {}
        rows = self.beside("dense", iterate_json(self.files["dense"]))
        return {f"{row['image_id']}/{row['round_id']}": _relevance(row) for row in rows}

    def _sample(self, key: Any, row: Any) -> Sample:
        if row["gt_index"] is None:
            raise DataError("there is no field 'gt_index': the answers of test are the server's, so score val")
        candidates = answers(row["options"], "'answer_options'")
        right = chosen(candidates, row["gt_index"], "gt_index")
        history = [
            self.exchange.format_map({"question": asked(question), "answer": text(answer, "an earlier answer")})
            for question, answer in row["history"]
        ]
        fields = {
            "question": asked(row["question"]),
            "history": self.between.join(history),
            "caption": text(row["caption"], "'caption'"),
            "image_id": row["image_id"],
            "round": str(key).rpartition("/")[2],
        }
        if row["relevance"] is not None:
            fields["relevance"] = _shares(row["relevance"])
            if len(fields["relevance"]) != len(candidates):
                raise DataError(f"it has {len(candidates)} candidates and {len(fields['relevance'])} relevances")
        picture = self.numbered(number(row, "image_id"))
        return Sample(self.id(key), self.task, picture, fields, references=(right,), candidates=candidates)


def asked(question: Any) -> str:
    """A question with the mark at its end that the file leaves out."""
    words = text(question, "a question")
    return words if words.endswith("?") else f"{words}?"


def _spoken(data: Mapping[str, Any], exchange: Mapping[str, Any]) -> list[Any]:
    """Question and answer of a round; in test the last one has no answer."""
    answer = exchange.get("answer")
    given = None if answer is None else _numbered(data["answers"], answer)
    return [_numbered(data["questions"], exchange["question"]), given]


def _numbered(words: Any, place: Any) -> Any:
    """A text by its number; None for a number of none, so that its record is named when it is asked for."""
    whole = isinstance(place, int) and not isinstance(place, bool)
    return words[place] if whole and 0 <= place < len(words) else None


def _shares(value: Any) -> list[float]:
    """How fitting each candidate was found, from 0 to 1."""
    given = several(value, "its relevances")
    for each in given:
        if isinstance(each, bool) or not isinstance(each, int | float) or not 0 <= each <= 1:
            raise DataError(f"one of its relevances is {shown(each)}; it must be a number from 0 to 1")
    return given


def _relevance(row: Mapping[str, Any]) -> Any:
    return row["gt_relevance"] if "gt_relevance" in row else row["relevance"]
