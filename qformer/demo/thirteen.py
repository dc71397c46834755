"""The eight held-in sets that the ordinary demo does not have, so that with its five there are all thirteen.

OKVQA and LLaVA's descriptions and reasoning show pictures of COCO Caption, as the official ones do; Web CapFilt,
TextCaps and OCR-VQA have pictures of their own.  Question generation from OKVQA and A-OKVQA needs no files of its own.
All show only pairs of colour and shape that training may show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from qformer import keyed
from qformer.demo import formats, sayings, scenes
from qformer.demo.formats import BLOCK, COCO_INFO, image_id, put, save
from qformer.demo.scenes import Ask, Dice, Scene, Thing

WEB, TEXTCAPS, TEXTCAPS_VAL, OCRVQA = range(formats.NOCAPS + 1, formats.NOCAPS + 5)
FACT_FORMS = ("fact", "fact", "suits")
READING_FORMS = ("word", "title", "says", "written")
REASONING_FORMS = ("same", "further", "alike")
CATEGORY = {"fact": "one", "suits": "two"}
"""OKVQA calls its categories by numbers."""
SPLITS = {"train": 1, "val": 2, "test": 3}
"""OCR-VQA's numbers for them."""


def write(
    root: Path,
    shown: formats.Shown,
    seed: int,
    *,
    pictures_train: int,
    pictures_test: int,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the files of the other eight under `root`, where those of the ordinary demo are.

    To `pictures_train` pictures of COCO Caption, which are `shown`, come three times as many from the web with one or
    two captions each, half as many for OCR-VQA with four questions each (two in val and test), a quarter with five
    captions each for TextCaps.  One in six of COCO's pictures has a question of OKVQA, one in five a long description,
    two in three a question to reason about.  TextCaps and OKVQA have a val split, OCR-VQA val and test.
    """
    train = shown["train"]
    put(root / "llava/detail_23k.json", [_described(scene) for scene in train[::5]])
    put(root / "llava/complex_reasoning_77k.json", _reasoning([s for n, s in enumerate(train) if n % 3]))
    _okvqa(root, train[::6], "train")
    _okvqa(root, shown["val"], "val")
    pictures = _own_pictures(pictures_train, pictures_test)
    _capfilt(root, list(islice(_scenes(seed, WEB, (2,)), pictures[WEB])), advance)
    for block, split in ((TEXTCAPS, "train"), (TEXTCAPS_VAL, "val")):
        _textcaps(root, list(islice(with_word(_scenes(seed, block)), pictures[block])), split, advance)
    _ocrvqa(root, list(islice(with_word(_scenes(seed, OCRVQA)), pictures[OCRVQA])), advance)


def picture_count(pictures_train: int, pictures_test: int) -> int:
    """How many pictures `write` makes."""
    return sum(_own_pictures(pictures_train, pictures_test).values())


def _own_pictures(train: int, test: int) -> dict[int, int]:
    """Pictures of the sets that do not share COCO's, by block."""
    return {WEB: 3 * train, TEXTCAPS: train // 4, TEXTCAPS_VAL: test // 2, OCRVQA: train // 2}


def _scenes(seed: int, block: int, things: Sequence[int] = (3, 4)) -> Iterator[Scene]:
    """Scenes of a set without end."""
    return (scenes.sample_scene(seed, number, held_out=False, things=things) for number in count(block * BLOCK))


def with_word(found: Iterable[Scene]) -> Iterator[Scene]:
    """Those in which a word is written."""
    return (scene for scene in found if any(thing.word for thing in scene.things))


# -- on COCO's pictures: OKVQA, LLaVA detail and reasoning ------------------------------------------------------------


def _okvqa(root: Path, made: Sequence[Scene], split: str) -> None:
    questions, annotations = [], []
    for scene, ask in scenes.balanced(made, FACT_FORMS, 1, "okvqa", split, table=sayings.FORMS):
        ids = {"image_id": image_id(scene), "question_id": image_id(scene) * 10 + 5}
        questions.append({**ids, "question": ask.question})
        annotations.append(
            {
                **ids,
                "question_type": CATEGORY[ask.form],
                "answer_type": "other",
                "answers": [
                    {"answer_id": place, "raw_answer": raw, "answer_confidence": "yes", "answer": stem}
                    for place, (raw, stem) in enumerate(ten_typed(ask, split, ids["question_id"]), 1)
                ],
                "confidence": 5,
            }
        )
    head = {"info": COCO_INFO, "license": {}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
    put(
        root / f"okvqa/OpenEnded_mscoco_{split}2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    put(root / f"okvqa/mscoco_{split}2014_annotations.json", {**head, "annotations": annotations})


def ten_typed(ask: Ask, *key: object) -> list[tuple[str, str]]:
    """What five people typed, and its stem, each twice: four or five are right, and one may have typed a plural."""
    dice = Dice("typed", *key)
    right = 4 + dice.below(2)
    typed = [(ask.answer, ask.answer)] * right
    typed += [(wrong, wrong) for wrong in dice.shuffled(formats.near_answers(ask))[: 5 - right]]
    if ask.type == "shape" and dice.chance(0.3):
        typed[0] = (scenes.several(ask.answer, "shape"), ask.answer)
    return [each for each in dice.shuffled(typed) for _ in range(2)]


def _described(scene: Scene) -> dict[str, Any]:
    dice = Dice("llava detail", scene.seed, scene.number)
    return formats.conversation(scene, [(dice.choose(sayings.DETAIL), sayings.description(scene, dice))])


def _reasoning(made: Sequence[Scene]) -> list[dict[str, Any]]:
    found = scenes.balanced(made, REASONING_FORMS, 1, "llava reasoning", table=sayings.FORMS)
    return [formats.conversation(scene, [(ask.question, ask.sentence)]) for scene, ask in found]


# -- on pictures of their own: Web CapFilt, TextCaps, OCR-VQA ---------------------------------------------------------


def _capfilt(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    rows = []
    for scene in made:
        name = f"{image_id(scene) % BLOCK // 1000:05d}/{image_id(scene):09d}.jpg"
        save(scene, root / f"web_capfilt/images/{name}")
        dice = Dice("capfilt", scene.seed, scene.number)
        rows += [{"image": name, "caption": caption} for caption in sayings.web_captions(scene, dice)]
        advance(1)
    put(root / "web_capfilt/annotation.json", rows)


def _textcaps(root: Path, made: Sequence[Scene], split: str, advance: Callable[[int], None]) -> None:
    rows: list[dict[str, Any]] = []
    tokens = []
    for scene in made:
        name = f"{keyed.keyed_hash('textcaps', scene.seed, scene.number):016x}"
        save(scene, root / f"textvqa/train_images/{name}.jpg")  # those of val lie there too
        dice = Dice("textcaps", scene.seed, scene.number)
        captions = [sayings.caption_with_words(scene, dice) for _ in range(5)]
        about = {
            "question": "",
            "image_id": name,
            "image_classes": sorted({thing.shape.capitalize() for thing in scene.things}),
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "image_width": scenes.PICTURE,
            "image_height": scenes.PICTURE,
            "set_name": split,
            "image_name": name,
            "image_path": f"train/{name}.jpg",
        }
        for caption in captions:
            spoken = {"caption_id": len(rows), "caption_str": caption, "caption_tokens": _words(caption)}
            rows.append(
                {**about, **spoken, "reference_strs": captions, "reference_tokens": [_words(each) for each in captions]}
            )
        tokens.append({"image_id": name, **seen_words(scene, dice)})
        advance(1)
    head = {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1"}
    put(root / f"textcaps/TextCaps_0.1_{split}.json", {**head, "data": rows})
    put_tokens(root, split, tokens)


def put_tokens(root: Path, split: str, tokens: Sequence[dict[str, Any]]) -> None:
    """What was read in pictures, into the one file that TextCaps and TextVQA have for a split."""
    path = root / f"textvqa/TextVQA_Rosetta_OCR_v0.2_{split}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["data"] if path.exists() else []
    head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.2"}
    put(path, {**head, "data": [*before, *tokens]})


def _words(caption: str) -> list[str]:
    return caption.replace(",", "").split()


def seen_words(scene: Scene, dice: Dice) -> dict[str, Any]:
    """What a machine reads in the picture: in one of ten nothing, in another a word with a letter wrong."""
    read = []
    for thing in scene.things:
        chance = dice.below(10)
        if thing.word and chance > 0:
            word = thing.word if chance > 1 else dice.choose("bdghlort") + thing.word[1:]
            read.append({"word": word, "bounding_box": _box(thing, thing.word)})
    return {"ocr_tokens": [each["word"] for each in read], "ocr_info": read}


def _box(thing: Thing, word: str) -> dict[str, float]:
    """Where `scenes.draw` writes the word below a thing, as shares of the picture's sides."""
    width, height = 6 * len(word) - 1, 7
    left = round(thing.x * scenes.PICTURE) - width // 2
    top = (thing.row + 1) * scenes.CELL - height - 1
    pixels = {"width": width, "height": height, "top_left_x": left, "top_left_y": top}
    turned = {"rotation": 0.0, "roll": 0.0, "pitch": 0.0, "yaw": 0.0}
    return {**{name: round(value / scenes.PICTURE, 6) for name, value in pixels.items()}, **turned}


def _ocrvqa(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    books: dict[str, dict[str, Any]] = {}
    tokens = {}
    for scene in made:
        key = f"{image_id(scene):010d}"
        save(scene, root / f"ocrvqa/images/{key}.jpg")
        [word] = [thing.word for thing in scene.things if thing.word]
        tokens[key] = seen_words(scene, Dice("ocrvqa", scene.seed, scene.number))["ocr_tokens"]
        books[key] = {
            "imageURL": f"{key}.jpg",
            "questions": [],
            "answers": [],
            "title": word,
            "authorName": "",
            "genre": "",
            "split": SPLITS[_split(scene)],
        }
        advance(1)
    for split in SPLITS:
        part = [scene for scene in made if _split(scene) == split]
        each = 4 if split == "train" else 2
        for scene, ask in scenes.balanced(part, READING_FORMS, each, "ocrvqa", split, table=sayings.FORMS):
            book = books[f"{image_id(scene):010d}"]
            book["questions"].append(ask.question)
            book["answers"].append(ask.answer)
    put(root / "ocrvqa/ocr_tokens.json", tokens)
    put(root / "ocrvqa/dataset.json", {key: book for key, book in books.items() if book["questions"]})


def _split(scene: Scene) -> str:
    """Eight of ten are trained on."""
    return {0: "val", 1: "test"}.get(scene.number % 10, "train")
