"""Scenes in the official formats: what was written is read by the shipped cards, balanced, and reproducible."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from qformer import cards, text
from qformer.cards import EvalCard
from qformer.data.readers import open_records
from qformer.demo import formats, scenes
from qformer.demo.scenes import HELD_OUT_PAIRS
from qformer.errors import DataError
from qformer.sample import Sample

HELD_IN = ["coco_caption", "vqav2", "vqg_vqav2", "aokvqa", "aokvqa:multiple_choice", "llava_conversation"]
HELD_OUT = ["gqa", "vsr", "vsr:generated", "iconqa", "nocaps"]
SIZE = {"pictures_train": 40, "pictures_test": 300}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    formats.write(folder, 3, **SIZE)
    return folder


def read(root: Path, name: str, section: str) -> list[Sample]:
    card = cards.load(name)
    records = open_records(getattr(card, section), root, card)
    return [records[place] for place in range(len(records))]


@pytest.mark.parametrize("name", HELD_IN)
def test_held_in_sets_are_read_and_rendered_through_their_own_cards(root: Path, name: str) -> None:
    card = cards.load(name)
    assert card.train
    samples = read(root, name, "train")
    assert len({sample.id for sample in samples}) == len(samples)
    part = 2 if name.startswith(("aokvqa", "llava")) else 1
    pictures, most = {sample.images for sample in samples}, SIZE["pictures_train"] // part
    assert 0.8 * most <= len(pictures) <= most  # evening out the answers may leave a picture without a question
    templates = text.load_templates(card.train.template)
    for sample in samples:
        assert all(path.is_file() for path in sample.images)
        for row in text.render_train(card.train, templates, sample, seed=0, number=0):
            assert row.target.strip()
            assert "{" not in row.instruction


@pytest.mark.parametrize("name", [*HELD_IN[:2], *HELD_IN[3:5], *HELD_OUT])
def test_scored_sets_are_read_through_their_own_cards(root: Path, name: str) -> None:
    card = cards.load(name)
    assert card.eval
    templates = text.load_templates(card.eval.template)
    for sample in read(root, name, "eval"):
        assert sample.references
        assert all(path.is_file() for path in sample.images)
        assert text.render_eval(card.eval, templates, sample).instruction
        if card.eval.answer == "rank":
            assert set(sample.references) <= set(card.eval.candidates or sample.candidates)
        if card.eval.question_type:
            assert card.eval.question_type in sample.fields


def test_pictures_open_and_have_their_scenes_size(root: Path) -> None:
    for name, section in (("vqav2", "train"), ("aokvqa", "train"), ("gqa", "eval"), ("iconqa", "eval")):
        with Image.open(read(root, name, section)[0].images[0]) as picture:
            assert picture.size == (scenes.PICTURE, scenes.PICTURE)


@pytest.mark.parametrize("name", ["gqa", "vsr", "iconqa", "nocaps"])
def test_held_out_sets_are_large_enough_for_narrow_intervals(root: Path, name: str) -> None:
    samples = read(root, name, "eval")
    assert len(samples) >= 600
    assert len({sample.images for sample in samples}) >= 300


def shares(samples: list[Sample], section: EvalCard) -> dict[str, Counter[str]]:
    """How often each majority answer is given, by the type that the card tells questions apart by."""
    found: dict[str, Counter[str]] = {}
    for sample in samples:
        kind = str(sample.fields[section.question_type]) if section.question_type else ""
        found.setdefault(kind, Counter())[Counter(sample.references).most_common(1)[0][0]] += 1
    return found


@pytest.mark.parametrize("name", ["gqa", "vsr", "iconqa"])
def test_no_answer_gives_its_type_away(root: Path, name: str) -> None:
    section = cards.load(name).eval
    assert section
    for counts in shares(read(root, name, "eval"), section).values():
        if set(counts) <= {"yes", "no", "true", "false"}:
            assert len(set(counts.values())) == 1
            assert len(counts) == 2
        else:
            assert max(counts.values()) <= 1.3 * sum(counts.values()) / len(counts)


def test_training_answers_yes_and_no_equally_often(root: Path) -> None:
    counts = Counter(Counter(sample.references).most_common(1)[0][0] for sample in read(root, "vqav2", "train"))
    assert counts["yes"] == counts["no"] > 0


def test_ten_annotators_have_a_clear_majority_and_some_doubt(root: Path) -> None:
    majorities = [Counter(sample.references).most_common(1)[0][1] for sample in read(root, "vqav2", "train")]
    assert all(len(sample.references) == 10 for sample in read(root, "vqav2", "train"))
    assert set(majorities) == {9, 10}


def test_held_out_pairs_are_in_held_out_pictures_only() -> None:
    for block in (formats.TRAIN, formats.VAL, formats.GQA, formats.VSR, formats.ICONQA, formats.NOCAPS):
        held_out = block not in (formats.TRAIN, formats.VAL)
        for scene in formats.make_scenes(0, block, 50, held_out=held_out):
            assert all(((thing.colour, thing.shape) in HELD_OUT_PAIRS) == held_out for thing in scene.things)


@pytest.mark.parametrize("name", ["coco_caption", "llava_conversation"])
def test_what_is_said_of_training_pictures_names_no_held_out_pair_as_there(root: Path, name: str) -> None:
    pairs = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for sample in read(root, name, "train"):
        said = sample.references if name == "coco_caption" else [turn.answer for turn in sample.turns]
        assert not any(pair in each for each in said for pair in pairs if " no " not in each)


def test_the_shared_pictures_of_a_scene_are_the_same_in_both_editions_of_coco(root: Path) -> None:
    older, newer = read(root, "vqav2", "train")[0].images[0], root / "coco/train2017/000000000001.jpg"
    assert older.name == "COCO_train2014_000000000001.jpg"
    assert older.read_bytes() == newer.read_bytes()


def test_sets_ask_in_the_official_words_of_their_files(root: Path) -> None:
    annotations = json.loads((root / "vqav2/v2_mscoco_train2014_annotations.json").read_text())["annotations"]
    assert {row["answer_type"] for row in annotations} == {"yes/no", "number", "other"}
    assert all(row["question_id"] // 1000 == row["image_id"] for row in annotations)
    questions = json.loads((root / "gqa/questions1.2/testdev_balanced_questions.json").read_text())
    assert {row["types"]["structural"] for row in questions.values()} == {"query", "verify", "choose"}
    statements = (root / "vsr/splits/zeroshot/test.jsonl").read_text().splitlines()
    assert {json.loads(line)["relation"] for line in statements} == set(scenes.RELATIONS)


def digest(folder: Path) -> str:
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    state = hashlib.sha256()
    for path in names:
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()


def test_the_same_seed_writes_the_same_files_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        formats.write(tmp_path / name, seed, pictures_train=4, pictures_test=4)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_every_picture_is_counted_once(tmp_path: Path) -> None:
    told: list[int] = []
    formats.write(tmp_path / "data", 0, pictures_train=4, pictures_test=5, advance=told.append)
    assert sum(told) == formats.picture_count(4, 5)
    assert json.loads((tmp_path / "data" / formats.DONE).read_text()) == {
        "seed": 0,
        "pictures_train": 4,
        "pictures_test": 5,
    }


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(DataError, match="it is not empty"):
        formats.write(tmp_path, 0, pictures_train=2, pictures_test=2)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "put", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device"):
        formats.write(tmp_path / "data", 0, pictures_train=2, pictures_test=2)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".data.partial" / "coco").mkdir(parents=True)
    (tmp_path / ".data.partial" / "coco" / "old.jpg").write_text("")
    (tmp_path / "data").mkdir()
    formats.write(tmp_path / "data", 0, pictures_train=2, pictures_test=2)
    assert not (tmp_path / "data" / "coco" / "old.jpg").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
