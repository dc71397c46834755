"""Streams: what they yield is what Python's own parser yields, at any cut; what is broken is named where it is."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qformer.data import streams
from qformer.data.streams import iterate_items, iterate_json, iterate_lines, join, read_json
from qformer.errors import DataError


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def random_value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(9 if depth < 3 else 7)
    if kind < 3:
        return "".join(dice.choice('aé"\\\n雪𝄞 {}[],:') for _ in range(dice.randrange(12)))
    if kind < 5:
        return dice.choice([dice.randrange(-(10**12), 10**12), dice.random() * 1e30, -1.5e-300])
    if kind < 7:
        return dice.choice([None, True, False])
    if kind == 7:
        return [random_value(dice, depth + 1) for _ in range(dice.randrange(5))]
    return {f"k{n}": random_value(dice, depth + 1) for n in range(dice.randrange(5))}


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_a_file_is_parsed_alike_wherever_its_pieces_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, form: dict[str, Any]
) -> None:
    monkeypatch.setattr(streams, "PIECE", piece)
    dice = random.Random(piece)
    values = [random_value(dice) for _ in range(40)] + [12345678901234567890, -0.5, [], {}, ""]
    file = put(tmp_path / "list.json", json.dumps(values, **form))
    assert list(iterate_json(file)) == values
    assert read_json(file) == values
    named = {"info": {"a": [1, {"b": 2}]}, "rows": values, "rest": [[1], {"c": []}], "n": 12}
    file = put(tmp_path / "named.json", json.dumps(named, **form))
    assert list(iterate_json(file, "rows")) == values
    table = {f"key {place} é": value for place, value in enumerate(values)}
    file = put(tmp_path / "table.json", json.dumps({"first": 1, "table": table}, **form))
    assert list(iterate_items(file, "table")) == list(table.items())
    assert list(iterate_items(put(tmp_path / "bare.json", json.dumps(table, **form)))) == list(table.items())


def test_marks_blanks_and_line_ends_are_no_content(tmp_path: Path) -> None:
    file = put(tmp_path / "a.json", b'\xef\xbb\xbf\r\n {"rows"\t:\r\n[ 1 ,\r\n 2 ]\r\n}\r\n')
    assert list(iterate_json(file, "rows")) == [1, 2]
    lines = put(tmp_path / "a.jsonl", b"\xef\xbb\xbfone\r\n\r\ntwo\xe2\x80\xa8still two\nthree")
    assert list(iterate_lines(lines)) == [(1, "one"), (2, ""), (3, "two\u2028still two"), (4, "three")]
    assert list(iterate_json(put(tmp_path / "b.json", " [ ] "))) == []
    assert list(iterate_items(put(tmp_path / "c.json", '{"x": { }}'), "x")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"Expecting value at line 1, character 1\); was the download cut short"),
        ('{"rows": [1, 2', "Expecting ',' delimiter at line 1, character 15"),
        ('{"rows": [1,\n {"a": "bc', "Unterminated string starting at line 2, character 21"),
        ('{"rows": [1, 2]', "Expecting ',' delimiter"),
        ('{"rows": [1, 2], ', "Expecting property name"),
        ('{"rows": [1, 2]} x', "Extra data at line 1, character 18"),
        ('{"rows": [1 2]}', "Expecting ',' delimiter at line 1, character 13"),
        ('{"rows": [1,]}', "Expecting value at line 1, character 13"),
        ('{"rows": [tru]}', "Expecting value"),
        ('{"rows" [1]}', "Expecting ':' delimiter"),
        ("{rows: [1]}", "Expecting property name"),
        (b'{"rows": ["\xff"]}', "it cannot be read: 'utf-8' codec"),
        (b'{"rows": [1]} \xe2\x80', "it cannot be read: 'utf-8' codec"),
        ('{"rows": [' + "[" * 100_000, "nested too deeply at line 1, character 11; fetch it again"),
        ('{"rows": [' + "1" * 5000 + "]}", r"a number cannot be read at line 1, character 11 \(.*\); mend it"),
    ],
)
@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_a_broken_file_is_named_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, message: str, piece: int
) -> None:
    monkeypatch.setattr(streams, "PIECE", piece)
    file = put(tmp_path / "broken.json", content)
    with pytest.raises(DataError, match=message) as caught:
        list(iterate_json(file, "rows"))
    assert str(caught.value).startswith(f"{file}: ")


def test_every_cut_of_a_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE", 4)
    whole = json.dumps({"info": [1, 2], "rows": [{"a": 1.5, "b": "é\n"}, -3], "more": {"x": True}}).encode()
    for length in range(len(whole)):
        with pytest.raises(DataError):
            list(iterate_json(put(tmp_path / "cut.json", whole[:length]), "rows"))


def test_another_shape_is_told_from_a_missing_name(tmp_path: Path) -> None:
    file = put(tmp_path / "a.json", '{"rows": {"a": 1}, "list": [1]}')
    with pytest.raises(TypeError, match="'rows' must be a list"):
        list(iterate_json(file, "rows"))
    with pytest.raises(TypeError, match="'list' must be a dictionary"):
        list(iterate_items(file, "list"))
    with pytest.raises(TypeError, match="the file must be a list"):
        list(iterate_json(file))
    with pytest.raises(KeyError, match="questions"):
        list(iterate_json(file, "questions"))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    for read in (iterate_json, iterate_items, iterate_lines):
        with pytest.raises(DataError, match=r"nowhere\.json: it cannot be read"):
            list(read(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match="it cannot be read as text"):
        list(iterate_lines(put(tmp_path / "b.jsonl", b"\xff\xfe\x00")))


def test_a_long_list_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE", 1 << 15)
    row = {"question": "What colour is the kite?", "answers": [{"answer": "red", "answer_id": n} for n in range(10)]}
    file = put(tmp_path / "long.json", json.dumps({"skipped": [row] * 1000, "rows": [row] * 1000}))
    assert file.stat().st_size > 800_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in iterate_json(file, "rows")) == 1000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_a_mistake_early_in_a_long_file_is_told_without_reading_on(tmp_path: Path) -> None:
    file = put(tmp_path / "long.json", "[1, {'a': 2}, " + '"x", ' * 2_000_000 + "1]")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"property name .*character 6"):
            list(iterate_json(file))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


class TestJoin:
    def joined(self, *others: int, read: list[int] | None = None, further: list[int] | None = None) -> list[Any]:
        def stream() -> Iterator[Any]:
            for place, number in enumerate(others):
                if read is not None:
                    read.append(number)
                yield {"id": number, "place": place}

        met: list[int] = [] if further is None else further
        pairs = join(({"id": number} for number in (3, 1, 2)), stream, "id", met.append)
        found = [(row["id"], other and other["place"]) for row, other in pairs]
        assert further is not None or not met
        return found

    def test_streams_in_one_order_are_read_once(self) -> None:
        read: list[int] = []
        assert self.joined(3, 1, 2, read=read) == [(3, 0), (1, 1), (2, 2)]
        assert read == [3, 1, 2]

    def test_another_order_is_looked_up(self) -> None:
        assert self.joined(3, 2, 1) == [(3, 0), (1, 2), (2, 1)]

    def test_a_row_without_other_has_none_and_others_without_row_are_passed_over(self) -> None:
        assert self.joined(3, 9, 2) == [(3, 0), (1, None), (2, 2)]
        assert self.joined(3) == [(3, 0), (1, None), (2, None)]
        assert self.joined() == [(3, None), (1, None), (2, None)]

    @pytest.mark.parametrize(
        ("others", "places"),
        [
            ((3, 3, 1, 2), (0, 2, 3)),
            ((3, 1, 3, 2), (0, 1, 3)),
            ((3, 1, 2, 3), (0, 1, 2)),
            ((1, 3, 2, 3), (1, 0, 2)),
            ((3, 1, 2, 3, 3), (0, 1, 2)),
        ],
    )
    def test_of_several_others_the_first_counts_in_any_order_and_the_further_ones_are_told(
        self, others: tuple[int, ...], places: tuple[int, ...]
    ) -> None:
        further: list[int] = []
        assert self.joined(*others, further=further) == list(zip((3, 1, 2), places, strict=True))
        assert further == [3] * (len(others) - 3)

    def test_words_and_numbers_are_not_taken_for_each_other(self) -> None:
        assert list(join([{"id": 1}], lambda: [{"id": "1"}], "id", pytest.fail)) == [({"id": 1}, None)]

    def test_a_full_disk_is_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = streams.sqlite3.connect

        def tight(name: str) -> Any:
            base = real(name)
            base.execute("PRAGMA max_page_count = 3")
            return base

        monkeypatch.setattr(streams.sqlite3, "connect", tight)
        others = [{"id": n, "words": "x" * 2000} for n in range(50)]
        with pytest.raises(DataError, match=r"records cannot be joined .*make room where temporary files go"):
            list(join([{"id": 7}], lambda: others, "id", pytest.fail))
