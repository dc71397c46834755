"""Files for test servers: a model's answers in the form that a set's server takes.

A form is a function and a line in `FORMS`; cards name it under `eval.submission`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qformer.errors import DataError, lookup
from qformer.evaluate.outcome import Answer
from qformer.sample import Sample

Record = tuple[Any, Sample, Answer]
"""A record's key in its file, the sample made of it, and what the model said."""
Form = Callable[[Iterator[Record]], Any]


def written(form: str, keys: Sequence[Any], samples: Sequence[Sample], answers: Sequence[Answer]) -> str:
    """The content of a submission file.

    Raises:
        DataError: a record lacks what the server asks for.
    """
    content = lookup(FORMS, form, "form of a submission (eval.submission)")(zip(keys, samples, answers, strict=True))
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def vqa(records: Iterator[Record]) -> list[Mapping[str, Any]]:
    """VQAv2 and TextVQA: `[{"question_id": 1, "answer": "…"}]`."""
    return [{"question_id": _number(key, sample), "answer": answer.text} for key, sample, answer in records]


def vizwiz(records: Iterator[Record]) -> list[Mapping[str, Any]]:
    """VizWiz, where a picture stands for its question: `[{"image": "VizWiz_test_00000000.jpg", "answer": "…"}]`."""
    return [{"image": _named(sample), "answer": answer.text} for _, sample, answer in records]


def ocrvqa(records: Iterator[Record]) -> list[Mapping[str, Any]]:
    """OCR-VQA, whose questions have no ids: `[{"image_id": "…", "question": "…", "answer": "…"}]`."""
    return [
        {"image_id": str(sample.fields["image_id"]), "question": sample.fields["question"], "answer": answer.text}
        for _, sample, answer in records
    ]


def aokvqa_direct_answer(records: Iterator[Record]) -> Mapping[str, Any]:
    """A-OKVQA: `{question_id: {"direct_answer": "…"}}`."""
    return {str(key): {"direct_answer": answer.text} for key, _, answer in records}


def aokvqa_multiple_choice(records: Iterator[Record]) -> Mapping[str, Any]:
    """A-OKVQA: `{question_id: {"multiple_choice": "…"}}`."""
    return {str(key): {"multiple_choice": answer.text} for key, _, answer in records}


def _number(key: Any, sample: Sample) -> int:
    """A question's number; some mirrors hold it as text."""
    if isinstance(key, bool) or not str(key).isdecimal():
        raise DataError(
            f"{sample.task}, sample '{sample.id}': the server takes whole numbers as question_id, and its id is "
            f"'{key}'; name the column of ids under options.columns, or leave eval.submission out."
        )
    return int(key)


def _named(sample: Sample) -> str:
    """A picture's file name, whose ending some mirrors leave out."""
    name = str(sample.fields["image_id"])
    return name if name.endswith(".jpg") else f"{name}.jpg"


FORMS: dict[str, Form] = {
    "vqa": vqa,
    "vizwiz": vizwiz,
    "ocrvqa": ocrvqa,
    "aokvqa_direct_answer": aokvqa_direct_answer,
    "aokvqa_multiple_choice": aokvqa_multiple_choice,
}
