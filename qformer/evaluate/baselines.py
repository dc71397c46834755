"""What a score is worth: the same with other samples' pictures, and what the most frequent answer would reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from pathlib import Path

from qformer import keyed
from qformer.errors import DataError
from qformer.evaluate.outcome import Answer, Outcome
from qformer.evaluate.predict import Question
from qformer.sample import Packed, Sample, Video

Pictures = tuple[Path | bytes | Packed | Video, ...]


def shuffled_pictures(samples: Sequence[Sample], *key: object) -> list[Pictures]:
    """Other samples' pictures for every sample: a keyed derangement, so that nobody keeps a picture of its own.

    The distinct records of pictures are put on a ring in an order keyed by the ids of their first samples; each sample
    gets the next ones on the ring, as many as it has, its own left out.  Samples that share a picture get the same
    other one, so a set of one picture a sample keeps how often each picture is seen.

    Raises:
        DataError: there is no other picture to give.
    """
    first: dict[Pictures, str] = {}
    for sample in samples:
        first.setdefault(sample.images, sample.id)
    ring = sorted(first, key=lambda images: keyed.keyed_hash("shuffled", *key, first[images]))
    swapped: dict[Pictures, Pictures] = {}
    for place, own in enumerate(ring):
        following = (ring[(place + step) % len(ring)] for step in range(1, len(ring)))
        others = tuple(islice((picture for images in following for picture in images if picture not in own), len(own)))
        if own and not others:
            raise DataError(
                f"{samples[0].task}: all samples to score are about one picture, so there is none to shuffle it with; "
                f"score more samples, or leave the shuffled baseline out."
            )
        swapped[own] = (others * len(own))[: len(own)]
    return [swapped[sample.images] for sample in samples]


def most_frequent(samples: Sequence[Sample], types: Sequence[Hashable]) -> list[str]:
    """For every sample the reference that is most frequent among samples of its type (the first met of equals)."""
    best = {kind: counter.most_common(1)[0][0] for kind, counter in _counts(samples, types).items()}
    return [best[kind] for kind in types]


def by_frequency(questions: Sequence[Question], types: Sequence[Hashable]) -> list[Answer]:
    """For every question its candidates in the order of how often they are right in questions of its type."""
    counts = _counts([each.sample for each in questions], types)
    answers = []
    for each, kind in zip(questions, types, strict=True):
        often = tuple(float(counts[kind][candidate]) for candidate in each.candidates)
        answers.append(Answer(each.candidates[often.index(max(often))], each.candidates, often))
    return answers


def _counts(samples: Sequence[Sample], types: Sequence[Hashable]) -> dict[Hashable, Counter[str]]:
    counts: dict[Hashable, Counter[str]] = {}
    for sample, kind in zip(samples, types, strict=True):
        counts.setdefault(kind, Counter()).update(sample.references)
    return counts


def blindly(
    questions: Sequence[Question],
    score: Callable[[Sequence[Answer], Sequence[Sample]], Outcome],
    read: Callable[[str], str] | None,
) -> tuple[float, float]:
    """What choosing blindly among each question's candidates reaches on average, and the share of questions none of
    whose candidates scores anything: no ranking could get them right.

    Thousands of questions share a vocabulary of thousands, so it is read once, and where `read` says which of its words
    may score (`Metric.reads`), those alone are scored.
    """
    vocabularies: dict[int, dict[str, list[str]]] = {}  # by identity: questions hold them all
    found: dict[tuple[int, tuple[str, ...]], float] = {}
    total, missed = 0.0, 0
    for each in questions:
        mine = vocabularies.setdefault(id(each.candidates), {})
        for candidate in () if mine else each.candidates:
            mine.setdefault(read(candidate) if read else candidate, []).append(candidate)
        group = (id(each.candidates), each.sample.references)
        if group not in found:
            right = dict.fromkeys(map(read, each.sample.references)) if read else mine
            alike = [mine[word] for word in right if word in mine]
            scores = score([Answer(words[0]) for words in alike], [each.sample] * len(alike)).scores
            reached = sum(len(words) * value for words, value in zip(alike, scores, strict=True))
            found[group] = reached / len(each.candidates)
        total += found[group]
        missed += not found[group]
    return total / len(questions), missed / len(questions)
