"""What a run directory holds, read back: the scores of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.charts import Mark
from qformer.errors import DataError
from qformer.evaluate.files import read_json, read_lines
from qformer.evaluate.metrics import METRICS
from qformer.gallery import Record


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
    """Score, score with shuffled pictures, and number of samples of each question type."""
    predictions: Sequence[Record]
    beside: Mapping[str, float | None] = field(default_factory=dict)
    """Further numbers of the same answers."""
    step: int | None = None
    """Of the training, at the checkpoint that was scored."""
    task: str = ""
    role: str = "held_out"
    unreachable: float | None = None
    """The share of truths that are not among the candidates; None where there are none to rank."""

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
                beside=raw.get("beside", {}),
                step=(raw.get("model") or {}).get("step"),
                task=raw["task"],
                role=raw.get("role", "held_out"),
                unreachable=raw.get("unreachable"),
            )
        except KeyError as error:
            raise DataError(f"{path}: has no {error}; score the set again to write it anew.") from None

    def shown(self, value: float) -> str:
        """A value in the unit of the metric."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"


def _mark(kind: str, entry: Mapping[str, Any] | None) -> Mark | None:
    return Mark(kind, entry["score"], *entry["interval"]) if entry and entry["score"] is not None else None
