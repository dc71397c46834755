"""The held-out sets of pictures that the ordinary demo does not have, in their official files.

Flickr30K, TextVQA, Visual Dialog, HatefulMemes, VizWiz and ScienceQA.  All show only pairs of colour and shape that no
training picture shows, and ask as no training set does (`unseen`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

from qformer import keyed
from qformer.demo import formats, scenes, thirteen, unseen
from qformer.demo.formats import BLOCK, image_id, put, ten_answers
from qformer.demo.scenes import CELL, PICTURE, WORDS, Ask, Dice, Scene
from qformer.demo.unseen import CANDIDATES, ROUNDS, UNANSWERABLE, Round

FLICKR, TEXTVQA, VISDIAL, MEMES, VIZWIZ, SCIENCEQA = range(20, 26)
"""Blocks of scene numbers."""
READING_FORMS = ("reads", "label", "says_so", "text", "label")
BLIND_FORMS = ("tell", "this", "see", "tell", "many", "missing", "tell", "see")
PROBLEM_FORMS = ("matter", "property", "map", "property")
ANSWER_TYPE = {"yes/no": "yes/no", "number": "number", UNANSWERABLE: UNANSWERABLE}
"""VizWiz' types of answers; all that is not here is `other`."""
FIRST_MEME = 1000
"""Of four digits, which files are named by with a zero in front."""


def write(root: Path, seed: int, *, pictures_test: int, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write the six sets under `root`; the same files for the same arguments.

    Flickr30K has `pictures_test` pictures of test with five captions each and a tenth as many of val; TextVQA a tenth
    more pictures, with two questions each; HatefulMemes, VizWiz and ScienceQA, which have one item a picture, twice as
    many and a little.  Visual Dialog has a fifth as many, of ten rounds each: a round has a hundred candidates.
    """
    pictures = _pictures(pictures_test)
    for block, write_set in (
        (FLICKR, _flickr30k),
        (TEXTVQA, _textvqa),
        (VISDIAL, _visdial),
        (MEMES, _hatefulmemes),
        (VIZWIZ, _vizwiz),
        (SCIENCEQA, _scienceqa),
    ):
        write_set(root, seed, pictures[block], advance)


def picture_count(pictures_test: int) -> int:
    """How many pictures `write` makes."""
    return sum(_pictures(pictures_test).values())


def _pictures(test: int) -> dict[int, int]:
    """Pictures by block; some more than asked for where evening out the answers leaves questions out."""
    single = -(-test * 22 // 10)
    return {
        FLICKR: test + test // 10,
        TEXTVQA: -(-test * 11 // 10),
        VISDIAL: -(-test // 5),
        MEMES: single,
        VIZWIZ: single,
        SCIENCEQA: single,
    }


def _made(seed: int, block: int, pictures: int) -> list[Scene]:
    return formats.make_scenes(seed, block, pictures, held_out=True)


def _asked(made: Sequence[Scene], forms: Sequence[str], per_scene: int, name: str) -> list[tuple[Scene, Ask]]:
    return scenes.balanced(made, forms, per_scene, name, table=unseen.FORMS)


# -- Flickr30K --------------------------------------------------------------------------------------------------------


def _flickr30k(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    images = []
    for place, scene in enumerate(_made(seed, FLICKR, pictures)):
        name = f"{1_000_000_000 + image_id(scene)}.jpg"
        formats.save(scene, root / f"flickr30k/flickr30k-images/{name}")
        said = [
            {"tokens": raw.lower().replace(",", "").split()[:-1], "raw": raw, "imgid": place, "sentid": 5 * place + n}
            for n, raw in enumerate(unseen.sentences(scene))
        ]
        split = "val" if place % 11 == 10 else "test"
        ids = {"sentids": [each["sentid"] for each in said], "imgid": place}
        images.append({**ids, "sentences": said, "split": split, "filename": name})
        advance(1)
    put(root / "flickr30k/dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


# -- TextVQA ----------------------------------------------------------------------------------------------------------


def _textvqa(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    found = (scenes.sample_scene(seed, number, held_out=True) for number in count(TEXTVQA * BLOCK))
    made = list(islice(thirteen.with_word(found), pictures))
    names = {scene.number: f"{keyed.keyed_hash('textvqa', seed, scene.number):016x}" for scene in made}
    tokens = []
    for scene in made:
        formats.save(scene, root / f"textvqa/train_images/{names[scene.number]}.jpg")  # those of val lie there
        seen = thirteen.seen_words(scene, Dice("textvqa", seed, scene.number))
        tokens.append({"image_id": names[scene.number], **seen})
        advance(1)
    rows = []
    for place, (scene, ask) in enumerate(_asked(made, READING_FORMS, 2, "textvqa")):
        said = ten_answers(ask, "textvqa", place)
        if ask.type == "word":
            said = _typed(said, Dice("textvqa typed", seed, place))
        rows.append(
            {
                "question": ask.question.lower(),
                "image_id": names[scene.number],
                "image_classes": sorted({thing.shape.capitalize() for thing in scene.things}),
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "image_width": PICTURE,
                "image_height": PICTURE,
                "answers": said,
                "question_tokens": ask.question.lower().removesuffix("?").split(),
                "question_id": 34602 + place,
                "set_name": "val",
            }
        )
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    put(root / "textvqa/TextVQA_0.5.1_val.json", {**head, "data": rows})
    thirteen.put_tokens(root, "val", tokens)


def _typed(said: Sequence[str], dice: Dice) -> list[str]:
    """As people type what they read: some in capitals, and one of fifty of them nothing."""
    return ["" if dice.chance(0.02) else word.upper() if dice.chance(0.2) else word for word in said]


# -- Visual Dialog ----------------------------------------------------------------------------------------------------


def _visdial(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    given: Counter[tuple[str, str]] = Counter()
    found = (scenes.sample_scene(seed, number, held_out=True) for number in count(VISDIAL * BLOCK))
    spoken = ((scene, unseen.dialogue(scene, number, given)) for number, scene in enumerate(found))
    questions, answers = _Numbered(), _Numbered()
    dialogs, judged = [], []
    for scene, rounds in islice(((scene, rounds) for scene, rounds in spoken if rounds is not None), pictures):
        number = image_id(scene)
        formats.save(scene, root / f"visdial/VisualDialog_val2018/VisualDialog_val2018_{number:012d}.jpg")
        said = []
        chosen = Dice("dense", seed, scene.number).below(ROUNDS)
        for place, each in enumerate(rounds):
            options = _candidates(each, Dice("candidates", seed, scene.number, place))
            exchange = {"question": questions[each.question], "answer": answers[each.answer]}
            numbered = [answers[option] for option in options]
            said.append({**exchange, "answer_options": numbered, "gt_index": options.index(each.answer)})
            if place == chosen:
                relevance = [_relevance(option, each.answer) for option in options]
                judged.append({"image_id": number, "round_id": place + 1, "gt_relevance": relevance})
        dialogs.append({"image_id": number, "caption": scenes.captions(scene, 1, "visdial")[0], "dialog": said})
        advance(1)
    data = {"questions": list(questions), "answers": list(answers), "dialogs": dialogs}
    put(root / "visdial/visdial_1.0_val.json", {"version": "1.0", "split": "val2018", "data": data})
    put(root / "visdial/visdial_1.0_val_dense_annotations.json", judged)


class _Numbered(dict[str, int]):
    """Numbers of texts in the order in which they are met."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _candidates(each: Round, dice: Dice) -> list[str]:
    """A hundred answers, the right one among them."""
    others = [reply for reply in unseen.replies() if reply != each.answer]
    return dice.shuffled([each.answer, *dice.shuffled(others)[: CANDIDATES - 1]])


def _relevance(option: str, answer: str) -> float:
    """How many of five people found an option fitting: all the right one, some of them one that holds it."""
    return 1.0 if option == answer else 0.4 if set(answer.split()) <= set(option.split()) else 0.0


# -- HatefulMemes -----------------------------------------------------------------------------------------------------


def _hatefulmemes(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    made = _made(seed, MEMES, pictures)
    asked = {scene.number: ask for scene, ask in _asked(made, ("mean",), 1, "hatefulmemes")}
    lines = []
    for place, scene in enumerate(made, FIRST_MEME):
        if (ask := asked.get(scene.number)) is not None:
            path = root / f"hatefulmemes/img/{place:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            meme(scene, ask.question).save(path)
            row = {"id": place, "img": f"img/{place:05d}.png", "label": int(ask.answer == "yes"), "text": ask.question}
            lines.append(json.dumps(row) + "\n")
        advance(1)
    (root / "hatefulmemes/dev_seen.jsonl").write_text("".join(lines), encoding="utf-8")


def meme(scene: Scene, text: str) -> Image.Image:
    """A scene with two words of a text under its top row, and the others at its lower end.

    Its own words are left out, and all things stand where those with a word do.
    """
    lifted = 4 / PICTURE
    things = tuple(
        replace(thing, word=None, y=(thing.row * CELL + CELL // 2) / PICTURE - lifted) for thing in scene.things
    )
    picture = scenes.draw(replace(scene, things=things))
    words = text.split()
    for row, line in ((0, words[:2]), (2, words[2:])):
        mask = scenes.written(" ".join(line))
        at = (PICTURE - mask.width) // 2, (row + 1) * CELL - mask.height - 1
        picture.paste((20, 20, 20), at, mask)
    return picture


# -- VizWiz -----------------------------------------------------------------------------------------------------------


def _vizwiz(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    made = _made(seed, VIZWIZ, pictures)
    asked = {scene.number: ask for scene, ask in _asked(made, BLIND_FORMS, 1, "vizwiz")}
    rows: list[dict[str, Any]] = []
    for scene in made:
        if (ask := asked.get(scene.number)) is not None:
            dice = Dice("vizwiz", seed, scene.number)
            name = f"VizWiz_val_{len(rows):08d}.jpg"
            path = root / f"vizwiz/val/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            badly_taken(scene, dice).save(path, quality=95, subsampling=0)
            said = ten_answers(ask, "vizwiz", scene.number, wrong=_unsure(ask))
            rows.append(
                {
                    "image": name,
                    "question": f"{ask.question} Thank you." if dice.chance(0.2) else ask.question,
                    "answers": [
                        {"answer": each, "answer_confidence": "yes" if each == ask.answer else dice.choose(UNSURE)}
                        for each in said
                    ],
                    "answer_type": ANSWER_TYPE.get(ask.type, "other"),
                    "answerable": int(ask.type != UNANSWERABLE),
                }
            )
        advance(1)
    put(root / "vizwiz/Annotations/val.json", rows)


UNSURE = ("maybe", "no")


def _unsure(ask: Ask) -> Sequence[str]:
    """What one of ten who does not say the right thing may say instead."""
    if ask.type == UNANSWERABLE:
        return ("unsuitable",)
    if ask.type == "name":
        return (UNANSWERABLE, ask.answer.split()[1])
    return (UNANSWERABLE, *formats.near_answers(ask))


def badly_taken(scene: Scene, dice: Dice) -> Image.Image:
    """A scene as somebody takes it who cannot see it: in one of four a little out of focus, in another too dark."""
    picture = scenes.draw(scene)
    chance = dice.below(4)
    if chance == 0:
        return picture.filter(ImageFilter.GaussianBlur(0.7))
    return ImageEnhance.Brightness(picture).enhance(0.8) if chance == 1 else picture


# -- ScienceQA --------------------------------------------------------------------------------------------------------


def _scienceqa(root: Path, seed: int, pictures: int, advance: Callable[[int], None]) -> None:
    made = _made(seed, SCIENCEQA, pictures)
    asked = {scene.number: ask for scene, ask in _asked(made, PROBLEM_FORMS, 1, "scienceqa")}
    problems: dict[str, dict[str, Any]] = {}
    for place, scene in enumerate(made):
        if (ask := asked.get(scene.number)) is not None:
            number = str(len(problems) + 1)
            formats.save(scene, root / f"scienceqa/images/test/{number}/image.png")
            problems[number] = _problem(ask, "image.png")
            if place % 10 == 0:  # as in the set, not every problem has a picture
                problems[str(len(problems) + 1)] = _problem(_spelling(Dice("spelling", seed, place)), None)
        advance(1)
    put(root / "scienceqa/problems.json", problems)
    empty: dict[str, list[str]] = {split: [] for split in ("train", "val", "trainval", "minitrain", "minival")}
    put(root / "scienceqa/pid_splits.json", {**empty, "test": list(problems), "minitest": []})


def _problem(ask: Ask, image: str | None) -> dict[str, Any]:
    about = unseen.SUBJECTS[ask.form]
    return {
        "question": ask.question,
        "choices": list(ask.options),
        "answer": ask.options.index(ask.answer),
        "hint": about.hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": about.subject,
        "topic": about.topic,
        "category": about.category,
        "skill": about.skill,
        "lecture": about.lecture,
        "solution": ask.sentence,
        "split": "test",
    }


def _spelling(dice: Dice) -> Ask:
    """A problem without a picture."""
    options = tuple(dice.shuffled(WORDS)[:3])
    first = min(options)
    said = f"The word {first} comes first."
    return Ask("Which word comes first in a dictionary?", first, "spelling", "word", said, options=options)
