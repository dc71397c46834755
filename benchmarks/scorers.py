"""Our VQA accuracy beside the scorers it follows, on 1,000 random answers each, where their files are at hand.

    python benchmarks/scorers.py --lavis lavis/common/vqa_tools/vqa_eval.py --mmf mmf/utils/m4c_evaluators.py
    python benchmarks/scorers.py --lmms lmms_eval/tasks/_task_utils/vqa_eval_metric.py
    python benchmarks/scorers.py --official PythonEvaluationTools/vqaEvaluation/vqaEval.py

The files are parts of `salesforce-lavis` 1.0.2, `mmf`, `lmms-eval` and github.com/GT-Vision-Lab/VQA, of which nothing
need be installed: each is run alone.  What was found is in benchmarks/scorers.md.  Captions, ranks and AUROC are held
to their scorers in tests/test_metrics.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qformer.evaluate.metrics import METRICS
from qformer.evaluate.normalise import CONTRACTIONS
from qformer.evaluate.outcome import Answer
from qformer.sample import Sample

ANSWERS = 1000
PIECES = [
    "two", "2", "a", "The", "dog", "dog's", "dont", "couldnt've", "t-shirt", "1,000", "1,000,000", "1000", "U.S.",
    "red,", "yes/no", "3.5", "5.", "Im", "?", "yes", "no", "none", "white-and-red", "what ?", "\tred\n", "10 ,5",
    "y'all'dve", "[x]", "é", "somebody'd", "twas", "ten", "an", "$5", "50%", "#1", "it's",
]  # fmt: skip
Accuracy = Callable[[str, Sequence[str]], float]


def drawn(seed: int) -> list[tuple[str, list[str]]]:
    """Answers, each with ten references: all alike, of a few kinds, or all different."""
    source = random.Random(seed)

    def phrase() -> str:
        return " ".join(source.choice(PIECES) for _ in range(source.randint(1, 4)))

    made = []
    for number in range(ANSWERS):
        kinds = [phrase() for _ in range((1, 2, 3, 10)[number % 4])]
        truths = kinds if len(kinds) == 10 else [source.choice(kinds) for _ in range(10)]
        made.append((phrase() if number % 3 == 0 else source.choice(kinds), truths))
    return made


def module(file: Path) -> dict[str, Any]:
    """What a file defines; some versions of the official one print as Python 2 does."""
    source = re.sub(r'\bprint "(.*)"', r'print("\1")', file.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": file.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(source, str(file), "exec"), names)
    return names


class Answers:
    """What `VQAEval` is given: the answers by question, of which there is one."""

    def __init__(self, content: Any = None) -> None:
        self.qa = {0: content}

    def getQuesIds(self) -> list[int]:
        """The one question."""
        return [0]


def rule_of(file: Path) -> str:
    """Which of our rules a version of the official scorer follows: earlier ones leave numbers and articles as they are
    in the references, as LAVIS's copy does.
    """
    later = "processDigitArticle(ansDic" in file.read_text(encoding="utf-8")
    return "official" if later else "lavis"


def by_evaluation(file: Path) -> Accuracy:
    """Its whole evaluation, one question at a time."""
    make = module(file)["VQAEval"]

    def accuracy(said: str, truths: Sequence[str]) -> float:
        answers = [{"answer": truth, "answer_id": number} for number, truth in enumerate(truths)]
        question = {"answers": answers, "question_type": "", "answer_type": ""}
        evaluation = make(Answers(question), Answers({"answer": said}), n=12)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        return float(evaluation.accuracy["overall"]) / 100

    return accuracy


def leave_one_out(said: str, truths: Sequence[str]) -> float:
    """The mean over annotators of min(1, matches among the others / 3)."""
    shares = [min(1.0, (list(truths).count(said) - (truth == said)) / 3) for truth in truths]
    return sum(shares) / len(shares)


def by_steps(file: Path) -> Accuracy:
    """Both sides through a file's steps where annotators differ, as the official scorer now puts them together."""
    steps = module(file)["VQAEval"](Answers(), Answers())

    def accuracy(said: str, truths: Sequence[str]) -> float:
        words = [text.replace("\n", " ").replace("\t", " ").strip() for text in (said, *truths)]
        if len(set(words[1:])) > 1:
            words = [steps.processDigitArticle(steps.processPunctuation(word)) for word in words]
        return leave_one_out(words[0], words[1:])

    return accuracy


def by_processor(file: Path) -> Accuracy:
    """The EvalAI processor on both sides, always."""
    process = module(file)["EvalAIAnswerProcessor"]()
    return lambda said, truths: leave_one_out(process(said), [process(truth) for truth in truths])


def main() -> int:
    """A line for each scorer; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("official", "lavis", "mmf", "lmms"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    scorers: list[tuple[str, str, Accuracy]] = []
    tables: dict[str, dict[str, str]] = {}
    for name in ("official", "lavis"):
        if file := getattr(options, name):
            scorers.append((f"evaluation of {name}", rule_of(file), by_evaluation(file)))
            scorers.append((f"steps of {name}", "official", by_steps(file)))
            tables[name] = module(file)["VQAEval"](Answers(), Answers()).contractions
    for name in ("mmf", "lmms"):
        if file := getattr(options, name):
            scorers.append((f"EvalAI processor of {name}", "evalai", by_processor(file)))
            tables[name] = module(file)["EvalAIAnswerProcessor"].CONTRACTIONS
    worst = 0
    for name, table in tables.items():
        worst = max(worst, len(table.items() ^ CONTRACTIONS.items()))
        print(f"contractions of {name}: {len(table.items() & CONTRACTIONS.items())} of {len(table)} pairs are ours")
    for name, rule, accuracy in scorers:
        different = 0
        for said, truths in drawn(seed=len(name)):
            given = {"normaliser": rule, "leave_one_out": True}
            sample = Sample("x", "x", (), references=tuple(truths))
            ours = METRICS["vqa_accuracy"].score([Answer(said)], [sample], given).scores[0]
            theirs = accuracy(said, truths)
            if abs(ours - theirs) > 1e-9:
                different += 1
                if different <= 3:
                    print(f"  {said!r} for {truths}: ours {ours:.3f}, theirs {theirs:.3f}")
        print(f"{name}: {ANSWERS - different:,} of {ANSWERS:,} answers have the same score by '{rule}'", flush=True)
        worst = max(worst, different)
    return int(worst > 0)


if __name__ == "__main__":
    raise SystemExit(main())
