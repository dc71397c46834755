"""Scenes: a function of their seed, pairs held out, questions with one answer, answers evened out."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from qformer.demo import scenes
from qformer.demo.scenes import ANSWERS, COLOURS, FORMS, HELD_OUT_PAIRS, PAIRS, SHAPES, Dice

MADE = {held_out: [scenes.sample_scene(5, n, held_out=held_out) for n in range(150)] for held_out in (False, True)}
HELD_IN_FORMS = ["attribute", "relation", "exists", "side", "count", "place", "word"]
HELD_OUT_FORMS = ["query", "two_step", "verify", "choose"]


def test_the_same_seed_gives_the_same_scene_and_pixels():
    again = scenes.sample_scene(5, 3, held_out=False)
    assert again == MADE[False][3]
    assert np.array_equal(np.array(scenes.draw(again)), np.array(scenes.draw(MADE[False][3])))
    assert again != scenes.sample_scene(6, 3, held_out=False)


def test_pairs_are_either_held_out_or_shown():
    for held_out, made in MADE.items():
        shown = {(thing.colour, thing.shape) for scene in made for thing in scene.things}
        assert shown == (HELD_OUT_PAIRS if held_out else set(PAIRS) - HELD_OUT_PAIRS)


def test_every_colour_and_every_shape_is_in_both_halves():
    for half in (HELD_OUT_PAIRS, set(PAIRS) - HELD_OUT_PAIRS):
        assert {colour for colour, _ in half} == set(COLOURS)
        assert {shape for _, shape in half} == set(SHAPES)


def test_most_scenes_share_colours_or_shapes():
    for made in MADE.values():
        shared = [
            any(one[0] == two[0] or one[1] == two[1] for one, two in combinations(looks(scene), 2)) for scene in made
        ]
        assert sum(shared) > 0.8 * len(made)


def looks(scene: scenes.Scene) -> list[tuple[str, str]]:
    return [(thing.colour, thing.shape) for thing in scene.things]


def test_things_stand_inside_their_own_cells():
    for scene in MADE[False]:
        assert len({(thing.column, thing.row) for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            half = scenes.SIZES[thing.size]
            for place, cell in ((thing.x, thing.column), (thing.y, thing.row)):
                middle = place * scenes.PICTURE
                assert cell * scenes.CELL <= middle - half
                assert middle + half <= (cell + 1) * scenes.CELL


def test_attributes_and_words_change_the_picture():
    scene = MADE[False][0]
    first, *rest = scene.things
    plain = np.array(scenes.draw(scene)).astype(int)
    for attribute, values in {**scenes.VALUES, "word": scenes.WORDS}.items():
        value = next(value for value in values if value != getattr(first, attribute))
        other = scenes.Scene(scene.seed, scene.number, (replaced(first, attribute, value), *rest), scene.held_out)
        assert np.abs(np.array(scenes.draw(other)).astype(int) - plain).sum() > 500, attribute


def replaced(thing: scenes.Thing, attribute: str, value: str) -> scenes.Thing:
    return scenes.Thing(**{**vars(thing), attribute: value})


@pytest.mark.parametrize("form", sorted(FORMS))
def test_mentions_are_words_of_the_question(form: str):
    for scene in MADE[False][:40]:
        for ask in scenes.asks(scene, form):
            for words, thing in ask.mentions:
                assert words in ask.question
                assert thing in scene.things
                shape = words.split()[0] if " of the " in words or " the " in words else words.split()[-1]
                assert shape in (thing.shape, "thing")


@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_not_there_is_of_the_pairs_that_are_shown(held_out: bool):
    for scene in MADE[held_out]:
        for ask in scenes.asks(scene, "exists"):
            colour, shape = ask.question.removesuffix("?").split()[-2:]
            if colour in COLOURS:
                assert ((colour, shape) in HELD_OUT_PAIRS) == held_out


def test_words_that_name_a_thing_fit_it_alone():
    for scene in MADE[False][:60]:
        for thing in scene.things:
            for without in ("", *scenes.ATTRIBUTES):
                words = scenes.referent(thing, scene.things, Dice(1), without)
                if words is not None:
                    assert [other for other in scene.things if described_by(other, words)] == [thing]
                    assert without not in scenes.VALUES or scenes.value_of(thing, without) not in words.split()


def described_by(thing: scenes.Thing, words: str) -> bool:
    return all(word in ("thing", thing.shape, thing.colour, thing.size, thing.material) for word in words.split())


def answer_by_looking(scene: scenes.Scene, question: str) -> str | None:
    """The answer to `What … is the NOUN RELATION the WORDS?`, from its words alone; None if they fit several things."""
    attribute = question.split()[1]
    words = question.removeprefix(f"What {attribute} is the ").removesuffix("?")
    noun = words.split()[0]
    relation = words.removeprefix(noun + " ").split(" the ")[0]
    anchors = [thing for thing in scene.things if described_by(thing, words.split(" the ")[1])]
    [anchor] = anchors
    found = [t for t in scene.things if scenes.RELATIONS[relation](t, anchor) and noun in ("thing", t.shape)]
    return scenes.value_of(found[0], attribute) if len(found) == 1 else None


def test_relation_questions_have_one_answer_that_their_words_lead_to():
    asked = 0
    for scene in MADE[True]:
        for ask in scenes.asks(scene, "relation", "test"):
            if ask.type != "material":
                assert answer_by_looking(scene, ask.question) == ask.answer
                asked += 1
    assert asked > 1000


def test_statements_and_sides_are_true_as_often_as_they_say():
    for scene in MADE[True][:50]:
        for ask in scenes.asks(scene, "statement", "test"):
            one, rest = ask.question.removeprefix("The ").removesuffix(".").split(" is ")
            relation, other = rest.split(" the ")
            [first] = [thing for thing in scene.things if described_by(thing, one)]
            [second] = [thing for thing in scene.things if described_by(thing, other)]
            assert ask.answer == str(scenes.RELATIONS[relation](first, second)).lower()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_asks_on_most_scenes_and_answers_are_among_the_options(form: str):
    found = [scenes.asks(scene, form, "test") for scene in MADE[True][:60]]
    assert sum(map(bool, found)) > 30
    for ask in (ask for each in found for ask in each):
        assert ask.form == form
        assert ask.answer
        assert ask.question[-1] in "?."
        if ask.options:
            assert ask.options.count(ask.answer) == 1
            assert len(set(ask.options)) == len(ask.options) >= 2


@pytest.mark.parametrize("forms", [HELD_IN_FORMS, HELD_OUT_FORMS, ["statement"], ["options"]], ids=" ".join)
def test_answers_are_evened_out(forms: list[str]):
    chosen = scenes.balanced(MADE[True], forms, 2, "test")
    assert len(chosen) > 200 or forms == ["options"]
    counts: dict[str, Counter[str]] = {}
    for _, ask in chosen:
        counts.setdefault(ask.type, Counter())[ask.answer] += 1
    for kind, each in counts.items():
        if kind in ("yes/no", "true/false"):
            assert len(set(each.values())) == 1
            assert len(each) == 2
        else:
            assert max(each.values()) <= 1.3 * sum(each.values()) / ANSWERS[kind]


def test_evening_out_is_a_function_of_its_key_and_asks_nothing_twice():
    chosen = scenes.balanced(MADE[False], HELD_IN_FORMS, 3, "test")
    assert chosen == scenes.balanced(MADE[False], HELD_IN_FORMS, 3, "test")
    assert chosen != scenes.balanced(MADE[False], HELD_IN_FORMS, 3, "other")
    assert len({(scene.number, ask.question) for scene, ask in chosen}) == len(chosen)


def test_captions_name_only_what_is_there():
    for scene in MADE[False][:50]:
        names = {scenes.name(thing) for thing in scene.things}
        for caption in scenes.captions(scene, 5, "test"):
            said = [f"{one} {two}" for one, two in pairwise(caption.replace(",", "").split()) if one in COLOURS]
            assert said
            assert set(said) <= names
