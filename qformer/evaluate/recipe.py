"""What a score depends on besides the model: two models scored by the same recipe can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qformer.cards import TaskCard
from qformer.text import Profile

if TYPE_CHECKING:
    from qformer.evaluate.predict import Question

LENGTH = 12
"""Hex digits of an id."""
FORM = 2
"""Of what a recipe holds; raise it when something joins it or is hashed otherwise."""


def recipe(
    card: TaskCard,
    *,
    template: str,
    template_version: int,
    profile: Profile,
    questions: Iterable[Question],
    reader_options: Mapping[str, Any],
    metric_options: Mapping[str, Any],
    metric_version: int,
) -> dict[str, Any]:
    """Everything that decides how a set is scored, as plain values for JSON.

    Neither adapter, towers, libraries nor batch size are in it, nor pictures or where files lie: what was read from the
    files is, by hashes over what each sample was asked, its true answers and its choices, in the order of their ids.

    Args:
        card: what is scored.
        template: the words asked with, fields unfilled.
        template_version: of the file they are from.
        profile: of the LLM; its kind counts (layout and system turn), not its ids.
        questions: those that are really scored.
        reader_options: with their defaults.
        metric_options: with their defaults.
        metric_version: of the scorer.
    """
    section = card.eval
    assert section is not None, card.key
    by_id = sorted(questions, key=lambda each: each.sample.id)

    def of_each(what: Callable[[Question], Any]) -> str:
        return fingerprint([each.sample.id, what(each)] for each in by_id)

    settings: dict[str, Any] = {
        "form": FORM,
        "card": {"name": card.name, "variant": card.variant, "version": card.version},
        "template": {"text": template, "version": template_version, "filled": of_each(lambda each: each.words)},
        "profile": {"layout": profile.layout, "system": profile.system},
        "reader": {"name": section.reader, "options": dict(reader_options)},
        "split": {
            "name": section.split,
            "ids": fingerprint(each.sample.id for each in by_id),
            "answers": of_each(lambda each: each.sample.references),
        },
        "answer": section.answer,
        "metric": {"name": section.metric, "version": metric_version, "options": dict(metric_options)},
    }
    if section.preface:
        settings["template"]["preface"] = list(section.preface)
    if section.answer == "rank":
        candidates = list(section.candidates) or {"own": of_each(lambda each: each.choices)}
        settings["ranking"] = {"candidates": candidates, "normalize": section.normalize, "end": section.end}
    else:
        settings["decoding"] = dataclasses.asdict(section.decoding)
    return settings


def recipe_id(settings: Mapping[str, Any]) -> str:
    """A short hash of a recipe: the same for the same values in whatever order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:LENGTH]


def fingerprint(values: Iterable[Any]) -> str:
    """A hash of values that JSON can hold, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()[:16]
