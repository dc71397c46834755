"""From samples to a model's answers, in batches; nothing is scored here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from qformer.cards import Decoding, EvalCard
from qformer.errors import DataError, did_you_mean
from qformer.evaluate.kept import Unfinished
from qformer.evaluate.metrics import METRICS
from qformer.evaluate.outcome import Answer
from qformer.evaluate.recipe import fingerprint
from qformer.processes import ALONE, Processes
from qformer.sample import Sample
from qformer.text import Rendered, Templates, candidates_of, render_eval

Advance = Callable[[int], None]
"""Is told how many more samples are done."""
ROUND = 32
"""Batches of each process after which all hear whether one has failed: the others stop then, and not at the end."""
KEPT = 100
"""Likeliest candidates that an answer keeps, unless the metric needs all: thousands for each question fill memory."""


class Model(Protocol):
    """What is scored: opens pictures itself, and raises DataError where one is broken."""

    language: Any
    """Its `profile` is a `qformer.text.Profile`, its `truncations` a `qformer.text.Truncations`."""

    def answer(self, samples: Sequence[Sample], instructions: Sequence[Rendered], decoding: Decoding) -> list[str]:
        """One generated answer per sample."""
        ...

    def rank_samples(
        self,
        samples: Sequence[Sample],
        instructions: Sequence[Rendered],
        candidates: Sequence[Sequence[str]],
        normalize: Literal["sum", "mean", "pmi"],
        end: bool,
    ) -> list[list[float]]:
        """Log-likelihoods of each sample's candidates, in their order."""
        ...


@dataclass(frozen=True)
class Question:
    """A sample, what the model is asked about it, and what it may choose from (empty where it generates)."""

    sample: Sample
    rendered: Rendered
    candidates: tuple[str, ...] = ()
    kind: str = ""
    """Its type, where the card tells questions apart."""

    @functools.cached_property
    def key(self) -> str:
        """A hash of what is asked: sample, pictures, words and choices."""
        pictures = [
            hashlib.sha256(each).hexdigest() if isinstance(each, bytes) else repr(each) for each in self.sample.images
        ]
        return fingerprint([self.sample.id, pictures, self.words, self.choices])

    @property
    def words(self) -> dict[str, Any]:
        """What is asked, as plain values."""
        return dataclasses.asdict(self.rendered)

    @property
    def choices(self) -> str:
        """A hash of the candidates."""
        return _of_candidates(self.candidates)


@functools.lru_cache(256)
def _of_candidates(candidates: tuple[str, ...]) -> str:
    return fingerprint(candidates)


@functools.lru_cache(256)
def _first_empty(candidates: tuple[str, ...]) -> int:
    """The number of the first candidate without words; 0 where each has some."""
    return next((number for number, each in enumerate(candidates, start=1) if not each.strip()), 0)


def question(card: EvalCard, templates: Templates, sample: Sample) -> Question:
    """A sample as it is asked.

    Raises:
        DataError: no answer to score against, no candidates to rank, or a field that template or card names is missing.
    """
    where = f"{sample.task}, sample '{sample.id}'"
    if not sample.references and METRICS[card.metric].scored:
        raise DataError(f"{where}: it has no answer to score against.")
    candidates = candidates_of(card, sample) if card.answer == "rank" else ()
    if card.answer == "rank" and not candidates:
        raise DataError(f"{where}: eval.answer is 'rank', and neither the record nor the card gives candidates.")
    if number := _first_empty(candidates):
        raise DataError(f"{where}: candidate {number} of {len(candidates)} is empty; mend or remove it.")
    kind = card.question_type
    if kind is not None and kind not in sample.fields:
        raise DataError(
            f"{where}: no field '{kind}' (eval.question_type of the card).{did_you_mean(kind, sample.fields)}"
        )
    rendered = render_eval(card, templates, sample)
    return Question(sample, rendered, candidates, "" if kind is None else str(sample.fields[kind]))


def predict(
    model: Model,
    card: EvalCard,
    questions: Sequence[Question],
    *,
    batch_size: int,
    on_error: Literal["fail", "skip"] = "fail",
    advance: Advance = lambda count: None,
    processes: Processes = ALONE,
    unfinished: Unfinished | None = None,
) -> list[Answer | DataError]:
    """A model's answer to each question, in order.

    Batches are the same for any number of processes, which share them, and after an interruption: a batch whose answers
    are all kept is not asked again, any other is asked whole.

    Args:
        model: answers and ranks.
        card: says how.
        questions: what is asked.
        batch_size: how many at a time.
        on_error: what a broken picture does.
        advance: is told how many more samples are done.
        processes: those that share the work; all have to call this, and all are given every answer.
        unfinished: where answers are kept.

    Raises:
        DataError: a picture is broken and `on_error` is "fail"; with "skip" the error stands in the answer's place.
    """
    answers: dict[str, Answer | DataError] = {}
    asked = 0

    def ask(starts: Sequence[int]) -> None:
        nonlocal asked
        for start in starts:
            batch = questions[start : start + batch_size]
            kept = [unfinished.kept(each.key, each.candidates) for each in batch] if unfinished else [None]
            if None not in kept:
                if processes.first:
                    answers.update(zip((each.key for each in batch), kept, strict=True))  # type: ignore[arg-type]
            else:
                if processes.share(asked):
                    given = _batch(model, card, batch, on_error, unfinished)
                    answers.update(zip((each.key for each in batch), given, strict=True))
                asked += 1
            advance(len(batch))

    def ask_together(starts: Sequence[int]) -> None:
        with getattr(model, "together", nullcontext)():  # processes that hold an LLM in parts have unlike batches
            ask(starts)

    starts = range(0, len(questions), batch_size)
    for begin in range(0, len(starts), ROUND * processes.count):
        processes.agreed(functools.partial(ask_together, starts[begin : begin + ROUND * processes.count]))
    found = dict(processes.gathered(list(answers.items())))
    return [found[each.key] for each in questions]


def _batch(
    model: Model,
    card: EvalCard,
    batch: Sequence[Question],
    on_error: Literal["fail", "skip"],
    unfinished: Unfinished | None,
) -> list[Answer | DataError]:
    given: Iterable[Answer | DataError] = (
        _whole(model, card, batch) if on_error == "fail" else _what_can_be(model, card, batch)
    )
    answers = list(given)
    sound = [place for place, answer in enumerate(answers) if isinstance(answer, Answer)]
    if unfinished is not None and sound:
        unfinished.add(
            [batch[place].key for place in sound],
            [batch[place].candidates for place in sound],
            [answers[place] for place in sound],  # type: ignore[misc]
        )
    return answers


def _what_can_be(model: Model, card: EvalCard, batch: Sequence[Question]) -> Iterator[Answer | DataError]:
    """A batch, or its questions one by one where one of them is broken."""
    try:
        yield from _whole(model, card, batch)
    except DataError as error:
        if len(batch) == 1:
            yield error
        else:
            for each in batch:
                yield from _what_can_be(model, card, [each])


def _whole(model: Model, card: EvalCard, batch: Sequence[Question]) -> list[Answer]:
    before = model.language.truncations.texts
    first, *others = _answers(model, card, batch)
    return [dataclasses.replace(first, cut=model.language.truncations.texts - before), *others]


def _answers(model: Model, card: EvalCard, batch: Sequence[Question]) -> list[Answer]:
    samples = [each.sample for each in batch]
    rendered = [each.rendered for each in batch]
    if card.answer == "generate":
        return [Answer(text) for text in model.answer(samples, rendered, card.decoding)]
    candidates = [each.candidates for each in batch]
    ranked = model.rank_samples(samples, rendered, candidates, card.normalize, card.end)
    keep = None if METRICS[card.metric].ranked else KEPT
    return [_best(each, likelihoods, keep) for each, likelihoods in zip(batch, ranked, strict=True)]


def _best(question: Question, likelihoods: Sequence[float], keep: int | None) -> Answer:
    """The most likely candidate, the first of equals, with so many of the likeliest in the candidates' order."""
    for candidate, value in zip(question.candidates, likelihoods, strict=True):
        if not math.isfinite(value):
            raise DataError(
                f"{question.sample.task}, sample '{question.sample.id}': the likelihood of '{candidate}' is {value}; "
                f"the model's weights or precision are not fit to be scored."
            )
    places = range(len(likelihoods))
    best = max(places, key=likelihoods.__getitem__)
    if keep is None or len(places) <= keep:
        return Answer(question.candidates[best], question.candidates, tuple(map(float, likelihoods)))
    kept = sorted(heapq.nlargest(keep, places, key=likelihoods.__getitem__))
    return Answer(
        question.candidates[best],
        tuple(question.candidates[place] for place in kept),
        tuple(float(likelihoods[place]) for place in kept),
    )
