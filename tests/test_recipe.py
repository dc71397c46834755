"""The recipe id changes with everything that decides a score besides the model, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qformer.cards import Decoding, EvalCard, TaskCard
from qformer.evaluate.recipe import recipe, recipe_id
from qformer.text import Profile

SECTION = EvalCard(
    "gqa",
    {"questions": "q.json", "images": "images"},
    "short_answer",
    "testdev",
    "generate",
    "exact_match",
    options={"x": 1},
    decoding=Decoding(num_beams=5),
)
RANKED = dataclasses.replace(SECTION, answer="rank", candidates=["yes", "no"])
PROFILE = Profile("plain", opening=(1,), end=(2,), pad=0)


def card(section: EvalCard = SECTION, **changes: Any) -> TaskCard:
    return TaskCard(**{"name": "gqa", "version": 1, "eval": section, **changes})


def made(task: TaskCard | None = None, **changes: Any) -> dict[str, Any]:
    given = {
        "template": "Question: {question} Short answer:",
        "template_version": 1,
        "profile": PROFILE,
        "ids": ["gqa/testdev/1", "gqa/testdev/2"],
        "own_candidates": [("a", "b"), ("c",)],
        "metric_options": {"normaliser": "vqa"},
        "metric_version": 1,
    }
    return recipe(task or card(), **{**given, **changes})


def changed(section: EvalCard = SECTION, **changes: Any) -> dict[str, Any]:
    return made(card(dataclasses.replace(section, **changes)))


BASE, RANKED_BASE, OWN_BASE = made(), made(card(RANKED)), changed(RANKED, candidates=[])
OTHER_DECODING = {
    "max_new_tokens": 31,
    "min_new_tokens": 2,
    "num_beams": 4,
    "length_penalty": -1.0,
    "repetition_penalty": 1.5,
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.9,
}
CHANGES = {
    "card version": (BASE, made(card(version=2))),
    "card name": (BASE, made(card(name="vqa"))),
    "variant": (BASE, made(card(variant="v"))),
    "template text": (BASE, made(template="Q: {question} A:")),
    "template version": (BASE, made(template_version=2)),
    "profile kind": (BASE, made(profile=dataclasses.replace(PROFILE, layout="chat"))),
    "system turn": (BASE, made(profile=dataclasses.replace(PROFILE, system="Be brief."))),
    "split": (BASE, changed(split="val")),
    "ids": (BASE, made(ids=["gqa/testdev/1"])),
    "reader's options": (BASE, changed(options={"x": 2})),
    "metric": (BASE, changed(metric="vqa_accuracy")),
    "normaliser": (BASE, made(metric_options={"normaliser": "lower"})),
    "scorer version": (BASE, made(metric_version=2)),
    "way of answering": (BASE, RANKED_BASE),
    "candidates": (RANKED_BASE, changed(RANKED, candidates=["yes", "no", "maybe"])),
    "normalize": (RANKED_BASE, changed(RANKED, normalize="mean")),
    "end mark": (RANKED_BASE, changed(RANKED, end=False)),
    "shared or own candidates": (RANKED_BASE, OWN_BASE),
    "own candidates": (OWN_BASE, made(card(dataclasses.replace(RANKED, candidates=[])), own_candidates=[("a",)])),
    **{
        name: (BASE, changed(decoding=dataclasses.replace(SECTION.decoding, **{name: value})))
        for name, value in OTHER_DECODING.items()
    },
}


def test_every_decoding_value_is_tried() -> None:
    assert set(OTHER_DECODING) == {entry.name for entry in dataclasses.fields(Decoding)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_changes_with(name: str) -> None:
    one, other = CHANGES[name]
    assert recipe_id(one) != recipe_id(other)


SAME = {
    "nothing": made(),
    "order of ids": made(ids=["gqa/testdev/2", "gqa/testdev/1"]),
    "the LLM's ids": made(profile=dataclasses.replace(PROFILE, opening=(), end=(7, 8), pad=3, head="<user>")),
    "where files are": changed(files={"questions": "elsewhere/q.json", "images": "elsewhere"}),
    "words about the card": made(card(title="GQA", notes=["a note"], licence="CC BY 4.0")),
    "candidates that are not used": made(own_candidates=[]),
}


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_does_not_change_with(name: str) -> None:
    assert recipe_id(SAME[name]) == recipe_id(BASE)


def test_the_order_of_keys_does_not_matter() -> None:
    turned = {name: dict(reversed(value.items())) if isinstance(value, dict) else value for name, value in BASE.items()}
    assert recipe_id(dict(reversed(turned.items()))) == recipe_id(BASE)


def test_a_recipe_survives_its_file() -> None:
    for settings in (BASE, RANKED_BASE, OWN_BASE):
        assert recipe_id(json.loads(json.dumps(settings))) == recipe_id(settings)


def test_ids_are_held_still() -> None:
    """A published id must be found again by later versions."""
    assert (recipe_id(BASE), recipe_id(RANKED_BASE)) == ("1be87bf0e0b6", "dc375a5ea359")
