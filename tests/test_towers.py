"""The demo's towers: what their recipe shows and tells them, and the checkpoints that are shipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qformer import resources
from qformer.backbones.language_loading import load_language
from qformer.backbones.vision import load_vision, vision_settings
from qformer.config import LanguageConfig, VisionConfig
from qformer.demo import descriptions, llm, pretraining, scenes, towers
from qformer.demo.scenes import HELD_OUT_PAIRS, Dice

WEIGHTS = Path(towers.__file__).parent / "weights"
MB = 1_000_000
FIRST = ("bert", "image", "language")
"""The towers that the demo began with: 8 MB at most, and with those that came later 12."""
SHIPPED = sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())


def test_the_encoder_is_never_shown_a_held_out_pair():
    shown = set()
    for number in range(2000):
        scene = towers.picture_scene(towers.PICTURE_SEED, number, strange=True)
        shown |= {(thing.colour, thing.shape) for thing in scene.things}
    named = {(colour, shape) for colour, shape in shown if colour in scenes.COLOURS and shape in scenes.SHAPES}
    assert named == set(scenes.PAIRS) - HELD_OUT_PAIRS


def test_colours_without_a_name_are_far_from_those_with_one():
    dice = Dice("test")
    for _ in range(200):
        tint = towers.unnamed_colour(dice)
        parts = [int(tint[place : place + 2], 16) for place in (1, 3, 5)]
        for named in scenes.COLOURS.values():
            assert sum((a - b) ** 2 for a, b in zip(parts, named, strict=True)) > 90**2


def test_the_encoder_learns_attributes_at_their_places_and_nothing_else():
    scene = towers.picture_scene(towers.PICTURE_SEED, 4)
    batch = towers.pictures([scene])
    assert set(batch.labels) == {*scenes.ATTRIBUTES, "word", "thing", "row", "column"}
    for thing in scene.things:
        for row, column in ((2 * thing.row, 2 * thing.column), (2 * thing.row + 1, 2 * thing.column + 1)):
            token = row * towers.GRID + column
            assert scenes.SHAPES[batch.labels["shape"][0, token]] == thing.shape
            assert list(scenes.COLOURS)[batch.labels["colour"][0, token]] == thing.colour
            assert batch.labels["row"][0, token] == thing.row
    named = batch.labels["shape"] != towers.IGNORED
    assert named.sum() == 4 * len(scene.things)
    assert torch.equal(named, batch.labels["thing"] == 1)


def test_what_has_no_name_is_not_asked_for():
    scene = towers.picture_scene(towers.PICTURE_SEED, 4)
    odd = [dataclasses.replace(thing, shape="blob 3") for thing in scene.things]
    batch = towers.pictures([dataclasses.replace(scene, things=tuple(odd))])
    assert (batch.labels["shape"] == towers.IGNORED).all()
    assert (batch.labels["colour"] != towers.IGNORED).any()


def test_seeds_of_the_recipe_are_not_those_of_a_demo():
    seeds = {towers.PICTURE_SEED, towers.PICTURE_TEST_SEED, descriptions.TEXT_SEED, descriptions.TEXT_TEST_SEED}
    assert len(seeds) == 4
    assert min(seeds) > 1000


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> llm.Writer:
    from transformers import AutoTokenizer

    return llm.Writer(AutoTokenizer.from_pretrained(WEIGHTS / "language"))


def described(number: int) -> descriptions.Description:
    scene = descriptions.text_scene(descriptions.TEXT_SEED, number, (3, 4))
    return descriptions.described(scene, Dice("test", number), count=3)


def test_a_question_sees_the_description_and_itself_alone(writer: llm.Writer):
    texts = writer.rows([described(0)], words=False)
    first = texts.groups.shape[1]
    seen = texts.mask[0, 0] == 0
    tokens = writer.exchange(described(0).exchanges[0])[0]
    last_of_first = first + len(tokens) - 1
    assert seen[last_of_first, : last_of_first + 1].all()
    assert not seen[last_of_first, last_of_first + 1 :].any()
    second = first + len(tokens)
    assert seen[second, :first].all()
    assert not seen[second, first:second].any()
    assert texts.positions[0, second] == texts.positions[0, first]


def test_a_phrase_is_one_position_or_a_position_a_word(writer: llm.Writer):
    grouped = writer.rows([described(1)], words=False)
    apart = writer.rows([described(1)], words=True)
    assert grouped.groups.shape[1] == len(described(1).groups)
    assert apart.groups.shape[1] > 4 * grouped.groups.shape[1]
    assert apart.groups.shape[2] == 1


@pytest.mark.parametrize("form", [form for form in scenes.FORMS if form not in ("exists", "count")])
def test_mentions_end_where_their_words_do(writer: llm.Writer, form: str):
    found = 0
    for number in range(12):
        scene, dice = descriptions.text_scene(descriptions.TEXT_SEED, number, (3, 4)), Dice("mentions", number)
        for ask in list(scenes.FORMS[form](scene, dice))[:6]:
            exchange = descriptions.asked(ask, dice)
            tokens = writer.exchange(exchange)[0]
            last, depth = -1, 0
            pointed = list(writer.mentions(exchange))
            for (words, thing), (place, deep, pointed_at) in zip(ask.mentions, pointed, strict=False):
                assert writer.tokenizer.decode(tokens[1 : place + 1]).endswith(words)
                depth = depth + 1 if place == last else 0
                last = place
                assert (deep, pointed_at) == (depth, thing)
                found += 1
            assert len(pointed) == min(len(ask.mentions), 2)
    assert found > 4


def test_a_mention_becomes_the_values_of_its_thing(writer: llm.Writer):
    told = described(3)
    texts = writer.rows([told], words=False)
    assert texts.mentions[:, 2].max() < llm.DEPTHS
    things = {tuple(values) for values in texts.things.tolist()}
    of_scene = {
        tuple(values.index(getattr(thing, point)) for point, values in llm.POINTS.items())
        for thing in descriptions.text_scene(descriptions.TEXT_SEED, 3, (3, 4)).things
    }
    assert things
    assert things <= of_scene


def test_rows_are_a_function_of_the_step(writer: llm.Writer):
    steps = llm.Steps(writer)
    for one, two in zip(vars(steps[60]).values(), vars(steps[60]).values(), strict=True):
        assert torch.equal(one, two)


def test_orthogonal_makes_singular_values_nearly_one():
    found = pretraining.orthogonal(torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(found)
    assert found.shape == (2, 24, 40)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_shipped_towers_take_few_megabytes_and_are_half_precision():
    from safetensors import safe_open

    sizes = {
        name: sum(path.stat().st_size for path in (WEIGHTS / name).rglob("*") if path.is_file()) for name in SHIPPED
    }
    assert sum(sizes[name] for name in FIRST) <= 8 * MB
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12 * MB
    for name in SHIPPED:
        with safe_open(WEIGHTS / name / "model.safetensors", framework="pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert kinds - {torch.int64} == {torch.float16}
        assert (WEIGHTS / name / "README.md").is_file()
        assert json.loads((WEIGHTS / name / "scores.json").read_text(encoding="utf-8"))["steps"] > 0


def test_shipped_towers_load_as_any_other():
    vision = load_vision(VisionConfig(name=resources.located("demo:image")))
    assert vision_settings(VisionConfig(name=resources.located("demo:image"))).size == scenes.PICTURE
    assert vision(torch.zeros(2, 3, 96, 96)).values.shape == (2, 36, 128)
    for name in set(llm.READERS) & set(SHIPPED):
        language = load_language(LanguageConfig(name=resources.located(f"demo:{name}")))
        assert language.width == llm.READERS[name].width
        assert language.profile.opening == (language.tokenizer.bos_token_id,)
        assert language.profile.end == (language.tokenizer.eos_token_id,)
        text = 'Is the red cube left of the small ball? (a) yes, "no" 2'
        assert language.tokenizer.decode(language.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_shipped_encoder_names_what_it_was_not_shown():
    scores = json.loads((WEIGHTS / "image" / "scores.json").read_text(encoding="utf-8"))
    assert min(scores["seen pairs"].values()) > 0.95
    assert min(scores["held-out pairs"].values()) > 0.8


def test_every_step_has_its_stage_and_place_in_its_course():
    first, last = llm.COURSES
    assert llm.lesson(0) == (first.stages[0], first, 0)
    assert llm.lesson(first.steps - 1) == (first.stages[-1], first, first.steps - 1)
    assert llm.lesson(first.steps) == (last.stages[0], last, 0)
    with pytest.raises(IndexError):
        llm.lesson(llm.TEXT_STEPS)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name in llm.READERS])
def test_the_tokenizer_of_a_shipped_llm_is_read_as_it_was_written(name):
    """Of some families transformers cuts texts in a way of its own, which the LLM was not taught with."""
    written = Tokenizer.from_file(str(WEIGHTS / name / "tokenizer.json"))
    read = load_language(LanguageConfig(name=resources.located(f"demo:{name}"))).tokenizer
    for text in ("How many red things are there?", " 2", "(a) small, (b) large.", ' It says "sun"; 10 of 12.'):
        assert read(text, add_special_tokens=False).input_ids == written.encode(text, add_special_tokens=False).ids
