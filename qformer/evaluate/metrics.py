"""How answers are scored: strings and likelihoods in, numbers out.

A metric is a function and a line in `METRICS`.  Scores are shares of one, except CIDEr's, which is what papers print
over 100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformer import keyed
from qformer.cards import EvalCard
from qformer.errors import ConfigError, DataError, did_you_mean, lookup
from qformer.evaluate import captions, normalise
from qformer.evaluate.outcome import Answer, Outcome, Places, Value, averaged, mean_of
from qformer.sample import Sample

DRAWS = 1000
LEAST_ANSWERS = 3
"""With fewer annotators no answer could reach a VQA accuracy of 1; it takes one more where each is left out in turn."""
RECALLS = (1, 5, 10)
COUNTS = {"mean rank"}
"""Numbers beside a score that are no shares of one."""
Normaliser = Callable[[str], str]
NORMALISERS: dict[str, Normaliser] = {
    "none": str.strip,
    "lower": functools.lru_cache(1 << 16)(normalise.lower),
    "vqa": functools.lru_cache(1 << 16)(normalise.vqa),
}
VQA_NORMALISERS = ("official", "lavis", "evalai", "none")


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
    mean: bool = True
    """Whether a set's score is the mean of its samples' own."""
    fits: Callable[[Sample, Sequence[str], Mapping[str, Any]], None] = lambda sample, candidates, options: None
    """Refuses (DataError) a sample, with its candidates, that could not be scored; asked before the model is."""
    fits_together: Callable[[Sequence[Sample], Mapping[str, Any]], None] = lambda samples, options: None
    """Refuses samples that could not be scored together; likewise."""
    scored: bool = True
    """Whether there is a score at all; False where only a test server has the answers."""
    reads: Callable[[Mapping[str, Any]], Normaliser] | None = None
    """What its options make of an answer's words, where one that no reference is alike scores 0; None: less simple."""


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
        if not isinstance(options[name], type(default)) or isinstance(options[name], bool) > isinstance(default, bool):
            kinds = {dict: "a mapping of words", list: "a list of words", bool: "true or false", int: "a whole number"}
            kind = kinds[type(default)]
            raise ConfigError(f"the card '{key}': metric_options.{name} is {options[name]!r}; it takes {kind}.")
        if type(default) is int and options[name] < 1:
            raise ConfigError(f"the card '{key}': metric_options.{name} is {options[name]}; it must be at least 1.")
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
    alike = _as_words(options)
    return averaged(
        [
            float(alike(answer.text) in {alike(reference) for reference in sample.references})
            for answer, sample in zip(answers, samples, strict=True)
        ]
    )


def accuracy(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """1 where the chosen or generated answer is right.  `labels` maps words to classes (yes: "true"); a class stands
    for itself, and a generated answer of several words is read by its first if the whole is no label.  Where there are
    labels, the accuracy of each class stands beside.
    """
    read = _as_classes(options)
    truths = [set(map(read, sample.references)) for sample in samples]
    scores = [float(read(answer.text) in truth) for answer, truth in zip(answers, truths, strict=True)]
    return averaged(scores, _per_class(scores, [min(truth) for truth in truths]) if options["labels"] else {})


def _as_classes(options: Mapping[str, Any]) -> Normaliser:
    """Reads an answer as the class that it stands for, if it stands for one."""
    labels = {normalise.lower(word): normalise.lower(label) for word, label in options["labels"].items()}
    labels |= {label: label for label in labels.values()}
    alike = _as_words(options)

    def read(text: str) -> str:
        for word in (normalise.lower(text), normalise.first_word(text)) if labels else ():
            if word in labels:
                return labels[word]
        return alike(text)

    return read


def _as_words(options: Mapping[str, Any]) -> Normaliser:
    return NORMALISERS[options["normaliser"]]


def _per_class(scores: Sequence[float], classes: Sequence[str]) -> dict[str, Value]:
    """The mean of the numbers of each class."""

    def of(mine: NDArray[np.bool_]) -> Value:
        mean = mean_of(scores)
        return lambda places: mean(places[mine[places]])

    known = np.array(classes, dtype=object)
    return {f"accuracy of {name}": of(known == name) for name in sorted(set(classes))}


def vqa_accuracy(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """The mean over annotators of min(1, matches among the others / 3); or min(1, matches / 3) over all of them."""
    rule, leave_one_out = options["normaliser"], options["leave_one_out"]
    scores = []
    for answer, sample in zip(answers, samples, strict=True):
        _by_several(sample, (), options)
        said, truths = _vqa_normalised(answer.text, sample.references, rule)
        matches = truths.count(said)
        if leave_one_out:
            others = [min(1.0, (matches - (truth == said)) / 3) for truth in truths]
            scores.append(sum(others) / len(others))
        else:
            scores.append(min(1.0, matches / 3))
    return averaged(scores)


def _by_several(sample: Sample, candidates: Sequence[str], options: Mapping[str, Any]) -> None:
    least = LEAST_ANSWERS + bool(options["leave_one_out"])
    if len(sample.references) < least:
        raise DataError(
            f"{sample.task}, sample '{sample.id}': {len(sample.references)} reference answers, and vqa_accuracy "
            f"needs at least {least} (the sets it is made for have ten); use exact_match."
        )


def ivqa_accuracy(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """min(1, matches / `needed`) over all annotators, both sides normalised: iVQA's accuracy with two of five."""
    alike = _as_words(options)
    return averaged(
        [
            min(1.0, [alike(truth) for truth in sample.references].count(alike(answer.text)) / options["needed"])
            for answer, sample in zip(answers, samples, strict=True)
        ]
    )


def _vqa_normalised(said: str, truths: Sequence[str], rule: str) -> tuple[str, list[str]]:
    """An answer and its references as a scorer compares them.

    official: both normalised, but neither where all annotators agree.  lavis: the answer always, the references only
    in their punctuation and only where annotators differ (so "two" or "a dog" can never be met, nor can a reference
    with a blank at its end).  evalai: both, always.
    """
    if rule == "lavis":
        differ = len(set(truths)) > 1
        return normalise.vqa(said), [normalise.without_punctuation(truth) if differ else truth for truth in truths]
    said, truths = normalise.plain(said), [normalise.plain(truth) for truth in truths]
    if rule == "official" and len(set(truths)) > 1:
        return normalise.vqa(said), [normalise.vqa(truth) for truth in truths]
    if rule == "evalai":
        return normalise.evalai(said), [normalise.evalai(truth) for truth in truths]
    return said, truths


def submission(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """No score: the answers are a test server's, and what is written for it is in `evaluate/submission.py`."""
    return Outcome([0.0] * len(answers), lambda places: None)


# -- captions ---------------------------------------------------------------------------------------------------------


def _has_words(sample: Sample, candidates: Sequence[str], options: Mapping[str, Any]) -> None:
    if not any(letter.isalnum() for reference in sample.references for letter in reference):
        raise DataError(
            f"{sample.task}, sample '{sample.id}': none of its {len(sample.references)} reference captions holds a "
            f"word, so there is nothing to compare an answer with; mend the record."
        )


# -- likelihoods ------------------------------------------------------------------------------------------------------


def auroc(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """Area under the ROC curve of log Σ p(positive words) − log Σ p(negative words); with `pool: best` each side is its
    likeliest word's.  None where all samples are of one class.

    A sample's own number is 1 where that difference has the sign of its class; their mean stands beside, and that of
    each class.
    """
    labels = np.array([_label(sample, options) for sample in samples])
    margins = np.array([_margin(answer, options) for answer in answers])
    steps, level = np.unique(margins, return_inverse=True)
    ranks = level / len(steps)  # what is beyond 0 and 1 would be taken for logits, and squeezed until some are equal

    def area(places: Places) -> float | None:
        import torch
        from torchmetrics.functional.classification import binary_auroc

        chosen = labels[places]
        if len(set(chosen.tolist())) < 2:
            return None
        return float(binary_auroc(torch.from_numpy(ranks[places]), torch.from_numpy(chosen), validate_args=False))

    scores = [float((margin > 0) == bool(label)) for margin, label in zip(margins, labels)]
    classes = [options["positive" if label else "negative"][0] for label in labels]
    return Outcome(scores, area, {"accuracy": mean_of(scores), **_per_class(scores, classes)})


def _both_classes(samples: Sequence[Sample], options: Mapping[str, Any]) -> None:
    labels = {_label(sample, options) for sample in samples}
    if len(labels) < 2:
        which = ", ".join(options["positive"] if 1 in labels else options["negative"])
        raise DataError(
            f"{samples[0].task}: all {len(samples)} samples are of one class ({which}), and AUROC needs both; "
            f"score more samples or use accuracy."
        )


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


def retrieval(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
    """The mean of 1 / the truth's rank among the candidates; R@1, R@5, R@10 and the mean rank stand beside, and NDCG
    over the samples whose field `relevance` has a number for each candidate, if there are any.

    Candidates that are as likely as the truth share its ranks: every number is what breaking ties by chance gives on
    average.
    """
    ranks = [_ranks(answer, sample) for answer, sample in zip(answers, samples, strict=True)]
    beside = {f"R@{most}": mean_of([float((each <= most).mean()) for each in ranks]) for most in RECALLS}
    beside["mean rank"] = mean_of([float(each.mean()) for each in ranks])
    gains = np.array([_ndcg(answer, sample) for answer, sample in zip(answers, samples, strict=True)])
    if not np.isnan(gains).all():
        beside["NDCG"] = _mean_of_known(gains)
    return averaged([float((1 / each).mean()) for each in ranks], beside)


def _ndcg(answer: Answer, sample: Sample) -> float:
    """Visual Dialog's: over as many places as candidates have a relevance above 0, Σ relevance / log2(place + 1) in the
    order of the likelihoods, over the same in the order of the relevances.  NaN where no candidate has one.
    """
    given = sample.fields.get("relevance")
    if not isinstance(given, list) or len(given) != len(answer.candidates) or not any(given):
        return float("nan")
    relevance = np.array(given, dtype=float)
    _, level = np.unique(-np.array(answer.likelihoods), return_inverse=True)
    shared = np.bincount(level, weights=relevance) / np.bincount(level)  # what each place of equals has on average
    weights = 1 / np.log2(np.arange(np.count_nonzero(relevance)) + 2)
    reached, best = (values[: len(weights)] @ weights for values in (shared[np.sort(level)], np.sort(relevance)[::-1]))
    return float(reached / best)


def _mean_of_known(values: NDArray[np.float64]) -> Value:
    """The mean of the numbers at some places, those that are none left out."""

    def mean(places: Places) -> float | None:
        known = values[places][~np.isnan(values[places])]
        return float(known.mean()) if len(known) else None

    return mean


def _ranks(answer: Answer, sample: Sample) -> NDArray[np.int64]:
    """The ranks that the truth may have, all equally likely."""
    _has_its_truth(sample, answer.candidates, {})
    true = np.array([candidate in sample.references for candidate in answer.candidates])
    values = np.array(answer.likelihoods)
    best = values[true].max()
    above = int((values[~true] > best).sum())
    return np.arange(above + 1, above + int((values[~true] == best).sum()) + 2)


def _has_its_truth(sample: Sample, candidates: Sequence[str], options: Mapping[str, Any]) -> None:
    if not set(sample.references) & set(candidates):
        raise DataError(
            f"{sample.task}, sample '{sample.id}': the answer '{sample.references[0]}' is none of its "
            f"{len(candidates)} candidates, so it has no rank."
        )


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        exact_match,
        options={"normaliser": "lower"},
        choices={"normaliser": tuple(NORMALISERS)},
        reads=_as_words,
    ),
    "accuracy": Metric(
        accuracy,
        options={"normaliser": "none", "labels": {}},
        choices={"normaliser": tuple(NORMALISERS)},
        reads=_as_classes,
    ),
    "vqa_accuracy": Metric(
        vqa_accuracy,
        version=2,
        options={"normaliser": "official", "leave_one_out": True},
        choices={"normaliser": VQA_NORMALISERS},
        fits=_by_several,
    ),
    "ivqa_accuracy": Metric(
        ivqa_accuracy,
        options={"normaliser": "lower", "needed": 2},
        choices={"normaliser": tuple(NORMALISERS)},
        reads=_as_words,
    ),
    "cider": Metric(captions.scored_by(captions.cider_d), percent=False, fits=_has_words),
    "bleu4": Metric(captions.scored_by(captions.bleu_4), mean=False, fits=_has_words),
    "rouge_l": Metric(captions.scored_by(captions.rouge_l), fits=_has_words),
    "meteor": Metric(captions.scored_by(captions.meteor_1_5), mean=False, fits=_has_words),
    "auroc": Metric(
        auroc,
        options={"positive": ["yes"], "negative": ["no"], "pool": "sum"},
        choices={"pool": ("sum", "best")},
        ranked=True,
        mean=False,
        fits_together=_both_classes,
    ),
    "retrieval": Metric(retrieval, ranked=True, fits=_has_its_truth),
    "submission": Metric(submission, scored=False),
}
