"""What a run directory holds, read back: JSON files, JSON lines, and the scores of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer.charts import Mark
from qformer.errors import DataError
from qformer.evaluate.metrics import METRICS
from qformer.gallery import Record


def read_json(path: Path) -> dict[str, Any]:
    """The named values of a JSON file.

    Raises:
        DataError: it is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); score the run again to write it anew.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; it must hold named values.")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file; none if it is not there.  A last line cut off by a kill is left out.

    Raises:
        DataError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").splitlines()
    records = []
    for place, text in enumerate(texts, start=1):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif place < len(texts):
            raise DataError(f"{path}:{place}: not a JSON object; delete the line, or the file.")
    return records


@dataclass(frozen=True)
class Score:
    """What `eval/TASK.json` says, as the page needs it."""

    title: str
    metric: str
    split: str
    score: Mark | None
    baselines: Sequence[Mark]
    """From the hindmost in a plot to the foremost."""
    samples: int
    total: int
    broken: int
    percent: bool
    """Whether values are shares of one, shown as percentages."""
    recipe: str
    root: Path | None
    """Where the names of its pictures start."""
    by_type: Mapping[str, Mapping[str, Any]]
    """Score and number of samples of each question type."""
    predictions: Sequence[Record]

    @property
    def partial(self) -> bool:
        """Whether only a part of the set was scored."""
        return self.samples < self.total

    @property
    def marks(self) -> list[Mark]:
        """The score in front of its baselines."""
        return [*self.baselines, *([self.score] if self.score else [])]

    @classmethod
    def read(cls, path: Path) -> Score:
        """From a score file and the predictions beside it.

        Raises:
            DataError: one of them is not what evaluation writes.
        """
        raw = read_json(path)
        try:
            marks = [_mark(kind, raw[kind]) for kind in ("chance", "most_frequent", "shuffled")]
            return cls(
                title=raw["title"],
                metric=raw["metric"],
                split=raw["split"],
                score=_mark("score", raw),
                baselines=[mark for mark in marks if mark],
                samples=raw["samples"],
                total=raw["of"],
                broken=raw["broken"],
                percent=METRICS[raw["metric"]].percent if raw["metric"] in METRICS else True,
                recipe=raw["recipe"],
                root=Path(raw["root"]) if "root" in raw else None,
                by_type=raw["by_type"],
                predictions=read_lines(path.with_name(f"{path.stem}.predictions.jsonl")),
            )
        except KeyError as error:
            raise DataError(f"{path}: has no {error}; score the set again to write it anew.") from None

    def shown(self, value: float) -> str:
        """A value in the unit of the metric."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"


def _mark(kind: str, entry: Mapping[str, Any] | None) -> Mark | None:
    return Mark(kind, entry["score"], *entry["interval"]) if entry and entry["score"] is not None else None
