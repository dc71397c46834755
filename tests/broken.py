"""Broken files: every reader over files in its official layout, each spoilt in one of many ways, the same for a seed.

Whatever is done to a file, reading it ends with samples, with records listed as broken, or with one error of ours.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from qformer import cards, text
from qformer.cards import TrainCard
from qformer.data.grouping import read_by_picture
from qformer.data.readers import READERS
from qformer.data.records import Records
from qformer.errors import QFormerError
from qformer.images import load_image
from qformer.sample import Sample, Video
from qformer.videos import frames

CARDS = (
    "aokvqa", "aokvqa:multiple_choice", "coco_caption", "gqa", "iconqa", "llava_conversation",
    "llava_conversation:turns", "nocaps", "ocrvqa:ocr", "okvqa", "scienceqa", "textcaps", "vqav2",
    "vqg_vqav2:per_answer", "vsr", "web_capfilt", "hatefulmemes", "msvd_qa", "msrvtt_qa:lavis", "textvqa",
    "visdial", "vizwiz",
)  # fmt: skip
"""Cards that together name every reader of text files but `jsonl`."""


@dataclass(frozen=True)
class Case:
    """One reader with its files, of which those in `spoilt` are text that can be spoilt."""

    name: str
    reader: str
    files: Mapping[str, Path | list[Path]]
    options: Mapping[str, Any]
    spoilt: tuple[str, ...]
    train: TrainCard | None = None

    def open(self, **changes: Path | list[Path]) -> Records:
        """The reader over the files, some of them changed."""
        return READERS[self.reader]({**self.files, **changes}, self.options, self.name)


def cases(root: Path) -> dict[str, Case]:
    """All readers over the fixtures' data root, by name; `jsonl`, `shards` and `columns` get files of their own."""
    found = {}
    for name in CARDS:
        card = cards.load(name)
        section = card.train or card.eval
        assert section is not None
        files = {role: root / path for role, path in section.files.items()}
        spoilt = tuple(role for role in files if role not in cards.MEDIA)
        found[name] = Case(name, section.reader, files, section.options, spoilt, card.train)
    for name, spoilt in (
        ("flickr30k", ("captions",)), ("ivqa:ranked", ("questions", "vocabulary")), ("textcaps:no_ocr", ("records",)),
        ("visdial:dense", ("dense",)),
    ):  # fmt: skip
        scored = cards.load(name).eval
        assert scored is not None
        files = {role: root / path for role, path in scored.files.items()}
        found[name] = Case(name, scored.reader, files, scored.options, spoilt)
    found["jsonl"] = _own(root)
    found["shards"] = Case("shards", "shards", {"shards": shards(root)}, {"caption": "json"}, ())
    options = {"columns": {"id": "key", "image": "picture", "question": "asked", "answers": "said"}}
    found["columns"] = Case("columns", "columns", {"table": parquet(root)}, options, ())
    return found


def _own(root: Path) -> Case:
    rows = [
        {"id": "a", "image": "000000000042.jpg", "instruction": "What is it?", "target": ["kite", "a kite"]},
        {"id": "b", "images": ["000000000042.jpg", "000000000051.jpg"], "instruction": "Both?", "target": "no", "n": 1},
        {"id": 3, "image": "000000000051.jpg", "turns": [{"instruction": "Who?", "answer": "Ann"}]},
        {"id": "d", "image": "000000000051.jpg", "instruction": "Ü?", "target": "a", "candidates": ["a", "ü"]},
    ]
    file = root / "own" / "records.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    section = TrainCard("jsonl", {}, "instruction")
    return Case("jsonl", "jsonl", {"records": file, "images": root / "coco" / "train2017"}, {}, ("records",), section)


def shards(root: Path) -> Path:
    """Two tar shards of the CapFilt pictures, as img2dataset writes them."""
    folder = root / "web_capfilt" / "shards"
    folder.mkdir()
    pictures = sorted((root / "web_capfilt" / "images").rglob("*.*"))
    for number in range(2):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for place, picture in enumerate(pictures[2 * number : 2 * number + 2]):
                key = f"{number:05d}{place:04d}"
                caption = f"a caption — {key}"
                said = {"caption": caption, "url": "https://example.org/a.jpg", "status": "success", "sha256": None}
                for ending, content in (
                    (picture.suffix, picture.read_bytes()),
                    (".txt", caption.encode()),
                    (".json", json.dumps(said).encode()),
                ):
                    member = tarfile.TarInfo(key + ending)
                    member.size = len(content)
                    archive.addfile(member, BytesIO(content))
    return folder


def parquet(root: Path) -> Path:
    """A folder with a table of questions about two pictures, in parquet."""
    import pyarrow
    from pyarrow import parquet as files

    folder = root / "hub" / "questions"
    folder.mkdir(parents=True)
    picture = (root / "coco" / "train2017" / "000000000042.jpg").read_bytes()
    table = {
        "key": ["a", "b", "c"],
        "picture": [{"bytes": picture, "path": "a.jpg"}, {"bytes": picture, "path": None}, None],
        "asked": ["Is it?", "Was ist das?", "Why?"],
        "said": [["yes", "yes", "no"], ["ein Drachen"], ["because"]],
    }
    files.write_table(pyarrow.table(table), folder / "train-00000-of-00001.parquet")
    return folder


# -- what comes of it -------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What reading gave: an error of the whole, or samples beside listed records."""

    error: str | None = None
    samples: list[Sample] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def outcome(case: Case, **changes: Path | list[Path]) -> Outcome:
    """Open the reader, ask for every record, render it, and open the first pictures; only our errors are caught.

    Raises:
        AssertionError: an error of ours that no terminal could print, or that says nothing.
    """
    found = Outcome()
    try:
        records = case.open(**changes)
    except QFormerError as error:
        found.error = printable(error)
        return found
    assert read_by_picture(records).records == len(records)
    templates = text.load_templates(case.train.template) if case.train else None
    for place in range(len(records)):
        try:
            sample = records[place]
            if templates is not None and case.train is not None:
                text.render_train(case.train, templates, sample, 0, 0)
            if place < 2:
                for picture in sample.images:
                    assert not isinstance(picture, str)
                    if isinstance(picture, Video):
                        list(frames(picture, 1_000_000, sample.id))
                    else:
                        load_image(picture, 1_000_000, sample.id)
            found.samples.append(sample)
        except QFormerError as error:
            found.broken.append(printable(error))
    return found


def printable(error: Exception) -> str:
    """The error's message, which must be one line that can be written anywhere."""
    message = str(error)
    message.encode()
    assert len(message) > 20, message
    return message


# -- the generator ----------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 10**25, 1.5, float("inf"), float("nan"), "", " ", "\ud800", "x" * 5000, "../../x.jpg",
    "/etc/passwd", "a\0b", "é\u202e雪", [], {}, [[]], [None], {"": None}, "{question}", "%s%d", "<image>",
)  # fmt: skip


def variants(
    seed: int, found: Mapping[str, Case], count: int, folder: Path
) -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """`count` spoilt files: a description, the case, and what to open it with."""
    dice = random.Random(seed)
    names = sorted(found)
    for number in range(count):
        name = names[number % len(names)]
        case = found[name]
        if name == "columns" and number % (8 * len(names)) >= len(names):
            case = found["jsonl"]  # reading a table costs a hundred times what reading a text does
        if not case.spoilt:
            role, source = next(iter(case.files.items()))
            assert isinstance(source, Path)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            victim = dice.choice(sorted(folder.iterdir()))
            how, content = _bytes(dice, victim.read_bytes())
            victim.write_bytes(content)
            yield f"{number} {case.name}: {how}", case, {role: folder}
            continue
        role = dice.choice(case.spoilt)
        source = case.files[role]
        assert isinstance(source, Path)
        whole = source.read_bytes()
        structured = dice.random() < 0.6 and source.suffix in (".json", ".jsonl")
        how, content = _structure(dice, whole, source.suffix) if structured else _bytes(dice, whole)
        file = folder.with_suffix(source.suffix)
        file.write_bytes(content)
        yield f"{number} {case.name}.{role}: {how}", case, {role: file}


def _structure(dice: random.Random, whole: bytes, suffix: str) -> tuple[str, bytes]:
    """Valid JSON of a wrong content: one or two places deleted, replaced, renamed, doubled or exchanged."""
    lines = [line for line in whole.decode().splitlines() if line] if suffix == ".jsonl" else [whole.decode()]
    number = dice.randrange(len(lines))
    content = json.loads(lines[number])
    told = []
    for _ in range(dice.choice((1, 1, 2))):
        places = list(_places(content))
        if not places:
            break
        holder, key = dice.choice(places)
        how = dice.choice((_delete, _replace, _replace, _replace, _rename, _double, _wrap))
        told.append(f"{how.__name__[1:]} {key!r:.40}")
        how(dice, holder, key)
    if dice.random() < 0.05:
        content = dice.choice(ODD)
        told.append("the whole")
    lines[number] = json.dumps(content, ensure_ascii=dice.random() < 0.9)
    return ", ".join(told), ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _delete(dice: random.Random, holder: Any, key: Any) -> None:
    del holder[key]


def _replace(dice: random.Random, holder: Any, key: Any) -> None:
    holder[key] = copy.deepcopy(dice.choice(ODD))


def _rename(dice: random.Random, holder: Any, key: Any) -> None:
    value = holder.pop(key)
    if isinstance(holder, dict):
        holder[dice.choice((f"{key}s", "", "../x", "data", "\ud800"))] = value


def _double(dice: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder, list):
        holder.insert(dice.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[f"{key}2"] = holder[key]


def _wrap(dice: random.Random, holder: Any, key: Any) -> None:
    holder[key] = [holder[key]] if dice.random() < 0.5 else {"value": holder[key]}


def _bytes(dice: random.Random, whole: bytes) -> tuple[str, bytes]:
    """Bytes that need not be anything any more."""
    place = dice.randrange(len(whole) + 1)
    other = dice.randrange(len(whole) + 1)
    start, end = sorted((place, other))
    ways: dict[str, Callable[[], bytes]] = {
        "cut short": lambda: whole[:place],
        "cut in front": lambda: whole[place:],
        "a piece missing": lambda: whole[:start] + whole[end:],
        "a piece twice": lambda: whole[:end] + whole[start:],
        "empty": lambda: b"",
        "a blank": lambda: b" \n",
        "one byte changed": lambda: whole[:place] + bytes([dice.randrange(256)]) + whole[place + 1 :],
        "bytes put in": lambda: whole[:place] + dice.randbytes(dice.randrange(1, 9)) + whole[place:],
        "zeros": lambda: whole[:start] + bytes(end - start) + whole[end:],
        "a byte-order mark": lambda: b"\xef\xbb\xbf" + whole,
        "UTF-16": lambda: whole.decode("utf-8", "replace").encode("utf-16"),
        "Latin-1": lambda: whole.decode("utf-8", "replace").encode("latin-1", "replace"),
        "CRLF": lambda: whole.replace(b"\n", b"\r\n"),
        "twice": lambda: whole + whole,
        "a huge number": lambda: _number(dice, whole, b"9" * dice.choice((30, 400, 6000))),
        "a number without end": lambda: _number(dice, whole, b"1e999"),
        "deep": lambda: whole[:place] + b"[" * 3000 + whole[place:],
        "a word of Python": lambda: _number(dice, whole, dice.choice((b"NaN", b"None", b"-Infinity", b"0x1"))),
    }
    how = dice.choice(sorted(ways))
    return how, ways[how]()


def _number(dice: random.Random, whole: bytes, instead: bytes) -> bytes:
    """One of the file's numbers written otherwise."""
    import re

    found = list(re.finditer(rb"(?<=[ :\[])\d+(?=[,\n}\]])", whole))
    if not found:
        return whole + instead
    match = dice.choice(found)
    return whole[: match.start()] + instead + whole[match.end() :]
