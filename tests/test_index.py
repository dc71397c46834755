"""The index: what is read from it is what the files say; it is made anew when they change, and whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from qformer.data import index as module
from qformer.data.index import FOLDER, Index
from qformer.data.jsonl import JsonLines
from qformer.data.readers import READERS
from qformer.data.records import Records
from qformer.data.shards import Shards
from qformer.errors import DataError

ROWS = [
    {"id": "a", "image": "a.png", "instruction": "What is it?", "target": "Größe 雪"},
    {"id": "b", "image": "b.png", "instruction": "How many?", "target": ["2", "two"], "n": 2**70, "x": 1.5, "y": None},
    {"id": "a", "image": "c.png", "instruction": "Again?", "target": "yes"},
    {"id": "d", "image": "d.png", "instruction": 3, "target": "yes"},
]


def write(root: Path, rows: list[Any] = ROWS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    file = root / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    return file


class Counting(JsonLines):
    """Counts how often the files are read."""

    read = 0

    def _read(self) -> Iterator[tuple[int, Any]]:
        Counting.read += 1
        yield from super()._read()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Counting, "read", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(root: Path, index: Index | None, reader: type[Records] = Counting, **options: Any) -> Records:
    return reader({"records": root / "records.jsonl", "images": root}, options, "set", "split", index)


def told(records: Records) -> list[Any]:
    """Everything that can be asked of records, errors as their words."""
    found: list[Any] = []
    for place in range(len(records)):
        try:
            found.append((records.key(place), records[place]))
        except DataError as error:
            found.append((records.key(place), str(error)))
    return [*found, {place: str(error) for place, error in records.broken.items()}]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_records_are_the_same_from_files_a_new_index_and_one_that_was_there(tmp_path: Path) -> None:
    write(tmp_path)
    plain = told(opened(tmp_path, None))
    assert "line 3: the id 'a' was given in line 1 already" in plain[2][1]
    assert list(plain[-1]) == [2, 4]
    assert plain[1][1].fields["n"] == 2**70
    index = Index(tmp_path, always=True)
    assert told(opened(tmp_path, index)) == plain
    assert Counting.read == 2
    again = opened(tmp_path, Index(tmp_path))
    assert told(again) == plain
    assert told(pickle.loads(pickle.dumps(again))) == plain
    assert told(pickle.loads(pickle.dumps(opened(tmp_path, None)))) == plain
    assert Counting.read == 3
    assert [name.rpartition(".")[2] for name in files(tmp_path / FOLDER)] == ["arrow", "json"]


def test_content_is_told_alike_from_memory_and_from_an_index_however_it_is_cut(
    tmp_path: Path, monkeypatch: Any
) -> None:
    write(tmp_path)
    plain = opened(tmp_path, None).rows.content
    built, found = (opened(tmp_path, Index(tmp_path, always=True)).rows for _ in range(2))
    assert built.content == found.content == pickle.loads(pickle.dumps(found)).content == plain
    manifest = next((tmp_path / FOLDER).glob("*.json"))
    assert json.loads(manifest.read_text())["rows"] == plain
    older = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "rows"}
    manifest.write_text(json.dumps(older))  # as those before it had no such word
    assert opened(tmp_path, Index(tmp_path)).rows.content == plain
    monkeypatch.setattr(module, "BATCH", 64)
    many = opened(tmp_path, None).rows
    assert len(many._rows.chunks) > 1 and many.content == plain
    lines = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(lines.replace("a", "e", 1))
    assert opened(tmp_path, None).rows.content != plain
    entries = [(b"1", b"23", None), (b"12", b"3", None)]
    assert len({module.in_memory([each]).content for each in entries} | {module.in_memory([]).content}) == 3


def test_a_root_moves_together_with_its_index(tmp_path: Path) -> None:
    write(tmp_path / "one")
    opened(tmp_path / "one", Index(tmp_path / "one", always=True))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = opened(tmp_path / "two", Index(tmp_path / "two"))
    assert Counting.read == 1
    with pytest.raises(DataError, match=r"two/records\.jsonl, line 3: "):
        moved[2]


def test_a_touched_file_keeps_its_index_and_a_changed_one_gets_another(tmp_path: Path) -> None:
    file = write(tmp_path)
    opened(tmp_path, Index(tmp_path, always=True))
    before = files(tmp_path / FOLDER)
    os.utime(file, ns=(1, 1))
    opened(tmp_path, Index(tmp_path))
    assert Counting.read == 1
    hashed = module._Sources.content
    try:  # the new times were noted: nothing is hashed now
        module._Sources.content = property(lambda self: pytest.fail("hashed"))  # type: ignore[assignment]
        opened(tmp_path, Index(tmp_path))
    finally:
        module._Sources.content = hashed  # type: ignore[method-assign]
    stat = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("How many?", "How much?"), encoding="utf-8")
    os.utime(
        file, ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # the same size and time: its change is noticed all the same
    assert file.stat().st_size == stat.st_size
    assert opened(tmp_path, Index(tmp_path, always=True))[1].fields["instruction"] == "How much?"
    assert Counting.read == 2
    after = files(tmp_path / FOLDER)
    assert len(after) == len(before) == 2
    assert after != before, "the older Arrow file is gone"


def test_shards_that_were_changed_in_their_middle_are_read_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "END", 16)
    folder = tmp_path / "shards"
    folder.mkdir()

    def caption(words: str) -> str:
        with tarfile.open(folder / "0.tar", "w") as archive:
            for name, content in (("a.jpg", b"x" * 600), ("a.txt", words.encode()), ("b.jpg", b"x" * 600)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
        return Shards({"shards": folder}, {}, "set", "split", Index(tmp_path, always=True))[0].references[0]

    assert caption("a kite") == "a kite"
    assert caption("a boat") == "a boat"


def test_a_changed_small_file_is_read_although_an_older_index_is_there(tmp_path: Path) -> None:
    write(tmp_path)
    opened(tmp_path, Index(tmp_path, always=True))
    write(tmp_path, ROWS[:1])
    assert len(opened(tmp_path, Index(tmp_path))) == 2


def test_other_options_and_another_reader_have_indices_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path)
    opened(tmp_path, Index(tmp_path, always=True))
    opened(tmp_path, Index(tmp_path, always=True), kind="(.)")
    assert Counting.read == 2
    assert len(files(tmp_path / FOLDER)) == 4
    monkeypatch.setattr(module, "_code", lambda reader: "another way of reading")
    opened(tmp_path, Index(tmp_path, always=True))
    assert Counting.read == 3
    monkeypatch.setattr(module, "FORMAT", 99)
    opened(tmp_path, Index(tmp_path, always=True))
    assert Counting.read == 4
    assert len(files(tmp_path / FOLDER)) == 4


def test_the_same_files_read_alike_share_an_index(tmp_path: Path) -> None:
    write(tmp_path)
    Counting({"records": tmp_path / "records.jsonl", "images": tmp_path}, {}, "one", "a", Index(tmp_path, always=True))
    Counting({"records": tmp_path / "records.jsonl", "images": tmp_path}, {}, "two", "b", Index(tmp_path, always=True))
    assert Counting.read == 1


@pytest.mark.parametrize("harm", ["cut", "empty", "gone", "manifest", "list"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, harm: str) -> None:
    write(tmp_path)
    plain = told(opened(tmp_path, Index(tmp_path, always=True)))
    arrow, manifest = sorted((tmp_path / FOLDER).iterdir(), key=lambda path: path.suffix)
    if harm == "cut":
        arrow.write_bytes(arrow.read_bytes()[:-50])
    elif harm == "empty":
        arrow.write_bytes(b"")
    elif harm == "gone":
        arrow.unlink()
    else:
        manifest.write_text('{"format": 1' if harm == "manifest" else "[1]")
    assert told(opened(tmp_path, Index(tmp_path, always=True))) == plain
    assert Counting.read == 2
    assert told(opened(tmp_path, Index(tmp_path))) == plain
    assert Counting.read == 2


def test_small_files_are_read_where_no_index_is_there_and_large_ones_once(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path)
    opened(tmp_path, Index(tmp_path))
    assert not (tmp_path / FOLDER).exists()
    monkeypatch.setattr(module, "SMALL", 100)
    said: list[str] = []
    opened(tmp_path, Index(tmp_path, say=said.append))
    opened(tmp_path, Index(tmp_path, say=said.append))
    assert Counting.read == 2
    (line,) = said
    assert "records.jsonl: 0.00 GB are read into an index, once (" in line


class TestWhereNothingCanBeWritten:
    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "SMALL", 0)

    def full(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        """No room in some folders: writing fails after some bytes."""
        real = module.pyarrow.OSFile

        class Full:
            def __init__(self, name: str, mode: str):
                self.file = real(name, mode)
                self.refused = any(folder in Path(name).parents for folder in folders)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> Any:
                if self.refused:
                    self.file.write(b"half")
                    raise OSError(28, "No space left on device")
                return self.file.__enter__()

            def __exit__(self, *error: Any) -> None:
                self.file.close()

        monkeypatch.setattr(module.pyarrow, "OSFile", Full)

    def test_a_full_root_gives_way_to_the_users_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = tmp_path / "root"
        write(root)
        self.full(monkeypatch, root)
        said: list[str] = []
        plain = told(opened(root, Index(root, say=said.append)))
        assert told(opened(root, Index(root, say=said.append))) == plain
        assert files(root / FOLDER) == []
        assert len(said) == 2
        (place,) = (tmp_path / "cache" / "qformer" / "index").iterdir()
        assert len(files(place)) == 2

    def test_a_root_whose_folder_cannot_be_made_gives_way_too(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        write(root)
        (root / FOLDER).write_text("a file stands in the way")
        opened(root, Index(root))
        opened(root, Index(root))
        assert Counting.read == 1

    def test_nowhere_at_all_records_are_held_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path)
        self.full(monkeypatch, tmp_path)
        said: list[str] = []
        assert len(opened(tmp_path, Index(tmp_path, say=said.append))) == 5
        assert said[-1].endswith(
            "(No space left on device); its records are held in memory.  Set data.index to a folder with room."
        )
        assert not list(tmp_path.rglob("*.tmp"))

    def test_a_folder_that_was_asked_for_must_take_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root, wanted = tmp_path / "root", tmp_path / "wanted"
        write(root)
        self.full(monkeypatch, wanted)
        with pytest.raises(
            DataError, match=r"no index can be written to '.*wanted' \(No space left on device\); make ro"
        ):
            opened(root, Index(root, wanted))
        assert files(wanted) == []


def test_what_stops_the_writing_leaves_nothing(tmp_path: Path) -> None:
    class Stopped(JsonLines):
        error: BaseException = KeyboardInterrupt()

        def _read(self) -> Iterator[tuple[int, Any]]:
            yield from list(super()._read())[:2]
            raise self.error

    write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, Index(tmp_path, always=True), Stopped)
    assert files(tmp_path / FOLDER) == []
    Stopped.error = OSError(5, "Input/output error")
    with pytest.raises(DataError, match=r"records\.jsonl: it cannot be read: .*Input/output error"):
        opened(tmp_path, Index(tmp_path, always=True), Stopped)
    assert files(tmp_path / FOLDER) == []


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    class Growing(JsonLines):
        def _read(self) -> Iterator[tuple[int, Any]]:
            yield from super()._read()
            with self.file.open("a") as stream:
                stream.write("\n")

    write(tmp_path)
    with pytest.raises(DataError, match=r"records\.jsonl: it was written to while it was read; start again"):
        opened(tmp_path, Index(tmp_path, always=True), Growing)
    assert files(tmp_path / FOLDER) == []


def test_what_killed_processes_left_behind_is_swept_after_a_day(tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, age in (("old", 2 * module.DAY), ("new", 60)):
        left = folder / f".{name}.tmp"
        left.write_text("half")
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    opened(tmp_path, Index(tmp_path, always=True))
    assert [name for name in files(folder) if name.endswith(".tmp")] == [".new.tmp"]


def test_a_file_that_is_cut_short_is_named_and_leaves_no_index(tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    file.write_text('{"questions": [{"question_id": 1}, {"question_id": 2, "ques')
    (tmp_path / "annotations.json").write_text('{"annotations": []}')
    roles = {"questions": file, "annotations": tmp_path / "annotations.json", "images": tmp_path}
    with pytest.raises(DataError, match=r"questions\.json: not valid JSON \(Unterminated string .* cut short"):
        READERS["vqa"](roles, {}, "set", "split", Index(tmp_path, always=True))
    assert files(tmp_path / FOLDER) == []


def test_processes_that_build_at_once_harm_nothing(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "id": str(number), "image": "x" * 200} for number in range(2000)]
    write(tmp_path, rows)
    code = (
        "import sys; from pathlib import Path; from qformer.data.index import Index; from qformer.data.jsonl import *\n"
        "root = Path(sys.argv[1])\n"
        "files = {'records': root / 'records.jsonl', 'images': root}\n"
        "records = JsonLines(files, {}, 'set', 'split', Index(root, always=True))\n"
        "print(len(records), records[1999].id)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].split() for process in started] == [["2001", "1999"]] * 2
    assert len(files(tmp_path / FOLDER)) == 2
