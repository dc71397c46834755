"""Baselines: shuffled pictures and the most frequent answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qformer.errors import DataError
from qformer.evaluate.baselines import blindly, most_frequent, shuffled_pictures
from qformer.evaluate.metrics import METRICS
from qformer.evaluate.outcome import Answer, Outcome
from qformer.evaluate.predict import Question
from qformer.sample import Sample
from qformer.text import Rendered


def about(*pictures: str, name: str = "", references: tuple[str, ...] = ()) -> Sample:
    return Sample(name or "/".join(pictures), "set", tuple(map(Path, pictures)), references=references)


@pytest.mark.parametrize("size", range(2, 51))
@pytest.mark.parametrize("questions", [1, 3])
def test_nobody_keeps_their_own_picture(size: int, questions: int) -> None:
    samples = [about(f"p{place % size}", name=str(place)) for place in range(size * questions - questions // 2)]
    for seed in range(4):
        given = shuffled_pictures(samples, seed)
        assert all(theirs != sample.images for theirs, sample in zip(given, samples))
        assert set(given) == {sample.images for sample in samples}


def test_a_picture_with_most_of_the_questions_is_no_obstacle() -> None:
    samples = [about("a", name=str(place)) for place in range(9)] + [about("b", name="9")]
    assert shuffled_pictures(samples, 0) == [(Path("b"),)] * 9 + [(Path("a"),)]


def test_each_picture_is_seen_once_where_each_has_one_question() -> None:
    samples = [about(f"p{place}") for place in range(100)]
    assert set(Counter(shuffled_pictures(samples, 0)).values()) == {1}


def test_the_shuffling_is_a_function_of_its_key() -> None:
    samples = [about(f"p{place}") for place in range(30)]
    assert shuffled_pictures(samples, 1) == shuffled_pictures(samples, 1)
    assert shuffled_pictures(samples, 1) != shuffled_pictures(samples, 2)


def test_the_shuffling_does_not_depend_on_where_the_data_is() -> None:
    here = [about(f"/here/p{place}", name=str(place)) for place in range(30)]
    there = [about(f"/there/p{place}", name=str(place)) for place in range(30)]
    names = [[images[0].name for images in shuffled_pictures(samples, 1)] for samples in (here, there)]
    assert names[0] == names[1]


def test_records_of_several_pictures_get_as_many_others() -> None:
    samples = [about("a", "b"), about("b", "c"), about("d"), about("c", "a"), about("e", "f", "g")]
    for seed in range(10):
        for sample, given in zip(samples, shuffled_pictures(samples, seed)):
            assert len(given) == len(sample.images)
            assert not set(given) & set(sample.images)


def test_too_few_other_pictures_are_given_more_than_once() -> None:
    given = shuffled_pictures([about("a", "b", "c"), about("d")], 0)
    assert given[0] == (Path("d"),) * 3
    assert given[1][0] in {Path("a"), Path("b"), Path("c")}


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(DataError, match=r"set: all samples to score are about one picture.* score more samples, or"):
        shuffled_pictures([about("a", name="0"), about("a", name="1")], 0)


def test_the_most_frequent_answer_is_counted_by_type() -> None:
    samples = [about("a", references=(word,)) for word in ("red", "red", "yes", "no", "no", "blue")]
    assert most_frequent(samples, ["c", "c", "y", "y", "y", "c"]) == ["red", "red", "no", "no", "no", "red"]
    assert most_frequent(samples, [""] * 6) == ["red"] * 6  # the first met of equals


def test_every_annotator_counts() -> None:
    samples = [
        about("a", references=("red", "red", "red")),
        about("b", references=("blue",)),
        about("c", references=("blue",)),
    ]
    assert most_frequent(samples, ["", "", ""]) == ["red"] * 3


def chosen_blindly(metric: str, truths: Sequence[tuple[str, ...]], *choices: tuple[str, ...], **options: Any) -> Any:
    """Chance and the unreachable share, and how many answers were scored; the last vocabulary is everybody's."""
    given, scored = {**METRICS[metric].options, **options}, 0

    def score(answers: Sequence[Answer], samples: Sequence[Sample]) -> Outcome:
        nonlocal scored
        scored += len(answers)
        return METRICS[metric].score(answers, samples, given)

    questions = [
        Question(about("a", references=truth), Rendered("q"), choices[min(place, len(choices) - 1)])
        for place, truth in enumerate(truths)
    ]
    reads = METRICS[metric].reads
    return *blindly(questions, score, reads(given) if reads else None), scored


@pytest.mark.parametrize(
    ("metric", "options", "truths", "choices", "chance", "unreachable"),
    [
        ("accuracy", {}, [("a",), ("c", "b"), ("c",)], ("a", "b"), 1 / 3, 1 / 3),
        ("accuracy", {"normaliser": "lower"}, [("Carrot",)], ("carrot", "pea"), 1 / 2, 0),
        ("accuracy", {"labels": {"yes": "true", "no": "false"}}, [("true",)], ("yes", "no", "true", "false"), 1 / 2, 0),
        ("exact_match", {"normaliser": "vqa"}, [("two",), ("the dog",)], ("2", "Dog", "dog"), 1 / 2, 0),
        ("ivqa_accuracy", {}, [("Carrot",), ("Pea", "pea.")], ("carrot", "pea"), (1 / 4 + 1 / 2) / 2, 0),
        ("vqa_accuracy", {}, [("Two", *["2"] * 9), ("red",) * 10], ("two", "blue"), 1 / 4, 1 / 2),
    ],
)
def test_a_truth_is_reached_by_whatever_the_metric_counts_as_right(
    metric: str, options: Any, truths: Any, choices: tuple[str, ...], chance: float, unreachable: float
) -> None:
    found = chosen_blindly(metric, truths, choices, **options)
    assert found[:2] == (pytest.approx(chance), pytest.approx(unreachable))


def test_every_question_has_its_own_candidates() -> None:
    assert chosen_blindly("accuracy", [("a",), ("b",), ("c",)], ("a",), ("x",), ("c", "d")) == (0.5, 1 / 3, 2)


def test_a_large_vocabulary_is_read_once_and_its_right_words_alone_are_scored() -> None:
    words = tuple(f"word {place}" for place in range(3000))
    chance, unreachable, scored = chosen_blindly("accuracy", [(word,) for word in words], words, normaliser="vqa")
    assert (chance, unreachable, scored) == (pytest.approx(1 / 3000), 0, 3000)
