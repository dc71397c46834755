"""All 26 sets in scenes: eight more held-in ones in their official files, and the ordinary demo's as they were."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer import cards, config, resources, text
from qformer.cards import load
from qformer.data.readers import open_records
from qformer.demo import formats, full, heldout, sayings, scenes, thirteen
from qformer.demo.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, VALUES, WORDS, Ask, Dice, Scene, Thing
from qformer.errors import DataError
from qformer.sample import Sample, Video

NEW = ["web_capfilt", "textcaps", "okvqa", "ocrvqa", "vqg_okvqa", "vqg_aokvqa", "llava_detail", "llava_reasoning"]
OLD = ["coco_caption", "vqav2", "vqg_vqav2", "aokvqa", "llava_conversation"]
SCORED = ["textcaps", "okvqa", "ocrvqa"]
SIZE = {"pictures_train": 120, "pictures_test": 24}
MADE = [scenes.sample_scene(8, number, held_out=False) for number in range(80)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    full.write(folder, 3, **SIZE)
    return folder


@cache
def read(root: Path, name: str, section: str = "train") -> list[Sample]:
    card = load(name)
    records = open_records(getattr(card, section), root, card)
    return [records[place] for place in range(len(records))]


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(root: Path, name: str) -> list[text.Rendered]:
    card = load(name)
    assert card.train
    templates = text.load_templates(card.train.template)
    found = [text.render_train(card.train, templates, sample, seed=0, number=0) for sample in read(root, name)]
    return [row for each in found for row in each]


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_ordinary_demos_annotations_are_what_they_were(tmp_path: Path) -> None:
    formats.write(tmp_path / "data", 5, pictures_train=24, pictures_test=12)
    state = hashlib.sha256()
    for path in sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        state.update(path.relative_to(tmp_path / "data").as_posix().encode())
        if path.suffix in (".json", ".jsonl"):
            state.update(path.read_bytes())
    assert state.hexdigest() == "f246beaa99446376c7d1ee7b4461de130c6cacf199ff43557783df7bf981bbee"


def test_what_the_ordinary_demo_has_is_byte_for_byte_in_the_full_one(root: Path, tmp_path: Path) -> None:
    formats.write(tmp_path / "data", 3, **SIZE)
    for path in (path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != formats.DONE):
        assert (root / path.relative_to(tmp_path / "data")).read_bytes() == path.read_bytes()


def test_the_same_seed_writes_the_same_files_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        full.write(tmp_path / name, seed, pictures_train=6, pictures_test=4)
    first, again, other = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in sorted(tmp_path.iterdir())
    )
    assert first == again
    for name in (
        "web_capfilt/annotation.json",
        "textcaps/TextCaps_0.1_train.json",
        "ocrvqa/dataset.json",
        "visdial/visdial_1.0_val.json",
    ):
        assert first[Path(name)] != other[Path(name)]


def test_every_picture_is_counted_once(tmp_path: Path) -> None:
    told: list[int] = []
    full.write(tmp_path / "data", 0, pictures_train=4, pictures_test=5, advance=told.append)
    assert sum(told) == full.picture_count(4, 5) > formats.picture_count(4, 5)
    assert loaded(tmp_path / "data" / formats.DONE) == formats.contents(0, 4, 5, full=True)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        with pytest.raises(DataError, match=r"data: writing a video needs PyAV: pip install 'qformer\[video\]'"):
            full.write(tmp_path / "data", 0, pictures_train=4, pictures_test=4)
    assert not list(tmp_path.iterdir())

    def broken(*_: object, **__: object) -> None:
        raise DataError("no room.")

    monkeypatch.setattr(heldout, "write", broken)
    with pytest.raises(DataError, match=r"no room\."):
        full.write(tmp_path / "data", 0, pictures_train=4, pictures_test=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEW)
def test_new_sets_are_read_and_rendered_through_their_own_cards(root: Path, name: str) -> None:
    samples = read(root, name)
    assert len(samples) >= 10
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.images and path.is_file() for sample in samples for path in sample.images)
    for row in rows(root, name):
        assert row.target.strip()
        assert "{" not in row.instruction + row.target
        assert "<image>" not in row.instruction


@pytest.mark.parametrize("name", SCORED)
def test_splits_that_are_scored_are_read_too_and_show_other_pictures(root: Path, name: str) -> None:
    card = load(name)
    assert card.eval
    templates = text.load_templates(card.eval.template)
    samples = read(root, name, "eval")
    for sample in samples:
        assert sample.references
        assert text.render_eval(card.eval, templates, sample).instruction
    seen = {path for sample in read(root, name) for path in sample.images}
    assert not seen & {path for sample in samples for path in sample.images}


def test_sets_share_pictures_as_the_official_ones_do(root: Path) -> None:
    def shown(name: str) -> set[bytes]:
        return {path.read_bytes() for sample in read(root, name) for path in sample.images}

    coco = shown("coco_caption")
    for name in ("okvqa", "llava_detail", "llava_reasoning", "vqg_okvqa", "vqg_aokvqa"):
        assert shown(name) < coco
    own = [shown(name) for name in ("web_capfilt", "textcaps", "ocrvqa")]
    assert sum(map(len, [coco, *own])) == len(coco.union(*own))


def test_most_records_are_web_captions_and_the_config_keeps_the_papers_order(root: Path) -> None:
    counts = {name: len(read(root, name)) for name in NEW + OLD}
    assert max(counts, key=counts.__getitem__) == "web_capfilt"
    tasks = config.load("demo_full").data.tasks
    assert sorted(tasks) == sorted(counts)
    sizes = {name: section.size for name in tasks if (section := load(name).train) and section.size}
    shares = cards.probabilities(sizes, tasks)
    assert max(shares, key=shares.__getitem__) == "web_capfilt"


# -- what is in them --------------------------------------------------------------------------------------------------


def test_no_words_name_a_pair_that_is_held_out(root: Path) -> None:
    held_out = re.compile("|".join(rf"\b{colour}( \w+)? {shape}" for colour, shape in sorted(HELD_OUT_PAIRS)))
    for name in NEW:
        for row in rows(root, name):
            assert not held_out.search(f"{row.instruction} {row.target}"), row


@pytest.mark.parametrize("name", ["okvqa", "ocrvqa", "llava_reasoning"])
def test_yes_and_no_are_equally_often_right(root: Path, name: str) -> None:
    said = Counter(re.split(r"\W", row.target.lower())[0] for row in rows(root, name))
    assert said["yes"] == said["no"] > 0


def test_five_people_typed_two_answers_each_and_most_are_right(root: Path) -> None:
    typed = [row["answers"] for row in loaded(root / "okvqa/mscoco_train2014_annotations.json")["annotations"]]
    typed += [row["answers"] for row in loaded(root / "okvqa/mscoco_val2014_annotations.json")["annotations"]]
    for answers in typed:
        assert [each["answer_id"] for each in answers] == list(range(1, 11))
        assert all(count % 2 == 0 for count in Counter(each["raw_answer"] for each in answers).values())
        assert Counter(each["answer"] for each in answers).most_common(1)[0][1] >= 8
    typed = [thirteen.ten_typed(ask, number) for number, (_, ask) in enumerate(found("fact")) if ask.type == "shape"]
    plural = [each for answers in typed for each in answers if each[0] != each[1]]
    assert 0 < len(plural) < 0.1 * sum(map(len, typed))
    assert all(raw in (f"{stem}s", f"{stem}es") and stem in SHAPES for raw, stem in plural)


def test_no_picture_of_a_held_out_set_is_trained_on(root: Path) -> None:
    trained = {path.read_bytes() for name in (*OLD, *NEW) for path in pictures(root, name, "train")}
    scored = {path.read_bytes() for card in shipped("held_out") for path in pictures(root, card, "eval")}
    assert len(trained) > 500 and len(scored) > 500 and not trained & scored


def shipped(role: str) -> list[str]:
    return [name for name in resources.names("tasks") if load(name).role == role]


def pictures(root: Path, name: str, section: str) -> Iterator[Path]:
    for sample in read(root, name, section):
        for picture in sample.images:
            path = picture.path if isinstance(picture, Video) else picture
            assert isinstance(path, Path)
            yield from path.iterdir() if path.is_dir() else [path]


def test_all_26_cards_read_what_is_written(root: Path) -> None:
    assert len(shipped("held_in")) == len(shipped("held_out")) == 13
    for name in shipped("held_out"):
        assert len(read(root, name, "eval")) >= 15
    for name in shipped("held_in"):
        if load(name).eval is not None:
            assert len(read(root, name, "eval")) >= 2  # few covers are hard to balance
    chosen = cards.load_all(config.load("demo_full").evaluate.tasks, "eval")
    assert {name for name in chosen if ":" not in name} == {
        name for name in resources.names("tasks") if load(name).eval is not None
    }


def test_machines_read_most_words_where_they_are_drawn(root: Path) -> None:
    rosetta = loaded(root / "textvqa/TextVQA_Rosetta_OCR_v0.2_train.json")["data"]
    written = {row["image_id"]: row["caption_str"] for row in loaded(root / "textcaps/TextCaps_0.1_train.json")["data"]}
    assert {row["image_id"] for row in rosetta} == set(written)
    right = 0
    for row in rosetta:
        with Image.open(root / f"textvqa/train_images/{row['image_id']}.jpg") as picture:
            grey = picture.convert("L")
        for word, seen in zip(row["ocr_tokens"], row["ocr_info"], strict=True):
            box = {name: round(value * scenes.PICTURE) for name, value in seen["bounding_box"].items()}
            left, top = box["top_left_x"], box["top_left_y"]
            inside = grey.crop((left, top, left + box["width"], top + box["height"]))
            assert inside.getextrema()[0] < 60
            right += written[row["image_id"]].endswith(word) or f"saying {word}" in written[row["image_id"]]
    assert 0.6 * len(rosetta) < right < len(rosetta)


def test_a_picture_in_which_nothing_was_read_leaves_no_empty_phrase(root: Path) -> None:
    samples = {sample.id: sample for sample in read(root, "textcaps")}
    assert {bool(sample.fields["ocr"]) for sample in samples.values()} == {True, False}
    card = cards.load("textcaps")
    assert card.train
    templates = text.load_templates(card.train.template)
    for sample in samples.values():
        [row] = text.render_train(card.train, templates, sample, seed=0, number=0)
        assert ("OCR tokens" in row.instruction) == bool(sample.fields["ocr"])


def test_covers_are_asked_about_their_word(root: Path) -> None:
    books = loaded(root / "ocrvqa/dataset.json")
    assert {book["split"] for book in books.values()} == {1, 2, 3}
    for book in books.values():
        assert book["title"] in WORDS
        for question, answer in zip(book["questions"], book["answers"], strict=True):
            if "written here" in question:
                assert answer == ("yes" if f" {book['title']} " in question else "no")
            elif question.startswith("What word"):
                assert answer == book["title"]
            else:
                assert f"saying {book['title']}" in question
    assert set(loaded(root / "ocrvqa/ocr_tokens.json")) >= set(books)


# -- what is asked and said -------------------------------------------------------------------------------------------


def found(form: str) -> Iterator[tuple[Scene, Ask]]:
    for scene in MADE:
        for ask in scenes.asks(scene, form, "test", table=sayings.FORMS):
            yield scene, ask


def the_thing(scene: Scene, words: str) -> Thing:
    """The one thing that all of the words fit."""
    told = [word for word in words.split() if word != "thing"]
    [thing] = [
        thing
        for thing in scene.things
        if all(word in (thing.size, thing.colour, thing.material, thing.shape) for word in told)
    ]
    return thing


@pytest.mark.parametrize("form", [form for form in sayings.FORMS if form not in scenes.FORMS])
def test_new_forms_ask_often_and_of_what_is_there(form: str) -> None:
    asked = list(found(form))
    assert len({scene.number for scene, _ in asked}) > 30
    for scene, ask in asked:
        assert ask.form == form
        assert ask.answer
        assert ask.question.endswith("?")
        assert all(words in ask.question and thing in scene.things for words, thing in ask.mentions)


def test_facts_lead_to_one_thing_and_never_say_its_value() -> None:
    kinds = set()
    for scene, ask in found("fact"):
        [(words, thing)] = ask.mentions
        [known] = [
            (kind, value) for kind, facts in sayings.FACTS.items() for value, fact in facts.items() if fact in words
        ]
        kinds.add(known[0])
        assert [other for other in scene.things if getattr(other, known[0]) == known[1]] == [thing]
        assert known[1] not in words.split()
        assert ask.answer == scenes.value_of(thing, ask.type) and ask.type != known[0]
    assert kinds == {"colour", "shape", "material", "word"}
    assert {kind: set(facts) for kind, facts in sayings.FACTS.items()} == {
        "colour": set(COLOURS),
        "shape": set(SHAPES),
        "material": set(VALUES["material"]),
        "word": set(WORDS),
    }


def test_what_a_material_is_good_for_is_true_of_it_alone() -> None:
    named = {"bounce": "rubber", "magnets": "metal", "carpenters": "wood"}
    for _, ask in found("suits"):
        [(_, thing)] = ask.mentions
        assert ask.answer == ("yes" if thing.material == named[ask.question.rstrip("?").split()[-1]] else "no")


def test_reasoning_is_right_and_its_words_do_not_tell_the_answer() -> None:
    for scene, ask in found("same"):
        one, other, attribute = ask.mentions[0], ask.mentions[1], ask.question.split(" of the same ")[1].split()[0]
        values = [scenes.value_of(the_thing(scene, words), attribute) for words, _ in (one, other)]
        assert ask.answer == ("yes" if values[0] == values[1] else "no")
        assert ask.sentence.lower().startswith(f"{ask.answer}, the {one[0]} is ")
        assert all(value in ask.sentence and value not in ask.question.split() for value in values)
    for scene, ask in found("further"):
        first, second = (the_thing(scene, words) for words in ask.options)
        relation = next(relation for way, relation in sayings.FURTHER.items() if f" {way}," in ask.question)
        [right] = [words for words, a, b in zip(ask.options, (first, second), (second, first), strict=True)
                   if scenes.RELATIONS[relation](a, b)]  # fmt: skip
        assert ask.answer == right
        assert ask.sentence.startswith(f"The {right} is {relation} the ")
    for scene, ask in found("alike"):
        attribute = ask.question.split()[4]
        one, other = ask.mentions[0][1], the_thing(scene, ask.answer)
        assert one != other
        assert scenes.value_of(one, attribute) == scenes.value_of(other, attribute)
        assert scenes.value_of(one, attribute) not in ask.question.split()
        assert ask.sentence.startswith(f"The {ask.answer} is ")


def test_a_long_description_tells_everything_of_every_thing() -> None:
    for scene in MADE:
        told = sayings.description(scene, Dice("test"))
        for thing in scene.things:
            assert f"{thing.size} {thing.colour} {thing.material} {thing.shape} at the {thing.place}" in told
            assert thing.word is None or f"{thing.place} saying {thing.word}" in told


def test_web_captions_are_short_and_mostly_true() -> None:
    true = []
    for number in range(200):
        scene = scenes.sample_scene(8, number, held_out=False, things=(2,))
        names = {scenes.name(thing) for thing in scene.things}
        first, *rest = sayings.web_captions(scene, Dice("test", number))
        assert len(first.split()) <= 7
        assert len(rest) <= 1
        said = set(re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", first))
        true.append({" ".join(pair) for pair in said} <= names)
    assert 0.85 * len(true) < sum(true) < len(true)
