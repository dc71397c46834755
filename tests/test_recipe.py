"""The recipe id changes with everything that decides a score besides the model, and with nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qformer import cards
from qformer.cards import Decoding, EvalCard, TaskCard
from qformer.data.readers import open_records
from qformer.evaluate.predict import Question
from qformer.evaluate.recipe import recipe, recipe_id
from qformer.sample import Sample, Turn
from qformer.text import Profile, Rendered

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


def asked(name: str, **changes: Any) -> Question:
    given: dict[str, Any] = {"instruction": f"q {name}", "references": (f"a {name}",), "candidates": ("a", name)}
    given |= changes
    sample = Sample(f"gqa/testdev/{name}", "gqa", (Path("a.png"),), references=given["references"])
    return Question(sample, Rendered(given["instruction"], history=given.get("history", ())), given["candidates"])


QUESTIONS = [asked("1"), asked("2")]


def made(task: TaskCard | None = None, **changes: Any) -> dict[str, Any]:
    given = {
        "template": "Question: {question} Short answer:",
        "template_version": 1,
        "profile": PROFILE,
        "questions": QUESTIONS,
        "reader_options": {"x": 1, "frames": 4},
        "metric_options": {"normaliser": "vqa"},
        "metric_version": 1,
    }
    return recipe(task or card(), **{**given, **changes})


def changed(section: EvalCard = SECTION, **changes: Any) -> dict[str, Any]:
    return made(card(dataclasses.replace(section, **changes)))


OWN = card(dataclasses.replace(RANKED, candidates=[]))
BASE, RANKED_BASE, OWN_BASE = made(), made(card(RANKED)), made(OWN)
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
    "ids": (BASE, made(questions=[asked("1")])),
    "words that a file fills in": (BASE, made(questions=[asked("1"), asked("2", instruction="OCR tokens: a. q 2")])),
    "a dialogue's history": (BASE, made(questions=[asked("1"), asked("2", history=(Turn("q", "a"),))])),
    "true answers": (BASE, made(questions=[asked("1"), asked("2", references=("b",))])),
    "how often an answer was given": (BASE, made(questions=[asked("1"), asked("2", references=("a 2", "a 2"))])),
    "reader's options": (BASE, made(reader_options={"x": 2, "frames": 4})),
    "reader's defaults": (BASE, made(reader_options={"x": 1, "frames": 8})),
    "metric": (BASE, changed(metric="vqa_accuracy")),
    "normaliser": (BASE, made(metric_options={"normaliser": "lower"})),
    "scorer version": (BASE, made(metric_version=2)),
    "way of answering": (BASE, RANKED_BASE),
    "candidates": (RANKED_BASE, changed(RANKED, candidates=["yes", "no", "maybe"])),
    "normalize": (RANKED_BASE, changed(RANKED, normalize="mean")),
    "end mark": (RANKED_BASE, changed(RANKED, end=False)),
    "shared or own candidates": (RANKED_BASE, OWN_BASE),
    "own candidates": (OWN_BASE, made(OWN, questions=[asked("1"), asked("2", candidates=("b", "2"))])),
    "order of own candidates": (OWN_BASE, made(OWN, questions=[asked("1"), asked("2", candidates=("2", "a"))])),
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
    "order of records": made(questions=QUESTIONS[::-1]),
    "the LLM's ids": made(profile=dataclasses.replace(PROFILE, opening=(), end=(7, 8), pad=3, head="<user>")),
    "where files are": changed(files={"questions": "elsewhere/q.json", "images": "elsewhere"}),
    "words about the card": made(card(title="GQA", notes=["a note"], licence="CC BY 4.0")),
    "candidates that are not used": made(questions=[asked("1"), asked("2", candidates=())]),
    "where pictures are": made(
        questions=[
            dataclasses.replace(each, sample=dataclasses.replace(each.sample, images=(Path("b.png"),)))
            for each in QUESTIONS
        ]
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_recipe_does_not_change_with(name: str) -> None:
    assert recipe_id(SAME[name]) == recipe_id(BASE)


def test_the_order_of_records_does_not_change_their_own_candidates() -> None:
    assert recipe_id(made(OWN, questions=QUESTIONS[::-1])) == recipe_id(OWN_BASE)


def test_a_shipped_card_says_what_its_reader_does_by_default(tmp_path: Path) -> None:
    from tests import fixtures

    root = fixtures.root(tmp_path)
    for name, options in (
        ("msvd_qa", {"video": "vid%d", "frames": 4, "least": 1}),
        ("ivqa", {"frames": 4, "least": 1}),
        ("iconqa", {"split": "choose_txt_test", "rank": "texts"}),
    ):
        opened = cards.load(name)
        assert opened.eval is not None
        assert open_records(opened.eval, root, opened).options.items() >= options.items()


def test_the_order_of_keys_does_not_matter() -> None:
    turned = {name: dict(reversed(value.items())) if isinstance(value, dict) else value for name, value in BASE.items()}
    assert recipe_id(dict(reversed(turned.items()))) == recipe_id(BASE)


def test_a_recipe_survives_its_file() -> None:
    for settings in (BASE, RANKED_BASE, OWN_BASE):
        assert recipe_id(json.loads(json.dumps(settings))) == recipe_id(settings)


def test_ids_are_held_still() -> None:
    """A published id must be found again by later versions."""
    assert (recipe_id(BASE), recipe_id(RANKED_BASE)) == ("0811f3aebd18", "e8ffe86b8ac8")
