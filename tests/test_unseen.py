"""Six held-out sets of pictures in scenes: official files, answers that follow from pictures, forms of their own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from qformer import text
from qformer.cards import load
from qformer.data.readers import open_records
from qformer.demo import formats, heldout, scenes, thirteen, unseen
from qformer.demo.scenes import COLOURS, HELD_OUT_PAIRS, PICTURE, SHAPES, VALUES, WORDS, Ask, Dice, Scene, Thing
from qformer.sample import Sample
from tests import fixtures

TEST = 60
SETS = ("flickr30k", "textvqa", "visdial", "hatefulmemes", "vizwiz", "scienceqa")
MADE = [scenes.sample_scene(9, number, held_out=True) for number in range(120)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unseen")
    told: list[int] = []
    heldout.write(folder, 3, pictures_test=TEST, advance=told.append)
    assert sum(told) == heldout.picture_count(TEST)
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.root(tmp_path_factory.mktemp("official"))


@cache
def read(root: Path, name: str) -> list[Sample]:
    section = load(name).eval
    assert section is not None
    return list(open_records(section, root, load(name.partition(":")[0])))


def loaded(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return json.loads(path.read_text(encoding="utf-8"))


def right(sample: Sample) -> str:
    """What most people said."""
    return Counter(map(str.lower, sample.references)).most_common(1)[0][0]


# -- the files --------------------------------------------------------------------------------------------------------


def test_sets_are_as_large_as_they_are_to_be(root: Path) -> None:
    sizes = {name: (len(read(root, name)), len({sample.images for sample in read(root, name)})) for name in SETS}
    assert sizes["flickr30k"] == (TEST, TEST)
    assert sizes["visdial"] == (10 * TEST // 5, TEST // 5)
    assert sizes["textvqa"][0] >= 2 * TEST and sizes["textvqa"][1] >= TEST
    for name in ("hatefulmemes", "vizwiz", "scienceqa"):  # one item a picture
        assert sizes[name][0] == sizes[name][1] >= 2 * TEST


@pytest.mark.parametrize("name", SETS)
def test_each_is_read_and_asked_through_its_own_card(root: Path, name: str) -> None:
    section = load(name).eval
    assert section is not None
    templates = text.load_templates(section.template)
    samples = read(root, name)
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        asked = text.render_eval(section, templates, sample).instruction
        assert asked and "{" not in asked and not re.search(r"Context: (Question|$)|OCR tokens: \.", asked)
        assert sample.references and all(isinstance(path, Path) and path.is_file() for path in sample.images)
        if section.answer == "rank":
            assert sample.references[0] in (section.candidates or sample.candidates)


@pytest.mark.parametrize(
    ("file", "inside"),
    [
        ("flickr30k/dataset_flickr30k.json", ("images", "sentences")),
        ("textvqa/TextVQA_0.5.1_val.json", ("data",)),
        ("textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", ("data", "ocr_info", "bounding_box")),
        ("visdial/visdial_1.0_val.json", ("data", "dialogs", "dialog")),
        ("visdial/visdial_1.0_val_dense_annotations.json", ()),
        ("hatefulmemes/dev_seen.jsonl", ()),
        ("vizwiz/Annotations/val.json", ("answers",)),
        ("scienceqa/problems.json", ("9",)),
        ("scienceqa/pid_splits.json", ()),
    ],
)
def test_files_have_the_fields_of_the_official_ones(root: Path, official: Path, file: str, inside: tuple[str]) -> None:
    ours, theirs = (loaded(folder / file) for folder in (root, official))
    for name in ("", *inside):
        if name:
            ours, theirs = ours[name], theirs[name]
        ours, theirs = (next(filter(None, each)) if isinstance(each, list) else each for each in (ours, theirs))
        if file != "scienceqa/problems.json" or name:
            assert set(ours) == set(theirs), name


def test_files_have_the_quirks_of_the_official_ones(root: Path) -> None:
    sentences = [each for image in loaded(root / "flickr30k/dataset_flickr30k.json")["images"] for each in
                 image["sentences"]]  # fmt: skip
    assert all(each["raw"][0].isupper() and each["raw"].endswith(" .") for each in sentences)
    assert all(each["tokens"] == re.findall(r"\w+", each["raw"].lower()) for each in sentences)
    assert [each["sentid"] for each in sentences] == list(range(len(sentences)))
    assert len(read(root, "flickr30k:val")) == TEST // 10
    typed = [answer for row in loaded(root / "textvqa/TextVQA_0.5.1_val.json")["data"] for answer in row["answers"]]
    assert "" in typed and {word.upper() for word in WORDS} <= set(typed)
    memes = loaded(root / "hatefulmemes/dev_seen.jsonl")
    assert all(row["img"] == f"img/{row['id']:05d}.png" and row["img"].startswith("img/0") for row in memes)
    vizwiz = loaded(root / "vizwiz/Annotations/val.json")
    assert {row["answer_type"] for row in vizwiz} == {"other", "yes/no", "number", "unanswerable"}
    for row in vizwiz:
        said = [each["answer"] for each in row["answers"]]
        assert len(said) == 10 and (said.count("unanswerable") > 5) == (row["answerable"] == 0)
    assert 0.1 < sum(row["answerable"] == 0 for row in vizwiz) / len(vizwiz) < 0.2
    assert 0.1 < sum(row["question"].endswith(" Thank you.") for row in vizwiz) / len(vizwiz) < 0.3
    problems = loaded(root / "scienceqa/problems.json")
    assert {len(row["choices"]) for row in problems.values()} == {2, 3, 4, 5}
    assert any(row["image"] is None for row in problems.values())
    assert {bool(sample.fields["context"]) for sample in read(root, "scienceqa")} == {True, False}
    assert any("shape and colour" in sample.fields["context"] for sample in read(root, "scienceqa:hint_and_lecture"))
    assert any(not sample.fields["ocr"] for sample in read(root, "textvqa"))


def test_textcaps_and_textvqa_share_the_file_of_what_was_read(tmp_path: Path) -> None:
    for name in ("one", "other"):
        thirteen.put_tokens(tmp_path, "val", [{"image_id": name, "ocr_tokens": []}])
    found = loaded(tmp_path / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json")
    assert [row["image_id"] for row in found["data"]] == ["one", "other"] and found["dataset_type"] == "val"


# -- what is in them --------------------------------------------------------------------------------------------------


def test_words_name_no_pair_that_training_shows(root: Path) -> None:
    pair = re.compile(rf"({'|'.join(COLOURS)})( (?:rubber|metal|wood))? ({'|'.join(SHAPES)})\b")
    named = Counter()
    for name in SETS:
        for sample in read(root, name):
            fields = [
                str(sample.fields.get(each, "")) for each in ("question", "text", "history", "options", "caption")
            ]
            for said in (*fields, *sample.references, *sample.candidates):
                for found in pair.finditer(said.lower()):
                    assert (found[1], found[3]) in HELD_OUT_PAIRS, said
                    named[name] += 1
    assert set(named) == set(SETS)


@pytest.mark.parametrize("name", ["textvqa", "vizwiz", "hatefulmemes", "visdial"])
def test_yes_and_no_are_equally_often_right(root: Path, name: str) -> None:
    said = Counter(map(right, read(root, name)))
    assert said["yes"] == said["no"] > 5


def test_no_answer_is_much_more_frequent_than_others_of_its_kind(root: Path) -> None:
    kinds = {value: kind for kind, values in VALUES.items() for value in values} | dict.fromkeys(WORDS, "word")
    kinds |= dict.fromkeys("0123", "number") | {" ".join(pair): "name" for pair in HELD_OUT_PAIRS}
    for name in ("textvqa", "vizwiz", "scienceqa"):
        counts = Counter(map(right, read(root, name)))
        by_kind: dict[str, Counter[str]] = {}
        for answer, count in counts.items():
            if answer not in ("yes", "no", "unanswerable"):
                by_kind.setdefault(kinds[answer], Counter())[answer] = count
        assert len(by_kind) >= 4
        for kind, found in by_kind.items():
            assert max(found.values()) <= max(1, 1.3 * found.total() / scenes.ANSWERS[kind]), (name, kind, found)
    given: Counter[tuple[str, str]] = Counter()
    spoken = [unseen.dialogue(scene, number, given) for number, scene in enumerate(MADE)]
    rounds = [each for rounds in spoken[:60] if rounds for each in rounds]
    for kind in ("size", "material", "shape", "colour", "place", "number", "yes/no"):
        found = Counter(each.answer for each in rounds if each.type == kind)
        assert max(found.values()) <= 1.3 * found.total() / scenes.ANSWERS.get(kind, 2), found


def test_questions_are_put_as_in_no_set_that_is_trained_on(root: Path, tmp_path: Path) -> None:
    shown = {split: [scenes.sample_scene(3, n, held_out=False) for n in range(40)] for split in ("train", "val")}
    formats.write(tmp_path / "d", 3, pictures_train=60, pictures_test=4, others=lambda folder, _: thirteen.write(
        folder, shown, 3, pictures_train=60, pictures_test=4))  # fmt: skip
    trained: set[str] = set()
    for name in ("vqav2", "aokvqa", "okvqa", "ocrvqa"):
        card = load(name)
        assert card.train is not None
        trained |= {form(sample.fields["question"]) for sample in open_records(card.train, tmp_path / "d", card)}
    card = load("llava_conversation")
    assert card.train is not None
    for sample in open_records(card.train, tmp_path / "d", card):
        trained |= {form(turn.instruction) for turn in sample.turns}
    unseen_forms = {form(sample.fields["question"]) for name in ("textvqa", "vizwiz", "scienceqa", "visdial")
                    for sample in read(root, name)}  # fmt: skip
    assert len(trained) > 15 and len(unseen_forms) > 15
    assert not trained & unseen_forms


def form(question: str) -> str:
    """A question without the words that differ from scene to scene."""
    told = {word for values in VALUES.values() for word in values} | {*WORDS, *scenes.ROWS, *scenes.COLUMNS}
    told |= {f"{word}{end}" for word in told for end in ("s", "es")} | {"thing", "things", "a", "an"}
    return " ".join(word for word in re.findall(r"[\w/]+", question.lower()) if word not in told)


# -- what is asked ----------------------------------------------------------------------------------------------------


def found(name: str) -> Iterator[tuple[Scene, Ask]]:
    for scene in MADE:
        for ask in scenes.asks(scene, name, "test", table=unseen.FORMS):
            yield scene, ask


def the_thing(scene: Scene, words: str) -> Thing:
    """The one thing that all of the words fit."""
    told = [word for word in words.split() if word not in ("thing", "that", "says")]
    [thing] = [
        each for each in scene.things if all(word in (*vars(each).values(), *each.place.split()) for word in told)
    ]
    return thing


@pytest.mark.parametrize("name", unseen.FORMS)
def test_forms_ask_often_and_of_what_is_there(name: str) -> None:
    asked = list(found(name))
    assert len({scene.number for scene, _ in asked}) > 40
    for scene, ask in asked:
        assert ask.form == name and ask.answer
        assert all(words in ask.question and the_thing(scene, words) == thing for words, thing in ask.mentions)
        assert not ask.options or ask.answer in ask.options
        if ask.mentions and ask.type in VALUES:
            [(words, thing)] = ask.mentions
            assert ask.answer == scenes.value_of(thing, ask.type) and ask.answer not in words.split()


def test_what_is_written_is_asked_for() -> None:
    for name in ("reads", "says_so", "text", "label"):
        for scene, ask in found(name):
            [word] = [thing.word for thing in scene.things if thing.word]
            if name == "says_so":
                assert (ask.answer == "yes") == ask.question.endswith(f"say {word}?")
            else:
                assert ask.answer == word or (name == "label" and f"says {word}" in ask.question)
    for _, ask in found("says_so"):
        assert ask.mentions[0][1].word is not None


def test_who_cannot_see_is_told_what_is_there_and_what_is_not() -> None:
    for scene, ask in found("see"):
        assert (ask.answer == "yes") == (ask.question[len("Can you see a") :].strip(" n?") in here(scene))
    for scene, ask in found("missing"):
        assert ask.answer == "unanswerable" and not any(thing.shape in ask.question for thing in scene.things)
    for scene, ask in found("this"):
        assert scenes.name(the_thing(scene, ask.question.removeprefix("What is this at the ").strip("?"))) == ask.answer
    for scene, ask in found("many"):
        value = ask.question.split()[2]
        counted = [t for t in scene.things if value in (t.colour, t.size, t.material) or value.rstrip("es") in t.shape]
        assert value == "cubes" or len(counted) == int(ask.answer), ask


def here(scene: Scene) -> set[str]:
    return {scenes.name(thing) for thing in scene.things}


def test_a_text_is_hateful_where_it_is_mean_about_what_is_shown() -> None:
    by_text: dict[str, set[str]] = {}
    for scene, ask in found("mean"):
        assert (ask.answer == "yes") == (" ".join(ask.question.split()[-2:]) in here(scene))
        by_text.setdefault(ask.question, set()).add(ask.answer)
        labels = {each.answer for other, each in found_in(scene) if other is scene}
        assert labels == {"yes", "no"}  # the picture alone does not tell
    assert all(labels == {"yes", "no"} for labels in by_text.values())  # nor does the text
    assert len(by_text) == 3 * len(HELD_OUT_PAIRS)


def found_in(scene: Scene) -> Iterator[tuple[Scene, Ask]]:
    for ask in scenes.asks(scene, "mean", "test", table=unseen.FORMS):
        yield scene, ask


def test_memes_show_their_text_and_every_thing() -> None:
    for scene in MADE[:12]:
        said = next(found_in(scene))[1].question
        plain, written = heldout.meme(scene, "i i i i"), heldout.meme(scene, said)
        changed = ImageChops.difference(plain, written).convert("L")
        for top in (24, 88):
            assert changed.crop((0, top, PICTURE, top + 8)).getbbox() is not None
        for thing in scene.things:  # its middle keeps its colour
            for row in (24, 88):
                assert not row - 3 < (thing.row * 32 + 12) < row + 8
        assert changed.getbbox()[1] >= 24  # type: ignore[index]
        assert changed.crop((0, 32, PICTURE, 88)).getbbox() is None


def test_some_pictures_are_badly_taken() -> None:
    kinds: Counter[str] = Counter()
    for number in range(80):
        good, taken = scenes.draw(MADE[0]), heldout.badly_taken(MADE[0], Dice("test", number))
        darker = sum(mean(taken)) < 0.9 * sum(mean(good))
        kinds["dark" if darker else "good" if taken.tobytes() == good.tobytes() else "blurred"] += 1
    assert min(kinds[each] for each in ("dark", "good", "blurred")) >= 8


def mean(picture: Image.Image) -> tuple[float, ...]:
    small = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(small, tuple)
    return small


def test_problems_have_one_right_option() -> None:
    for scene, ask in found("matter"):
        [material] = [material for material, question in unseen.MATTER.items() if question == ask.question]
        assert [scenes.name(thing) for thing in scene.things if thing.material == material] == [ask.answer]
        assert f"{material}" in ask.sentence and material in unseen.SUBJECTS["matter"].hint
        assert set(ask.options) == here(scene)
    ways: Mapping[str, Any] = {"north": lambda t: t.row, "south": lambda t: -t.row, "west": lambda t: t.column,
                               "east": lambda t: -t.column}  # fmt: skip
    for scene, ask in found("map"):
        far = ways[ask.question.split()[-1].strip("?")]
        [first] = [thing for thing in scene.things if far(thing) == min(map(far, scene.things))]
        assert scenes.name(first) == ask.answer and set(ask.options) == here(scene)
    for _, ask in found("property"):
        assert (
            set(ask.options) <= set(VALUES[ask.type])
            and len(ask.options) == {"size": 2, "material": 3, "colour": 5}[ask.type]
        )


# -- dialogues --------------------------------------------------------------------------------------------------------


def test_it_is_the_thing_that_was_spoken_of_last() -> None:
    given: Counter[tuple[str, str]] = Counter()
    told = 0
    for number, scene in enumerate(MADE):
        rounds = unseen.dialogue(scene, number, given)
        if rounds is None:
            continue
        told += 1
        assert (
            len(rounds) == unseen.ROUNDS and [each.answer for each in rounds if each.type == "yes/no"].count("yes") == 2
        )
        last: Thing | None = None
        for each in rounds:
            spoken = r"and the (.+), what|thing at the (\w+ \w+)|can you see an? (.+)$"
            if named := re.search(spoken, each.question):
                words = next(filter(None, named.groups()))
                if named[3] and each.answer == "no":
                    assert words not in here(scene)
                    continue
                last = the_thing(scene, words)
            if each.type == "number":
                continue
            assert last is not None
            if each.type == "yes/no" and not each.question.startswith("can you see"):
                assert (each.question.split()[-1] in (last.material, last.size)) == (each.answer == "yes")
            elif each.type != "yes/no":
                assert each.answer == (last.place if each.type == "place" else scenes.value_of(last, each.type))
    assert told > 100


def test_a_hundred_candidates_hold_the_right_one_once(root: Path) -> None:
    assert len(set(unseen.replies())) == len(unseen.replies()) == 101
    places = Counter()
    for sample in read(root, "visdial"):
        assert len(sample.candidates) == len(set(sample.candidates)) == 100
        assert sample.references[0] in unseen.replies()
        places[sample.candidates.index(sample.references[0])] += 1
    assert len(places) > 50


def test_one_round_a_dialogue_has_relevances_and_the_right_one_fits_best(root: Path) -> None:
    dense = read(root, "visdial:dense")
    assert len(dense) == TEST // 5 and len({sample.images for sample in dense}) == TEST // 5
    for sample in dense:
        fit = dict(zip(sample.candidates, sample.fields["relevance"], strict=True))
        assert fit[sample.references[0]] == 1 and sum(value == 1 for value in fit.values()) == 1
    assert any(0.4 in sample.fields["relevance"] for sample in dense)
