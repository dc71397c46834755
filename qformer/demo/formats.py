"""Scenes written in the official file formats of nine data sets, where the shipped cards look for them.

Readers, cards and templates cannot tell a folder written here from a download.  Held-in sets show scenes with the
colour–shape pairs of training, held-out sets only pairs that no held-in picture shows, and ask in forms of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qformer import keyed
from qformer.demo import scenes
from qformer.demo.scenes import RELATIONS, VALUES, WORDS, Ask, Dice, Scene
from qformer.errors import DataError

DONE = "scenes.json"
"""Is written last, and says what was written."""

HELD_IN_FORMS = ("attribute", "relation", "exists", "place", "side", "relation", "count", "place", "attribute", "word")
STRUCTURAL = {"query": "query", "two_step": "query", "verify": "verify", "choose": "choose"}
"""GQA's structural type of each form of question that its scenes are asked in."""
TRAIN, VAL, GQA, VSR, ICONQA, NOCAPS = range(6)
BLOCK = 1_000_000
"""Scene numbers of a set start at its block, so that no two sets share a picture unless the official ones do."""

Shown = Mapping[str, Sequence[Scene]]
"""The scenes of COCO's pictures, by split."""
Others = Callable[[Path, Shown], None]
"""Writes further sets into a folder."""

COCO_INFO = {"description": "scenes in COCO's format", "version": "1.0", "year": 2014}


def write(
    root: Path,
    seed: int,
    *,
    pictures_train: int,
    pictures_test: int,
    advance: Callable[[int], None] = lambda count: None,
    others: Others | None = None,
) -> None:
    """Write all nine sets under `root`, which appears when all is there; the same files for the same arguments.

    Args:
        root: the future `data.root`.
        seed: of the scenes and of all choices.
        pictures_train: pictures of the held-in sets; A-OKVQA and LLaVA have half of them each, as theirs have a part.
        pictures_test: GQA and VSR get a tenth more pictures, with two questions each; IconQA and NoCaps, which have
            one item a picture, twice as many and a little; the held-in sets' own test splits half.
        advance: is told how many more pictures are written, of `picture_count`.
        others: writes further sets (`qformer.demo.full`).

    Raises:
        DataError: the folder holds other things, or cannot be written.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        raise DataError(f"{root}: it is not empty, so scenes are not written there; give another folder or remove it.")
    partial = root.with_name(f".{root.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shown = _held_in(partial, seed, pictures_train, pictures_test // 2, advance)
        for block, write_set in ((GQA, _gqa), (VSR, _vsr), (ICONQA, _iconqa), (NOCAPS, _nocaps)):
            write_set(
                partial, make_scenes(seed, block, _held_out_pictures(block, pictures_test), held_out=True), advance
            )
        if others is not None:
            others(partial, shown)
        put(partial / DONE, contents(seed, pictures_train, pictures_test, full=others is not None))
        if root.is_dir():
            root.rmdir()
        partial.rename(root)
    except (OSError, DataError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, DataError):
            raise
        raise DataError(f"{root}: the scenes cannot be written: {error}.") from None


def contents(seed: int, pictures_train: int, pictures_test: int, *, full: bool = False) -> dict[str, Any]:
    """What `DONE` says of a folder of scenes."""
    written = {"seed": seed, "pictures_train": pictures_train, "pictures_test": pictures_test}
    return {**written, "full": "26 sets"} if full else written


def picture_count(pictures_train: int, pictures_test: int) -> int:
    """How many pictures `write` makes."""
    held_out = sum(_held_out_pictures(block, pictures_test) for block in (GQA, VSR, ICONQA, NOCAPS))
    return pictures_train + pictures_test // 2 + held_out


def _held_out_pictures(block: int, pictures: int) -> int:
    """A few more than asked for, since evening out the answers leaves some questions out."""
    return -(-pictures * (21 if block in (ICONQA, NOCAPS) else 11) // 10)


def put(path: Path, content: Any) -> None:
    """Content as JSON in a file whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def make_scenes(seed: int, block: int, count: int, *, held_out: bool) -> list[Scene]:
    """The scenes of one set."""
    return [scenes.sample_scene(seed, block * BLOCK + place, held_out=held_out) for place in range(count)]


def save(scene: Scene, path: Path, *copies: Path) -> None:
    """Draw a scene into a file; copies are links where the file system has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes.draw(scene).save(path, quality=95, subsampling=0) if path.suffix == ".jpg" else scenes.draw(scene).save(path)
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            shutil.copyfile(path, copy)


def image_id(scene: Scene) -> int:
    """A number above zero that belongs to one scene of a seed."""
    return scene.number + 1


def by_scene(found: Sequence[tuple[Scene, Ask]]) -> Mapping[int, tuple[Scene, list[Ask]]]:
    """Questions gathered by picture."""
    gathered: dict[int, tuple[Scene, list[Ask]]] = {}
    for scene, ask in found:
        gathered.setdefault(scene.number, (scene, []))[1].append(ask)
    return gathered


# -- held-in: COCO Caption, VQAv2 (and question generation from it), A-OKVQA, LLaVA conversation -----------------------


def _held_in(root: Path, seed: int, train: int, val: int, advance: Callable[[int], None]) -> Shown:
    shown = {
        "train": make_scenes(seed, TRAIN, train, held_out=False),
        "val": make_scenes(seed, VAL, val, held_out=False),
    }
    karpathy: list[dict[str, Any]] = []
    for split, made in shown.items():
        for scene in made:
            number = image_id(scene)
            name = f"COCO_{split}2014_{number:012d}.jpg"
            save(scene, root / f"coco/{split}2014/{name}", root / f"coco/{split}2017/{number:012d}.jpg")
            karpathy.append(_karpathy(scene, len(karpathy), split, name))
            advance(1)
        _vqa(root, made, split)
        put(root / f"aokvqa/aokvqa_v1p0_{split}.json", _aokvqa(made[::2] if split == "train" else made, split))
    put(root / "coco/dataset_coco.json", {"dataset": "coco", "images": karpathy})
    put(root / "llava/conversation_58k.json", _llava(shown["train"][1::2]))
    return shown


def _karpathy(scene: Scene, place: int, split: str, name: str) -> dict[str, Any]:
    sentences = [
        {"tokens": text.replace(",", "").split(), "raw": text, "imgid": place, "sentid": place * 5 + number}
        for number, text in enumerate(scenes.captions(scene, 5, "coco"))
    ]
    return {
        "filepath": f"{split}2014",
        "filename": name,
        "imgid": place,
        "cocoid": image_id(scene),
        "split": "train" if split == "train" else "test",
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
    }


def _vqa(root: Path, made: Sequence[Scene], split: str) -> None:
    questions, annotations = [], []
    for scene, asked in by_scene(scenes.balanced(made, HELD_IN_FORMS, 4, "vqav2", split)).values():
        for number, ask in enumerate(asked):
            ids = {"image_id": image_id(scene), "question_id": image_id(scene) * 1000 + number}
            questions.append({**ids, "question": ask.question})
            annotations.append(
                {
                    **ids,
                    "question_type": " ".join(ask.question.lower().split()[:3]),
                    "answer_type": ask.type if ask.type in ("yes/no", "number") else "other",
                    "multiple_choice_answer": ask.answer,
                    "answers": [
                        {"answer": said, "answer_confidence": "yes" if said == ask.answer else "maybe", "answer_id": k}
                        for k, said in enumerate(ten_answers(ask, split, ids["question_id"]), 1)
                    ],
                }
            )
    head = {"info": COCO_INFO, "license": {}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
    put(
        root / f"vqav2/v2_OpenEnded_mscoco_{split}2014_questions.json",
        {**head, "task_type": "Open-Ended", "questions": questions},
    )
    put(root / f"vqav2/v2_mscoco_{split}2014_annotations.json", {**head, "annotations": annotations})


def ten_answers(ask: Ask, *key: object, wrong: Sequence[str] = ()) -> list[str]:
    """What ten people would say: nine or ten of them the right answer, the other one that is near it, or of `wrong`."""
    dice = Dice("answers", *key)
    wrong = wrong or near_answers(ask)
    right = 9 + dice.below(2)
    return dice.shuffled([ask.answer] * right + [dice.choose(wrong) for _ in range(10 - right)])


def near_answers(ask: Ask) -> Sequence[str]:
    """Wrong answers of the right kind."""
    if ask.type == "place":
        return ask.answer.split()
    known = {**VALUES, "yes/no": ("yes", "no"), "number": ("0", "1", "2", "3"), "word": WORDS}
    return [other for other in known.get(ask.type, VALUES["colour"]) if other != ask.answer]


def _aokvqa(made: Sequence[Scene], split: str) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "image_id": image_id(scene),
            "question_id": _letters("aokvqa", split, scene.number),
            "question": ask.question,
            "choices": list(ask.options),
            "correct_choice_idx": ask.options.index(ask.answer),
            "direct_answers": ten_answers(ask, "aokvqa", split, scene.number),
            "difficult_direct_answer": False,
            "rationales": [ask.sentence] * 3,
        }
        for scene, ask in scenes.balanced(made, ["options"], 1, "aokvqa", split)
    ]


def _letters(*key: object) -> str:
    """22 letters and digits, as A-OKVQA's question ids have."""
    dice = Dice("letters", *key)
    return "".join(dice.choose("abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(22))


def _llava(made: Sequence[Scene]) -> list[dict[str, Any]]:
    found = by_scene(scenes.balanced(made, HELD_IN_FORMS, 2, "llava"))
    return [conversation(scene, [(ask.question, ask.sentence) for ask in asked]) for scene, asked in found.values()]


def conversation(scene: Scene, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What was asked and answered about a scene, as LLaVA-Instruct's files have it."""
    said = []
    for number, (question, answer) in enumerate(turns):
        mark = ("<image>\n{}", "{}\n<image>")[scene.number % 2] if number == 0 else "{}"
        said.append({"from": "human", "value": mark.format(question)})
        said.append({"from": "gpt", "value": answer})
    return {"id": f"{image_id(scene):012d}", "image": f"{image_id(scene):012d}.jpg", "conversations": said}


# -- held-out: GQA, VSR, IconQA, NoCaps -------------------------------------------------------------------------------


def _gqa(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    for scene in made:
        save(scene, root / f"gqa/images/n{image_id(scene)}.jpg")
        advance(1)
    content = {}
    queries = scenes.balanced(made, ["query", "two_step"], 1, "gqa query")
    others = [scenes.balanced(made[k::2], [form], 1, "gqa", form) for k, form in enumerate(("verify", "choose"))]
    for place, (scene, ask) in enumerate(sorted([*queries, *others[0], *others[1]], key=lambda each: each[0].number)):
        name = f"20{place:07d}"
        content[name] = {
            "semantic": [],
            "entailed": [],
            "equivalent": [name],
            "question": ask.question,
            "imageId": f"n{image_id(scene)}",
            "isBalanced": True,
            "groups": {"global": ask.type, "local": f"{ask.form}-{ask.type}"},
            "answer": ask.answer,
            "semanticStr": "",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": f"{ask.type}{ask.form}", "semantic": "rel", "structural": STRUCTURAL[ask.form]},
            "fullAnswer": ask.sentence or ask.answer,
        }
    put(root / "gqa/questions1.2/testdev_balanced_questions.json", content)


def _vsr(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    for scene in made:
        save(scene, root / f"vsr/images/{image_id(scene):012d}.jpg")
        advance(1)
    lines = []
    for scene, ask in scenes.balanced(made, ["statement"], 2, "vsr"):
        subject, relation, other = split_statement(ask.question)
        row = {
            "image": f"{image_id(scene):012d}.jpg",
            "image_link": "",
            "caption": ask.question,
            "label": int(ask.answer == "true"),
            "relation": relation,
            "subj": subject,
            "obj": other,
            "annotator_id": 1,
            "vote_true_validator_id": "[1, 2]" if ask.answer == "true" else "[]",
            "vote_false_validator_id": "[]" if ask.answer == "true" else "[1, 2]",
        }
        lines.append(json.dumps(row) + "\n")
    path = root / "vsr/splits/zeroshot/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines), encoding="utf-8")


def split_statement(statement: str) -> tuple[str, str, str]:
    """Subject, relation and object of `The red cube is left of the ball.`"""
    found = re.fullmatch(rf"The (.+) is ({'|'.join(RELATIONS)}) the (.+)\.", statement)
    assert found is not None, statement
    return found[1], found[2], found[3]


def _iconqa(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    problems = {}
    kept = {scene.number: ask for scene, ask in scenes.balanced(made, ["which", "options"], 1, "iconqa")}
    for scene in made:
        if scene.number in kept:
            ask, pid = kept[scene.number], str(image_id(scene))
            save(scene, root / f"iconqa_data/iconqa/test/choose_txt/{pid}/image.png")
            problems[pid] = {
                "question": ask.question,
                "choices": list(ask.options),
                "answer": ask.options.index(ask.answer),
                "ques_type": "choose_txt",
                "grade": "grade1",
                "label": "S1",
                "skill": [ask.form],
                "unit": "scenes",
                "split": "test",
            }
        advance(1)
    put(root / "iconqa_data/problems.json", problems)
    put(
        root / "iconqa_data/pid_splits.json",
        {"choose_txt_train": [], "choose_txt_val": [], "choose_txt_test": list(problems)},
    )


def _nocaps(root: Path, made: Sequence[Scene], advance: Callable[[int], None]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene in made:
        open_images_id = f"{keyed.keyed_hash('nocaps', scene.seed, scene.number):016x}"
        picture = scenes.PICTURE
        save(scene, root / f"nocaps/images/{open_images_id}.jpg")
        images.append(
            {
                "id": image_id(scene),
                "open_images_id": open_images_id,
                "domain": "out-domain",
                "width": picture,
                "height": picture,
                "coco_url": "",
                "file_name": f"{open_images_id}.jpg",
                "license": 0,
                "date_captured": "",
            }
        )
        for text in scenes.captions(scene, 10, "nocaps"):
            annotations.append({"image_id": image_id(scene), "id": len(annotations), "caption": text})
        advance(1)
    put(
        root / "nocaps/nocaps_val_4500_captions.json",
        {"licenses": [], "info": COCO_INFO, "images": images, "annotations": annotations},
    )
