"""Bad input, reader by reader: each is one clear sentence or a listed record, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qformer.data import pictures
from qformer.data.readers import READERS
from qformer.errors import DataError
from tests import broken, fixtures
from tests.broken import CARDS, Case, outcome

TEXT = (*CARDS, "jsonl")
WORDS = (*TEXT, "ivqa:ranked")
"""The same, and the reader of a table in CSV."""
HUGE = "9" * 5000
LINES = ("jsonl", "vsr", "hateful_memes")
"""Readers of files with one JSON object a line."""
VIDEO = ("ivqa:ranked", "msvd_qa", "msrvtt_qa:lavis")
PICTURED = [name for name in TEXT if name not in VIDEO]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    import datasets

    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield broken.cases(fixtures.root(folder))


def spoilt(case: Case, folder: Path, change: Callable[[bytes], bytes], role: str | None = None) -> broken.Outcome:
    """What comes of a change of the first file's bytes."""
    role = role or case.spoilt[0]
    source = case.files[role]
    assert isinstance(source, Path)
    file = folder / source.name
    file.write_bytes(change(source.read_bytes()))
    return outcome(case, **{role: file})


def records(content: Any) -> list[Any]:
    """The records in a file's content, whatever its shell is."""
    if isinstance(content, list):
        return content
    if isinstance(content.get("data"), dict):
        return list(content["data"]["dialogs"])
    for name in ("data", "questions", "images"):
        if isinstance(content.get(name), list):
            return list(content[name])
    return list(content.values())


def edited(case: Case, change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """A change of the first record."""

    def apply(whole: bytes) -> bytes:
        if case.reader in LINES:
            first, _, rest = whole.partition(b"\n")
            row = json.loads(first)
            change(row)
            return json.dumps(row).encode() + b"\n" + rest
        content = json.loads(whole)
        change(records(content)[0])
        return json.dumps(content).encode()

    return apply


def test_every_reader_has_a_case(cases: dict[str, Case]) -> None:
    assert {case.reader for case in cases.values()} == set(READERS)


@pytest.mark.parametrize("name", [*TEXT, "shards", "columns"])
def test_unspoilt_files_give_samples_alone(cases: dict[str, Case], name: str) -> None:
    found = outcome(cases[name])
    assert found.error is None
    assert len(found.samples) >= 2
    assert not found.broken or name == "columns"  # whose third picture is null


@pytest.mark.parametrize("name", WORDS)
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(
    cases: dict[str, Case], tmp_path: Path, name: str
) -> None:
    whole = outcome(cases[name])
    windows = spoilt(
        cases[name], tmp_path, lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    )
    assert windows.samples == whole.samples


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("empty", [b"", b"\n\n", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(cases: dict[str, Case], tmp_path: Path, name: str, empty: bytes) -> None:
    found = spoilt(cases[name], tmp_path, lambda _: empty)
    [error] = [found.error] if found.error else found.broken
    assert error.startswith(str(tmp_path))
    if name in TEXT or empty != b"\n \n":  # in a table a blank is a cell
        assert found.error and ("not valid JSON" in error or "holds no record" in error)


@pytest.mark.parametrize("name", WORDS)
def test_a_file_that_is_cut_short_is_named(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    found = spoilt(cases[name], tmp_path, lambda raw: raw[: len(raw) // 2])
    messages = [found.error] if found.error else found.broken
    told = "fewer columns" if name not in TEXT else "not valid JSON"
    assert messages and all(told in message for message in messages)


@pytest.mark.parametrize("name", ["columns", "shards"])
@pytest.mark.parametrize("part", [0, 0.25, 0.5])
def test_a_table_or_an_archive_that_is_cut_short_is_named(
    cases: dict[str, Case], tmp_path: Path, name: str, part: float
) -> None:
    [(role, source)] = cases[name].files.items()
    assert isinstance(source, Path)
    shutil.copytree(source, tmp_path / "cut")
    victim = min((tmp_path / "cut").iterdir())
    content = victim.read_bytes()
    victim.write_bytes(content[: int(part * len(content))])
    found = outcome(cases[name], **{role: tmp_path / "cut"})
    messages = [found.error] if found.error else found.broken
    assert messages and all(str(tmp_path / "cut") in message for message in messages)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("whole", ["7", '"text"', "null", "[]", "{}", "[[1], 2]", '{"a": {"b": 1}}'])
def test_a_file_of_another_shape_is_named(cases: dict[str, Case], tmp_path: Path, name: str, whole: str) -> None:
    found = spoilt(cases[name], tmp_path, lambda _: whole.encode())
    assert not found.samples
    messages = [found.error] if found.error else found.broken
    assert messages and all(str(tmp_path) in message for message in messages)
    assert all(
        any(told in message for told in ("expected", "there is no", "holds no", "not valid", "must be", "not among"))
        for message in messages
    ), messages


FIELDS = {
    "aokvqa": ("question", "image_id", "choices", "correct_choice_idx", "direct_answers", "question_id"),
    "aokvqa:multiple_choice": ("question", "choices", "correct_choice_idx"),
    "coco_caption": ("filename", "sentences", "split", "imgid"),
    "gqa": ("question", "imageId", "answer", "types"),
    "iconqa": ("question", "choices", "answer"),
    "llava_conversation": ("image", "conversations", "id"),
    "llava_conversation:turns": ("image", "conversations"),
    "nocaps": ("id", "file_name"),
    "ocrvqa:ocr": ("questions", "answers", "split"),
    "okvqa": ("question", "image_id", "question_id"),
    "scienceqa": ("question", "choices", "answer", "image", "split"),
    "textcaps": ("image_id", "caption_str", "caption_id"),
    "vqav2": ("question", "image_id", "question_id"),
    "vqg_vqav2:per_answer": ("question",),
    "vsr": ("image", "caption", "label"),
    "web_capfilt": ("image", "caption"),
    "jsonl": ("id", "image", "instruction", "target"),
    "hatefulmemes": ("id", "img", "label", "text"),
    "msvd_qa": ("question", "answer", "video_id"),
    "msrvtt_qa:lavis": ("question", "answer"),
    "textvqa": ("question", "image_id", "answers", "question_id"),
    "visdial": ("image_id", "caption", "dialog"),
    "vizwiz": ("image", "question", "answers", "answer_type"),
}
"""What the first record must have."""
SIFTED = {("coco_caption", "split"), ("ocrvqa:ocr", "split")}
"""Where a record of no value that is asked for is left out."""
CARRIED = {("coco_caption", "imgid"), ("llava_conversation", "id")}
"""What is taken along, and tells nothing apart: the first where there is no `cocoid`."""
IDS = {("aokvqa", "question_id"), ("hatefulmemes", "id"), ("jsonl", "id"), ("textcaps", "caption_id")}
IDS |= {("textvqa", "question_id")}
"""Ids that nothing else refers to: any text or number."""


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields])
def test_a_missing_field_is_named(cases: dict[str, Case], tmp_path: Path, name: str, field: str) -> None:
    def remove(row: Any) -> None:
        del row[field]

    found = spoilt(cases[name], tmp_path, edited(cases[name], remove))
    messages = [found.error] if found.error else found.broken
    assert messages and f"there is no field '{field}'" in messages[0]
    remedy = "is it the file that the card means?" if found.error else "; mend or remove the record."
    assert messages[0].endswith(remedy)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in FIELDS.items() for field in fields])
@pytest.mark.parametrize("value", [None, 1.5, {"a": 1}], ids=["null", "number", "object"])
def test_a_field_of_a_wrong_type_is_named_unless_any_value_will_do(
    cases: dict[str, Case], tmp_path: Path, name: str, field: str, value: Any
) -> None:
    def put(row: Any) -> None:
        row[field] = value

    found = spoilt(cases[name], tmp_path, edited(cases[name], put))
    messages = [found.error] if found.error else found.broken
    if (name, field) in SIFTED or (name, field, value) == ("scienceqa", "image", None):  # null: it has no picture
        assert not messages
        assert 0 < len(found.samples) < len(outcome(cases[name]).samples)
    elif (name, field) in CARRIED or (value == 1.5 and (name, field) in IDS):
        assert not messages
        assert len(found.samples) == len(outcome(cases[name]).samples)
    else:
        assert messages and str(tmp_path) in messages[0]


NAMED = {
    "coco_caption": "filename",
    "gqa": "imageId",
    "llava_conversation": "image",
    "nocaps": "file_name",
    "textcaps": "image_id",
    "vsr": "image",
    "web_capfilt": "image",
    "jsonl": "image",
    "hatefulmemes": "img",
    "scienceqa": "split",
    "textvqa": "image_id",
    "vizwiz": "image",
}
"""The field that names a picture, or the first of its folders."""


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("path", ["../../secret.jpg", "/etc/passwd", "a/../../../b.jpg", "..\\secret.jpg"])
def test_a_picture_out_of_the_root_is_refused(cases: dict[str, Case], tmp_path: Path, name: str, path: str) -> None:
    def put(row: Any) -> None:
        row[NAMED[name]] = path

    found = spoilt(cases[name], tmp_path, edited(cases[name], put))
    assert found.broken and "files.images" in found.broken[0]
    assert "leads out" in found.broken[0] or "is an absolute path" in found.broken[0]


def archive(case: Case, file: Path, content: bytes | None = None) -> Path:
    """The pictures of a case's samples in a zip archive: their own bytes, or all of them the same."""
    root = case.files["images"]
    assert isinstance(root, Path)
    asked = {picture for sample in outcome(case).samples for picture in sample.images if isinstance(picture, Path)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for picture in sorted(asked):
            packed.writestr(picture.relative_to(root).as_posix(), picture.read_bytes() if content is None else content)
    return file


@pytest.mark.parametrize("name", PICTURED)
def test_pictures_in_an_archive_are_read_and_bombs_are_not(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = cases[name]
    whole = outcome(case)
    packed = outcome(case, images=archive(case, tmp_path / "whole.zip"))
    assert [sample.id for sample in packed.samples] == [sample.id for sample in whole.samples]
    monkeypatch.setattr(pictures, "LARGEST", 1_000_000)
    bombed = outcome(case, images=archive(case, tmp_path / "bomb.zip", bytes(2_000_000)))
    assert len(bombed.broken) == 2  # as many as are opened
    assert all("would take 2,000,000 bytes, more than the 1,000,000" in message for message in bombed.broken)


@pytest.mark.parametrize("name", NAMED)
def test_a_member_out_of_an_archive_is_refused(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    def put(row: Any) -> None:
        row[NAMED[name]] = "../secret.jpg"

    packed = archive(cases[name], tmp_path / "whole.zip")
    with zipfile.ZipFile(packed, "a") as opened:
        opened.writestr("../secret.jpg", b"secret")
    source = cases[name].files[cases[name].spoilt[0]]
    assert isinstance(source, Path)
    file = tmp_path / source.name
    file.write_bytes(edited(cases[name], put)(source.read_bytes()))
    found = outcome(cases[name], images=packed, **{cases[name].spoilt[0]: file})
    assert found.broken and "leads out of files.images" in found.broken[0]


@pytest.mark.parametrize("name", NAMED)
def test_a_link_out_of_the_root_is_refused(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    def put(row: Any) -> None:
        row[NAMED[name]] = "link.jpg" if NAMED[name] not in ("image_id", "imageId") else "link"

    fixtures.picture(tmp_path / "secret.jpg")
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    for folder in ("images", "images/train2014"):
        (tmp_path / folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    source = cases[name].files[cases[name].spoilt[0]]
    assert isinstance(source, Path)
    file = tmp_path / source.name
    file.write_bytes(edited(cases[name], put)(source.read_bytes()))
    found = outcome(cases[name], images=tmp_path / "images", **{cases[name].spoilt[0]: file})
    assert found.broken and "is a link that leads out of" in found.broken[0]


KEYS = {"iconqa": b'"12"', "ocrvqa:ocr": b'"0123456789"', "scienceqa": b'"3"'}
"""A key of the file's dictionary that pictures are named by."""


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_leads_out_of_the_root_is_refused(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    changed = {}
    for role in cases[name].spoilt:  # the file of splits names the same keys
        source = cases[name].files[role]
        assert isinstance(source, Path)
        changed[role] = tmp_path / source.name
        changed[role].write_bytes(source.read_bytes().replace(KEYS[name], b'"../../etc"'))
    found = outcome(cases[name], **changed)
    assert found.broken and all("leads out of files.images" in message for message in found.broken)


@pytest.mark.parametrize("name", NAMED)
def test_a_picture_that_is_not_there_is_named(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    def put(row: Any) -> None:
        row[NAMED[name]] = "nowhere.jpg"

    found = spoilt(cases[name], tmp_path, edited(cases[name], put))
    assert found.broken and "nowhere.jpg" in found.broken[0]


@pytest.mark.parametrize(("name", "named"), [("ivqa:ranked", b"abcDEF12345"), ("msrvtt_qa:lavis", b"video7010.mp4")])
@pytest.mark.parametrize("path", [b"../../secret.mp4", b"/etc/passwd", b"a/../../../b.mp4"])
def test_a_video_out_of_the_root_is_refused(
    cases: dict[str, Case], tmp_path: Path, name: str, named: bytes, path: bytes
) -> None:
    found = spoilt(cases[name], tmp_path, lambda raw: raw.replace(named, path))
    assert found.broken and ("leads out" in found.broken[0] or "is an absolute path" in found.broken[0])


@pytest.mark.parametrize("name", WORDS)
def test_a_set_whose_pictures_are_elsewhere_lists_every_record(
    cases: dict[str, Case], tmp_path: Path, name: str
) -> None:
    role, what = ("videos", "video") if name in VIDEO else ("images", "picture")
    for folders in (tmp_path / "nothing", [tmp_path / "nothing", tmp_path / "more"]):
        found = outcome(cases[name], **{role: folders})
        assert found.error is None and found.broken
        assert all(what in message for message in found.broken)


DOUBLED = {
    "aokvqa": "an earlier record has the same id; remove one of them",
    "coco_caption": "an earlier record has the same id; remove one of them",
    "gqa": "an earlier record has the same id; remove one of them",
    "iconqa": "an earlier record has the same id; remove one of them",
    "scienceqa": "an earlier record has the same id; remove one of them",
    "ocrvqa:ocr": "an earlier record has the same id; remove one of them",
    "okvqa": "an earlier record has the same id; remove one of them",
    "textcaps": "an earlier record has the same id; remove one of them",
    "vqav2": "an earlier record has the same id; remove one of them",
    "vqg_vqav2:per_answer": "an earlier record has the same id; remove one of them",
    "hatefulmemes": "an earlier record has the same id; remove one of them",
    "msvd_qa": "an earlier record has the same id; remove one of them",
    "textvqa": "an earlier record has the same id; remove one of them",
    "visdial": "an earlier record has the same id; remove one of them",
    "vizwiz": "an earlier record has the same id; remove one of them",
    "jsonl": "the id 'a' was given in line 1 already; give each line its own",
}
"""Readers whose ids are the file's; the others number their records."""
SPLITS = {"iconqa": "choose_txt_test", "scienceqa": "train"}
"""The split that is read, of readers whose ids a file of splits lists."""


@pytest.mark.parametrize("name", DOUBLED)
def test_a_second_record_of_an_id_is_listed(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case = cases[name]

    def double(raw: bytes) -> bytes:
        if case.reader in LINES:
            return raw + raw.partition(b"\n")[0] + b"\n"
        content = json.loads(raw)
        if name in ("gqa", "ocrvqa:ocr"):  # Python's own parser would let the later one take the earlier one's place
            key, value = next(iter(content.items()))
            return raw.rstrip()[:-1] + b"," + json.dumps({key: value}).encode()[1:]
        if name in SPLITS:
            content[SPLITS[name]].append(content[SPLITS[name]][0])
        elif isinstance(content, list):
            content.append(content[0])
        elif name == "visdial":
            content["data"]["dialogs"].append(content["data"]["dialogs"][0])
        else:
            rows = next(content[key] for key in ("data", "questions", "images") if key in content)
            rows.append(rows[0])
        return json.dumps(content).encode()

    whole = outcome(case)
    found = spoilt(case, tmp_path, double, "splits" if name in SPLITS else None)
    assert found.samples == whole.samples
    assert found.broken and all(DOUBLED[name] in message for message in found.broken)


@pytest.mark.parametrize(
    ("name", "role", "way", "other", "where"),
    [
        ("flickr30k", "captions", ("images", 1, "sentences"), {"raw": "Another."}, "among 'sentences'"),
        ("iconqa", "problems", (), {"question": "Another?"}, "in the file"),
        ("nocaps", "captions", ("annotations",), {"caption": "Another."}, "among 'annotations'"),
        ("nocaps", "captions", ("images",), {"file_name": "0013ea2087020902.jpg"}, "among 'images'"),
        ("scienceqa", "problems", (), {"question": "Another?"}, "in the file"),
        ("textcaps:no_ocr", "records", ("data",), {"caption_str": "Another."}, "among 'data'"),
        ("vqav2", "annotations", ("annotations",), {"answers": [{"answer": "another"}]}, "annotations.json"),
        ("vqg_vqav2:per_answer", "annotations", ("annotations",), {"answers": []}, "annotations.json"),
    ],
)
def test_of_what_records_are_made_of_the_first_of_an_id_counts_and_a_further_one_is_listed(
    cases: dict[str, Case], tmp_path: Path, name: str, role: str, way: tuple[Any, ...], other: Any, where: str
) -> None:
    def double(raw: bytes) -> bytes:
        content = parts = json.loads(raw)
        for step in way:
            parts = parts[step]
        if isinstance(parts, list):
            parts.append({**parts[0], **other})
            return json.dumps(content).encode()
        key, value = next(iter(parts.items()))  # written as text: Python's own parser would keep the later one alone
        return raw.rstrip()[:-1] + b"," + json.dumps({key: {**value, **other}}).encode()[1:]

    whole, found = outcome(cases[name]), spoilt(cases[name], tmp_path, double, role)
    assert found.samples == whole.samples
    assert len(found.broken) == 1
    assert re.search(rf": it stands .*{where} more than once; the first is taken\.$", found.broken[0])


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("number", [HUGE, "1e999", "-1", "NaN"], ids=["huge", "infinite", "negative", "NaN"])
def test_a_number_out_of_all_bounds_is_named_where_numbers_are_read(
    cases: dict[str, Case], tmp_path: Path, name: str, number: str
) -> None:
    numbers = re.compile(rb"(?<=[ :\[])\d+(?=[,\n}\]])")
    written: list[int] = []

    def change(raw: bytes) -> bytes:
        content, count = numbers.subn(number.encode(), raw)
        written.append(count)
        return content

    whole, found = outcome(cases[name]), spoilt(cases[name], tmp_path, change)
    messages = [found.error] if found.error else found.broken
    if name in ("gqa", "ivqa:ranked", "llava_conversation", "llava_conversation:turns", "web_capfilt"):
        assert written == [0]
    elif number != HUGE and (name == "vizwiz" or (name, number) == ("jsonl", "-1")):
        assert not messages  # what is not read, and an id as good as any
        assert len(found.samples) == len(whole.samples)
    else:
        assert messages and all(str(tmp_path) in message for message in messages)
        assert len(found.samples) < len(whole.samples)
        assert number in (HUGE, "-1") or len(found.samples) == (3 if name == "jsonl" else 0)  # one of whose ids it is
        told = ("number cannot be read", "not JSON that can be read", "not valid JSON")
        assert number != HUGE or any(words in messages[0] for words in told)


def test_side_files_that_are_broken_are_named(cases: dict[str, Case], tmp_path: Path) -> None:
    annotations = spoilt(cases["vqav2"], tmp_path, lambda raw: raw[:-40], "annotations")
    assert annotations.error and "annotations.json: not valid JSON" in annotations.error
    for empty in (b'{"annotations": []}', b'{"annotations": [{"image_id": 42}, "no record"]}'):
        error = spoilt(cases["vqav2"], tmp_path, lambda _, content=empty: content, "annotations").error  # type: ignore[misc]
        assert error and "it has no answer to any question of" in error and "is it the file of another split?" in error
    for content in (b"{}", b"[]", b'{"annotations": 7}', b'{"annotations": [7]}'):
        error = spoilt(cases["vqav2"], tmp_path, lambda _, content=content: content, "annotations").error  # type: ignore[misc]
        assert error and "annotations.json: " in error and "is it the file that the card means?" in error
    for content in (
        b"[]",
        b'{"data": [{"image_id": "a"}]}',
        b'{"data": [1]}',
        b'{"data": [{"image_id": "a", "ocr_tokens": 7}]}',
    ):
        for name in ("textcaps", "ocrvqa:ocr"):
            error = spoilt(cases[name], tmp_path, lambda _, content=content: content, "ocr").error  # type: ignore[misc]
            assert error and error.startswith(str(tmp_path)), error
            assert "ocr_tokens" in error


def try_variants(cases: dict[str, Case], folder: Path, count: int) -> Counter[str]:
    """Read `count` broken files; what came of them.

    What takes long is named by its variant; what never ends is stopped by the time limit that every test has.
    """
    came: Counter[str] = Counter()
    for told, case, changes in broken.variants(20260, cases, count, folder / "spoilt"):
        began = time.process_time()
        try:
            found = outcome(case, **changes)
        except BaseException as error:
            raise AssertionError(f"{told}: {type(error).__name__}: {error}".encode("ascii", "replace")) from error
        assert time.process_time() - began < 10, f"{told}: took too long"
        came["error" if found.error else "listed" if found.broken else "read"] += 1
    return came


def test_a_tenth_of_five_thousand_broken_files(cases: dict[str, Case], tmp_path: Path) -> None:
    came = try_variants(cases, tmp_path, 500)
    assert sum(came.values()) == 500
    assert min(came.values()) > 50, came  # the generator spoils files in every degree


def test_half_a_character_from_a_file_can_be_printed() -> None:
    assert str(DataError("no split '\ud800'; known: é")) == r"no split '\ud800'; known: é"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_thousand_broken_files(cases: dict[str, Case], tmp_path: Path) -> None:
    assert sum(try_variants(cases, tmp_path, 5000).values()) == 5000
