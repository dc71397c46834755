"""What a model said to a question, and what scoring makes of the answers to many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.intp]
Value = Callable[[Places], float | None]
"""The score of the samples at some places (a place may be there twice); None where they have none."""


@dataclass(frozen=True)
class Answer:
    """What a model said: its words, and the log-likelihoods (nats) of the candidates they were chosen from."""

    text: str
    candidates: tuple[str, ...] = ()
    likelihoods: tuple[float, ...] = ()
    cut: int = 0
    """How many texts were cut to their limits before it was given; all those of a batch are counted at its first."""


@dataclass(frozen=True)
class Outcome:
    """One number per sample, and how those of any samples make the score of a set."""

    scores: list[float]
    value: Value
    beside: Mapping[str, Value] = field(default_factory=dict)
    """Further numbers of the same answers, by the name they are shown under."""

    @property
    def score(self) -> float | None:
        """The score of all samples."""
        return self.value(np.arange(len(self.scores)))


def averaged(scores: Sequence[float], beside: Mapping[str, Value] | None = None) -> Outcome:
    """A set's score as the mean over its samples."""
    return Outcome(list(map(float, scores)), mean_of(scores), beside or {})


def mean_of(scores: Sequence[float]) -> Value:
    """The mean of the numbers at some places."""
    values = np.asarray(scores, dtype=float)
    return lambda places: float(values[places].mean()) if len(places) else None
