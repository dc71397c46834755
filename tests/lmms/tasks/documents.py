"""What the tasks beside this file make of a document: pictures, words and results."""

from __future__ import annotations

from typing import Any

from PIL import Image

Document = dict[str, Any]


def first_picture(document: Document) -> list[Image.Image]:
    return all_pictures(document)[:1]


def all_pictures(document: Document) -> list[Image.Image]:
    return [Image.open(name).convert("RGB") for name in document["pictures"]]


def question(document: Document) -> str:
    return document["question"]


def question_about_all(document: Document) -> str:
    return " and ".join(["<image>"] * len(document["pictures"])) + " " + document["question"]


def answer(document: Document) -> str:
    return document["choices"][document["gold"]]


def words(document: Document, results: list[str]) -> dict[str, float]:
    return {"words": float(len(results[0].split()))}


def loss(document: Document, results: list[tuple[float, bool]]) -> dict[str, float]:
    [(value, greedy)] = results
    return {"loss": value, "greedy": float(greedy)}
