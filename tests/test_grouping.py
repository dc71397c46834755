"""Records in groups that share a picture: once a pass, a function of k, on any number of processes, off by default."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from qformer import cards, config, dryrun, loading, modelcard, report
from qformer.assemble import Assembler, Prepared
from qformer.config import DataConfig, RunConfig
from qformer.data import grouping
from qformer.data.batch import Source, StepMaker, groups_of, mixture_of, open_sources, told_groups
from qformer.data.columns import Cell
from qformer.data.grouping import ByPicture, Groups, apportioned, read_by_picture, sort_by_picture
from qformer.data.index import FOLDER, Index
from qformer.data.jsonl import JsonLines
from qformer.data.mixture import Draw, Mixture, dealt
from qformer.data.readers import READERS, open_records
from qformer.data.records import Records
from qformer.errors import ConfigError, DataError
from qformer.images import picture_key
from qformer.planning import plan, shapes
from qformer.sample import Slot, Text
from qformer.train import loop
from tests import fixtures, world

MANY = st.lists(st.integers(1, 23), min_size=1, max_size=40)
"""Records of each picture."""


def pictured(many: Iterable[int]) -> ByPicture:
    """Records of pictures that have so many each, in turn, so that none stands beside its like in the file."""
    left = Counter(dict(enumerate(many)))
    names = []
    while left:
        names += list(left)
        left -= Counter(list(left))
    return sort_by_picture(names)


def passes(groups: Groups, *key: object) -> list[tuple[int, int]]:
    return [groups.take(place, *key) for place in range(groups.records)]


# -- the order --------------------------------------------------------------------------------------------------------


@given(many=MANY, per=st.integers(2, 9), seed=st.integers(0, 2**40), turn=st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pass_has_every_record_once_in_groups_of_one_picture(many: list[int], per: int, seed: int, turn: int) -> None:
    found = pictured(many)
    picture = {}
    if found.shared:
        order, first = iter(found.order), 0
        for size, pictures in found.counts:
            for _ in range(pictures):
                picture |= {int(next(order)): first for _ in range(size)}
                first += 1
        groups = Groups(found, per)
        taken = passes(groups, seed, "set", turn)
        assert sorted(record for record, _ in taken) == list(range(sum(many)))
        assert [group for _, group in taken] == sorted(group for _, group in taken)
        sets: dict[int, list[int]] = defaultdict(list)
        for record, group in taken:
            sets[group].append(picture[record])
        assert all(len(set(each)) == 1 and len(each) <= per for each in sets.values())
        assert len(groups) == len(sets) == sum(-(-each // per) for each in many)
        assert {tuple(taken[place]) for place in range(0, len(taken), 3)} == {
            groups.take(place, seed, "set", turn) for place in reversed(range(0, len(taken), 3))
        }
    assert (found.records, found.pictures) == (sum(many), len(many))


@given(parts=st.lists(st.integers(1, 50), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kinds_are_apportioned_to_the_last_one(parts: list[int]) -> None:
    shares = [(part, sum(parts[place:])) for place, part in enumerate(parts)]
    before = apportioned(0, shares)
    for count in range(1, sum(parts) + 1):
        after = apportioned(count, shares)
        assert sorted(new - old for old, new in zip(before, after, strict=True)) == [0] * (len(parts) - 1) + [1]
        before = after
    assert before == parts


def test_passes_and_seeds_have_groups_of_their_own() -> None:
    groups = Groups(pictured([10] * 30), 4)

    def sets(*key: object) -> list[frozenset[int]]:
        found: dict[int, set[int]] = defaultdict(set)
        for record, group in passes(groups, *key):
            found[group].add(record)
        return [frozenset(found[group]) for group in sorted(found)]

    one = sets(0, "set", 0)
    assert one == sets(0, "set", 0)
    for other in (sets(0, "set", 1), sets(1, "set", 0), sets(0, "other", 0)):
        assert [*one] != [*other] and len(set(one) & set(other)) < 20  # neither their order nor who is in them


def test_groups_of_all_sizes_are_spread_over_the_pass() -> None:
    groups = Groups(pictured([6] * 300 + [1] * 100), 4)
    sizes = Counter(group for _, group in passes(groups, 0, "set", 0))
    for quarter in range(4):
        part = [sizes[group] for group in range(quarter * 175, quarter * 175 + 175)]
        assert Counter(part) == pytest.approx({4: 75, 2: 75, 1: 25}, abs=2)


def test_a_group_of_a_set_of_fourteen_million_is_found_at_once() -> None:
    counts = tuple((many, 1_000_000 // many) for many in range(70, 0, -1))
    whole = ByPicture(counts, range(sum(many * pictures for many, pictures in counts)))
    assert whole.records > 14_000_000
    for per in (4, 64):
        groups = Groups(whole, per)
        seconds = []
        for place in range(0, whole.records, whole.records // 50):
            tries = []
            for _ in range(5):  # the quickest: another process may have had the cache in the others
                began = time.process_time()
                groups.take(place, 0, "set", 3)
                tries.append(time.process_time() - began)
            seconds.append(min(tries))
        assert sorted(seconds)[len(seconds) // 2] < (1e-3 if sys.gettrace() is None else 1e-2)  # coverage slows it


# -- the mixture ------------------------------------------------------------------------------------------------------

SHARED = {"vqa": [10] * 30 + [3] * 5, "chat": [2, 2, 1, 1, 1, 7], "web": [1] * 50}


def mixture(per: int | None = 4, seed: int = 0) -> Mixture:
    records = {name: sum(many) for name, many in SHARED.items()}
    found = {name: pictured(many) for name, many in SHARED.items()}
    groups = {name: Groups(each, per) for name, each in found.items() if each.shared} if per else None
    return Mixture(cards.probabilities(records, {}), records, seed, groups)


def test_shares_and_the_set_of_each_draw_are_what_they_were() -> None:
    off, on = mixture(None), mixture()
    assert off.shares() == on.shares()
    for number in range(0, 3000, 7):
        before, after = off.draw(number), on.draw(number)
        assert (before.task, before.turn) == (after.task, after.turn)
        assert before.group is None and (after.group is None) == (after.task == "web")
        if after.task == "web":  # no picture comes twice in it
            assert before == after
    assert off.totals(12_345) == on.totals(12_345)


def test_every_record_comes_once_a_pass_and_in_the_same_place_whatever_was_drawn_before() -> None:
    whole, again = mixture(), mixture()
    seen: dict[tuple[str, int], list[int]] = defaultdict(list)
    drawn = [whole.draw(number) for number in range(2500)]
    for draw in drawn:
        seen[draw.task, draw.turn].append(draw.place)
    for (task, turn), places in seen.items():
        assert len(set(places)) == len(places)
        if (task, turn + 1) in seen:
            assert sorted(places) == list(range(whole.records[task]))
    assert [again.draw(number) for number in (2400, 7, 1300)] == [drawn[number] for number in (2400, 7, 1300)]
    own = [draw for draw in drawn if draw.task == "vqa"]
    assert [whole.nth("vqa", count) for count in (0, 5, 320)] == [own[count] for count in (0, 5, 320)]
    places = whole.places(100, 150)
    for name in SHARED:
        assert set(places[name]) == {draw.place for draw in drawn[100:150] if draw.task == name}


def test_a_step_looks_at_fewer_pictures() -> None:
    off, on = mixture(None), mixture()
    steps, size = 12, 48
    assert off.pictures(0, steps * size) == steps * size
    mean = sum(on.pictures(step * size, step * size + size) for step in range(steps)) / steps
    own = on.shares()
    ideal = size * (own["vqa"] * 95 / 315 + own["chat"] * 7 / 14 + own["web"])  # groups that no step cuts
    assert ideal <= mean < ideal + 2


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=40), ranks=st.integers(1, 9), alone=st.integers(0, 10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_processes_share_a_step_out_in_groups_and_evenly(sizes: list[int], ranks: int, alone: int) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    draws = [Draw(place, "set", 0, place, group) for place, group in enumerate([*groups, *[None] * alone])]
    shares = dealt(draws, ranks)
    assert sorted((draw for share in shares for draw in share), key=lambda draw: draw.number) == draws
    assert [len(share) for share in shares] == [len(draws[rank::ranks]) for rank in range(ranks)]
    assert all(share == sorted(share, key=lambda draw: draw.number) for share in shares)
    parted = sum(len({draw.unit for draw in share}) for share in shares) - len({draw.unit for draw in draws})
    assert parted < ranks  # what is cut fills a process up, and the last needs no cut


# -- what pictures records have ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.root(tmp_path_factory.mktemp("official"))


def test_every_reader_tells_pictures_apart_as_its_samples_do(official: Path) -> None:
    met = set()
    for name in cards.resources.names("tasks"):
        card = cards.load(name)
        for section in filter(None, (card.train, card.eval)):
            records = open_records(section, official, card)
            told = [json.dumps(each) for each in records.looks()]
            shown: list[Any] = []
            for place in range(len(records)):
                try:
                    shown.append([picture_key(each) for each in records[place].images])
                except DataError:
                    shown.append(place)
            assert len({*told}) == len({json.dumps(each) for each in shown}), name
            assert len({*zip(told, map(json.dumps, shown), strict=True)}) == len({*told}), name
            met.add(section.reader)
    assert met | {"jsonl", "caption_list", "karpathy", "shards", "columns"} == {*READERS}


def test_the_other_readers_too(tmp_path: Path) -> None:
    pairs = [{"image": f"{name}.jpg", "caption": "words"} for name in "aba"]
    listed = {"images": [
        {"split": "train", "filepath": "f", "filename": name, "imgid": number, "sentids": [],
         "sentences": [{"sentid": 10 * number + each, "raw": "words"} for each in range(number + 1)]}
        for number, name in enumerate(("a.jpg", "b.jpg"))
    ]}  # fmt: skip
    for reader, content, expected in (("caption_list", pairs, [2, 1]), ("karpathy", listed, [2, 1])):
        file = tmp_path / f"{reader}.json"
        file.write_text(json.dumps(content))
        records = READERS[reader]({"captions": file, "images": tmp_path}, {}, "set")
        assert [many for many, pictures in read_by_picture(records).counts for _ in range(pictures)] == expected


def records_of(folder: Path, rows: list[dict[str, Any]], index: Index | None = None) -> JsonLines:
    folder.mkdir(parents=True, exist_ok=True)
    said = [{"id": f"r{place}", "instruction": "what", "target": "it", **row} for place, row in enumerate(rows)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return JsonLines({"records": folder / "records.jsonl", "images": folder}, {}, "set", index=index)


def test_records_of_several_pictures_are_grouped_by_all_of_them(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png"}, {"images": ["a.png", "b.png"]}, {"images": ["b.png", "a.png"]}, {"images": ["a.png"]},
        {"images": ["a.png", "b.png"]}, {"video": "film"}, {"image": "film2"}, {"video": "film"}, {"images": "a.png"},
        {"image": None},
    ]  # fmt: skip
    found = read_by_picture(records_of(tmp_path, rows))
    assert found.counts == ((2, 3), (1, 4))
    assert [sorted(map(int, found.order[place : place + 2])) for place in (0, 2, 4)] == [[0, 3], [1, 4], [5, 7]]


def test_a_reader_that_says_nothing_of_pictures_has_its_samples_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": "a.png"}, {"images": ["a.png", "b.png"]}, {"image": "a.png"}, {"image": "../a.png"}] * 2
    told = read_by_picture(records_of(tmp_path, rows))
    monkeypatch.setattr(JsonLines, "looks_at", Records.looks_at)
    made = read_by_picture(records_of(tmp_path, rows))
    assert told.counts == ((4, 1), (2, 2)) and made.counts == ((4, 1), (2, 1), (1, 2))  # two are broken
    assert list(made.order[:6]) == [0, 2, 4, 6, 1, 5]


def test_broken_records_keep_their_places_and_share_with_none(tmp_path: Path) -> None:
    twice = {"image": "a.png", "id": "r0"}
    rows = [{"image": "a.png"}, twice, {"instruction": 3}, {"instruction": 4}, {"image": "a.png"}]
    records = records_of(tmp_path, rows)
    assert list(records.broken) == [1]
    found = read_by_picture(records)
    assert (found.records, found.counts) == (5, ((2, 1), (1, 3)))
    assert sorted(record for record, _ in passes(Groups(found, 2), 0, "set", 0)) == [0, 1, 2, 3, 4]


def test_where_no_two_records_share_a_picture_the_order_is_what_it_was(tmp_path: Path) -> None:
    found = read_by_picture(records_of(tmp_path, [{"image": f"{number}.png"} for number in range(9)]))
    assert not found.shared and len(found.order) == 0 and found.records == found.pictures == 9


def jpeg(colour: str) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(stream, "JPEG")
    return {"bytes": stream.getvalue(), "path": None}


def test_tables_name_their_pictures_or_have_them_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "table"
    folder.mkdir()
    content = {
        "image": [jpeg("red"), jpeg("blue"), jpeg("red")], "number": [7, 8, 7],
        "question": [["a", "b"], ["c"], ["d"]], "answers": [["x", "y"], ["z"], ["w"]],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(content), folder / "train-0.parquet")
    read = []
    own = Cell.read
    monkeypatch.setattr(Cell, "read", lambda cell: (read.append(cell.row), own(cell))[1])

    def found(**columns: str) -> tuple[ByPicture, list[str]]:
        said: list[str] = []
        wanted = {"image": "image", "question": "question", "answers": "answers", **columns}
        records = READERS["columns"]({"table": folder}, {"columns": wanted, "per": "item"}, "set")
        return read_by_picture(records, said.append), said

    named, said = found(image_id="number")
    assert (named.counts, said, read) == (((3, 1), (1, 1)), [], [])
    opened, said = found()
    assert opened.counts == named.counts and list(opened.order) == list(named.order)
    assert said == [f"{folder}: nothing names its pictures, so each is read to tell them apart, once."]
    assert read == [0, 1, 2]  # though the first row is two records


# -- beside the index -------------------------------------------------------------------------------------------------


def test_the_order_is_kept_beside_the_index_and_made_anew_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"{number % 5}.png"} for number in range(20)]
    index, said = Index(tmp_path / "data", always=True), []

    def sort(count: int = 20) -> list[int]:
        records = records_of(tmp_path / "data", rows[:count], index)
        return [int(record) for record in read_by_picture(records, said.append).order]

    def kept() -> list[Path]:
        return list((tmp_path / "data" / FOLDER).glob("*-pictures*.arrow"))

    first = sort()
    assert first == [int(record) for record in read_by_picture(records_of(tmp_path / "memory", rows)).order]
    assert said == [f"{tmp_path / 'data' / 'records.jsonl'}: its 20 records are sorted by picture, once."]
    with monkeypatch.context() as patch:
        patch.setattr(grouping, "sort_by_picture", lambda names: pytest.fail("it was kept"))
        assert sort() == first
    (file,) = kept()
    file.write_bytes(file.read_bytes()[:200])  # cut short
    assert sort() == first and len(said) == 2
    assert sort(10) == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9] and len(said) == 3
    (other,) = kept()  # that of the old records is gone
    assert other != file


def test_where_nothing_can_be_written_it_is_made_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"{number % 5}.png"} for number in range(20)]
    records = records_of(tmp_path, rows, Index(tmp_path, always=True))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert read_by_picture(records).counts == ((4, 5),)
    assert not list((tmp_path / FOLDER).glob("*-pictures*"))


def test_a_million_records_are_sorted_in_seconds() -> None:
    began = time.process_time()
    found = sort_by_picture(number * 7919 % 20_011 for number in range(100_000))
    assert found.pictures == 20_011 and cast(numpy.ndarray, found.order).dtype == numpy.uint32
    assert time.process_time() - began < 2


# -- runs -------------------------------------------------------------------------------------------------------------

QUESTIONS = 5
"""On each picture."""


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouped") / "data"
    world.write_pictures(folder, count=8)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    rows = [
        {**line, "id": f"{line['id']}-{number}", "instruction": f"question {number}: {line['instruction']}"}
        for number in range(QUESTIONS)
        for line in lines
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make(towers: Path, data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda *changes: world.settings(towers, data, tmp_path / "run", *changes)


def maker_of(chosen: RunConfig, assembler: Assembler | None, **changes: Any) -> StepMaker:
    sources = open_sources(cards.load_all(chosen.data.tasks, "train"), Path(chosen.data.root))
    values: dict[str, Any] = {"batch_size": 10, "steps": 4, "soft_tokens": 4, **changes}
    whole = mixture_of(sources, chosen.data, {}, chosen.seed)
    return StepMaker(whole, sources, cast(Assembler, assembler), **values)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 2)])
def test_ranks_and_workers_see_the_same_data(make: Callable[..., RunConfig], ranks: int, workers: int) -> None:
    chosen = make("data.per_picture=5")
    assembler = loading.build(chosen, report=lambda _: None).assembler(training=True)

    def pictures(data: Any) -> set[tuple[str, tuple[float, ...]]]:
        return {
            (name, tuple(batch.pixels[batch.reads[piece.read].picture].flatten().tolist()))
            for batch in data.batches
            for name, row in zip(batch.samples, batch.rows, strict=True)
            for piece in row
            if isinstance(piece, Slot)
        }

    alone = maker_of(chosen, assembler)
    shared = [maker_of(chosen, assembler, rank=rank, ranks=ranks) for rank in range(ranks)]
    loaders = [iter(torch.utils.data.DataLoader(each, batch_size=None, num_workers=workers)) for each in shared]
    for step in range(2):
        parts = [next(loader) for loader in loaders]
        assert set.union(*map(pictures, parts)) == pictures(alone[step])
        assert sum(len(pictures(part)) for part in parts) == len(pictures(alone[step])) == 10
        encoded = [batch.pictures for batch in alone[step].batches]
        assert encoded == [2]  # ten questions on two pictures
        assert sum(batch.pictures for part in parts for batch in part.batches) < 2 + ranks


def test_off_is_what_it_was_and_a_changed_value_does_not_go_on(make: Callable[..., RunConfig], data: Path) -> None:
    plain = maker_of(make(), None).mixture
    assert plain.groups == {} and DataConfig().per_picture is None
    assert plain.draw(3) == Draw(3, plain.names[0], 0, Mixture({plain.names[0]: 1.0}, plain.records, 0).draw(3).place)
    said: list[str] = []
    run = loop.train(make("data.per_picture=4", "train.steps=1"), say=said.append, quiet=True)
    assert any(line.endswith("(40 records on 8 pictures)") for line in said), said
    with pytest.raises(ConfigError, match=r"cannot go on with other data.*data\.per_picture was 4 and is None"):
        loop.train(make("train.steps=2"), say=said.append, quiet=True)
    with pytest.raises(ConfigError, match=r"data\.per_picture was 4 and is 3"):
        loop.train(make("train.steps=2", "data.per_picture=3"), say=said.append, quiet=True)
    assert loop.train(make("train.steps=2", "data.per_picture=4"), say=said.append, quiet=True) == run


def test_rows_on_one_picture_stay_in_one_micro_batch(make: Callable[..., RunConfig]) -> None:
    rows = [
        Prepared(f"{picture}-{size}", (f"p{picture}",), (), (Text((0,) * size, trained=True),))
        for size in (9, 2, 5)
        for picture in range(4)
    ]
    found = {}
    for per in (None, 3):
        maker = maker_of(make(*([f"data.per_picture={per}"] if per else [])), None, micro_batch_tokens=16, packed=True)
        groups = list(maker.groups(rows))
        assert sorted(each.name for group in groups for each in group) == sorted(each.name for each in rows)
        assert all(sum(len(each.row[0].ids) for each in group) <= 16 for group in groups)  # type: ignore[union-attr]
        found[per] = sum(len({each.pictures for each in group}) for group in groups)
    assert found == {None: 12, 3: 4}


def test_the_settings_are_checked_and_told(make: Callable[..., RunConfig], data: Path) -> None:
    for value in (1, 0, 65):
        with pytest.raises(ConfigError, match=rf"data\.per_picture is {value}; it must be at least 2 and at most 64"):
            make(f"data.per_picture={value}")
    chosen = make("data.per_picture=4")
    maker = maker_of(chosen, None)
    (name,) = maker.mixture.names
    together = f"up to 4 records on one picture are drawn together in {name} (40 records on 8 pictures)"
    assert told_groups(maker.mixture, 4) == f"data.per_picture: {together}"
    alone = told_groups(Mixture({"web": 1.0}, {"web": 3}, 0), 4)
    assert alone == "data.per_picture: no two records share a picture in web"
    assert told_groups(maker.mixture, None) is None
    assert modelcard.trained(chosen)["per_picture"] == 4 and "per_picture" not in modelcard.trained(make())
    assert "up to 4 records of a picture together" in report._what_was_run(dataclasses.asdict(chosen))
    assert "of a picture together" not in report._what_was_run(dataclasses.asdict(make()))


def printed(blocks: Iterable[Any]) -> str:
    console = Console(width=200, highlight=False, markup=False)
    with console.capture() as captured:
        for block in blocks:
            console.print(block)
    return captured.get()


def test_a_dry_run_says_how_many_pictures_a_step_looks_at(make: Callable[..., RunConfig]) -> None:
    shown = printed(dryrun.dry_run(make("data.per_picture=5", "train.batch_size=10", "train.steps=4"), samples=0))
    assert "8, up to 5 of whose records come together" in shown
    assert "a step of 10 draws looks at 2.0 of them (the mean of 4 steps), set by set" in shown
    chosen = make("data.per_picture=5", "train.batch_size=7", "train.steps=5")  # steps cut groups: each counts in both
    steps = [{draw.unit for draw in maker_of(chosen, None, batch_size=7).draws(step)} for step in range(5)]
    assert sum(map(len, steps)) / 5 == 2.2
    assert "a step of 7 draws looks at 2.2 of them" in printed(dryrun.dry_run(chosen, samples=0))
    assert "looks at" not in printed(dryrun.dry_run(make(), samples=0))


def test_a_plan_counts_the_pictures_that_are_shared(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    found, sizes = {}, plan.sizes(make())
    for per in ("null", "5"):
        chosen = make(f"data.per_picture={per}", "train.batch_size=10", "train.steps=4")
        found[per] = plan.look(chosen, sizes).steps.mean("pictures")
    assert found["5"] == 2.0 < 5 < found["null"] <= 8
    for per in ("null", "4"):  # sets that are not there, as their numbers of pictures are stated
        chosen = make(
            f"data.per_picture={per}", "data.tasks={vqav2: 1.0, web_capfilt: 1.0}", "train.batch_size=64",
            "train.steps=3", f"data.root={tmp_path}",
        )  # fmt: skip
        found[per] = plan.look(chosen, sizes).steps.mean("pictures")
    assert found["null"] == 64 and 57 < found["4"] < 60  # ten draws of 64 are questions, 5.4 a picture


def test_stated_pictures_make_groups_without_an_array() -> None:
    named = {name: cards.load(name) for name in ("vqav2", "web_capfilt")}
    sizes = {name: cast(Any, card.train).size for name, card in named.items()}
    assert shapes.stated_groups(named, sizes, None) == {}
    (groups,) = shapes.stated_groups(named, sizes, 4).values()
    assert (groups.records, groups.pictures) == (443_757, 82_783) and isinstance(groups.order, range)


def test_sets_without_shared_pictures_have_no_groups(data: Path) -> None:
    (key, card), *_ = cards.load_all([str(data / "colours.yaml")], "train").items()
    (source,) = open_sources({key: card}, data).values()
    alone = Source(source.card, source.section, source.templates, records_of(data.parent / "own", [{"image": "a.png"}]))
    assert list(groups_of({"shared": source, "alone": alone}, 3)) == ["shared"]
    assert groups_of({"shared": source}, None) == {}


def test_the_switches_of_the_ablations_can_be_turned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = Path(__file__).parent.parent / "benchmarks" / "ablations.py"
    spec = importlib.util.spec_from_file_location("ablations", file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for overrides in script.VARIANTS.values():
        config.load("demo", list(overrides))
    assert config.load("demo", list(script.VARIANTS["grouped by picture"])).data.per_picture == 4
    scores = {"as it is": [{"gqa": 50.0}, {"gqa": 52.0}], "grouped by picture": [{"gqa": 51.0}, {"gqa": 53.5}]}
    page = script.table(scores)
    assert page.splitlines()[-1].startswith("| grouped by picture | 52.25 (51.00 to 53.50); +1.25 ± ")
    monkeypatch.setattr(script, "run", lambda folder, seed, *_: {"gqa": 50.0 + seed})
    tmp_path.joinpath("table.md").write_text("of all variants")
    monkeypatch.setattr("sys.argv", ["ablations", "--only", "grouped by picture", "--output", str(tmp_path)])
    script.main()
    rows = (tmp_path / "table_grouped_by_picture.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["as it is", "grouped by picture"]
    assert tmp_path.joinpath("table.md").read_text() == "of all variants"
    monkeypatch.setattr("sys.argv", ["ablations", "--only", "no templates"])
    with pytest.raises(SystemExit):
        script.main()
    assert "'no templates' is a variant of the demo on all thirteen sets; add --full" in capsys.readouterr().err
