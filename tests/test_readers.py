"""Readers: the sample each official form gives, and the one sentence each broken file or record gives."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from qformer.cards import EvalCard, TaskCard, TrainCard
from qformer.data.readers import READERS, open_records
from qformer.data.records import Records
from qformer.errors import ConfigError, DataError
from qformer.sample import Turn


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def opened(root: Path, reader: str, options: dict[str, Any] | None = None, /, **contents: Any) -> Records:
    """A reader over files that hold `contents` by role."""
    files = {role: put(root / f"{role}.json", content) for role, content in contents.items()}
    return READERS[reader]({**files, "images": root / "pictures"}, options or {}, "set", "split")


RECORD = {"id": "a", "image": "a.png", "instruction": "What is it?", "target": "cat"}


class TestJsonLines:
    def read(self, root: Path, *rows: Any, **options: Any) -> Records:
        return opened(root, "jsonl", options, records=lines(*rows))

    def test_a_record_becomes_a_sample_with_its_further_keys_as_fields(self, tmp_path: Path) -> None:
        record = {**RECORD, "target": ["cat", "cat", "tom"], "candidates": ["cat", "dog"], "source": "album"}
        (sample,) = self.read(tmp_path, record)
        assert (sample.id, sample.task) == ("a", "set")
        assert sample.images == (tmp_path / "pictures" / "a.png",)
        assert sample.fields == {"id": "a", "instruction": "What is it?", "source": "album"}
        assert sample.references == ("cat", "cat", "tom")
        assert sample.candidates == ("cat", "dog")

    def test_several_pictures_and_turns(self, tmp_path: Path) -> None:
        turns = [{"instruction": "Who?", "answer": "Ann"}, {"instruction": "Where?", "answer": "Here"}]
        (sample,) = self.read(tmp_path, {"id": 7, "images": ["a.png", "b.png"], "turns": turns})
        assert sample.id == "7"
        assert [path.name for path in sample.images] == ["a.png", "b.png"]
        assert sample.turns == (Turn("Who?", "Ann"), Turn("Where?", "Here"))
        assert sample.references == ("Here",)

    def test_kind_is_cut_out_of_the_id(self, tmp_path: Path) -> None:
        (sample,) = self.read(tmp_path, {**RECORD, "id": "frog-12-yesno"}, kind=r"-(\w+)$")
        assert sample.fields["kind"] == "yesno"

    def test_empty_lines_are_no_records(self, tmp_path: Path) -> None:
        assert len(self.read(tmp_path, RECORD, "", {**RECORD, "id": "b"}, "  ")) == 2

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"id": "b", ', r"not valid JSON \(.* at column \d+\); mend or remove the line\.$"),
            ("[1, 2]", "holds no JSON object"),
            ({**RECORD, "id": "a"}, "the id 'a' was given in line 1 already; give each line its own"),
            ({"id": "b", "image": "a.png", "target": "cat"}, "there is no field 'instruction'; mend or remove"),
            ({"id": "b", "image": "a.png", "instruction": "What?"}, "there is no field 'target'; mend or remove"),
            ({"image": "a.png", "instruction": "What?", "target": "cat"}, "there is no field 'id'; mend or remove"),
            ({"id": "b", "instruction": "What?", "target": "cat"}, "there is no field 'image'; mend or remove"),
            ({**RECORD, "id": "b", "images": []}, "'images' must be a list of at least one"),
            ({**RECORD, "id": "b", "images": [3]}, "'images' holds 3 where text belongs"),
            ({**RECORD, "id": "b", "target": " "}, "'target' is empty; fill it, or remove the record"),
            ({**RECORD, "id": "b", "target": []}, "'target' is .*; it must be text or a list"),
            ({**RECORD, "id": "b", "target": True}, "'target' holds true where text belongs; put it in quotes"),
            ({**RECORD, "id": "b", "instruction": ""}, "'instruction' is empty; fill it, or remove the record"),
            ({**RECORD, "id": "b", "candidates": ["dog", "cow"]}, "not among the candidates dog, cow; add it to"),
            ({**RECORD, "id": "b", "candidates": ["cat", "cat"]}, "a candidate is given twice; name each once"),
            ({**RECORD, "id": "b", "candidates": "cat"}, "'candidates' is \"cat\"; it must be"),
            ({"id": "b", "image": "a.png", "turns": [{"instruction": "Who?"}]}, "there is no field 'answer'"),
            ({"id": "b", "image": "a.png", "turns": ["Who?"]}, "not of the form expected"),
        ],
    )
    def test_a_broken_record_names_file_and_line_and_spares_the_others(
        self, tmp_path: Path, row: Any, message: str
    ) -> None:
        records = self.read(tmp_path, RECORD, "", row)
        assert records[0].id == "a"
        assert len(records) == 2
        with pytest.raises(DataError, match=message) as caught:
            records[1]
        assert str(caught.value).startswith(f"{tmp_path / 'records.json'}, line 3: ")

    def test_what_is_found_at_opening_is_listed_by_place(self, tmp_path: Path) -> None:
        records = self.read(tmp_path, RECORD, "{", {**RECORD, "id": "b"}, RECORD)
        assert list(records.broken) == [1, 3]
        with pytest.raises(DataError, match="line 2"):
            records[-3]

    def test_options_are_checked(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no options\.kinds.*Did you mean 'kind'"):
            self.read(tmp_path, RECORD, kinds="x")
        with pytest.raises(ConfigError, match="not a regular expression"):
            self.read(tmp_path, RECORD, kind="(")
        with pytest.raises(DataError, match="finds no group in the id 'a'"):
            self.read(tmp_path, RECORD, kind=r"-(\d+)")[0]

    def test_records_travel_to_worker_processes(self, tmp_path: Path) -> None:
        records = pickle.loads(pickle.dumps(self.read(tmp_path, RECORD, kind="(a)")))
        assert records[0].fields["kind"] == "a"

    def test_an_index_beyond_the_end_ends_a_loop(self, tmp_path: Path) -> None:
        with pytest.raises(IndexError):
            self.read(tmp_path, RECORD)[1]


COCO = {
    "images": [{"id": 5, "file_name": "five.jpg"}, {"id": 6, "file_name": "six.jpg", "domain": "out-domain"}],
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "A kite.\n"},
        {"id": 2, "image_id": 5, "caption": "A red  kite."},
        {"id": 3, "image_id": 6, "caption": "A tuba."},
        {"id": 4, "image_id": 9, "caption": "Nowhere."},
    ],
}


def test_coco_captions_make_a_record_of_each_caption_or_of_each_picture(tmp_path: Path) -> None:
    captions = opened(tmp_path, "coco_captions", captions=COCO)
    assert [captions[place].references for place in range(3)] == [("A kite.",), ("A red kite.",), ("A tuba.",)]
    assert captions[1].id == "set/split/2"
    with pytest.raises(DataError, match="record 4: its image_id 9 is not among 'images'; remove the caption"):
        captions[3]
    pictures = opened(tmp_path, "coco_captions", {"per": "image"}, captions=COCO)
    assert pictures[0].references == ("A kite.", "A red kite.")
    assert pictures[1].images == (tmp_path / "pictures" / "six.jpg",)
    assert pictures[1].fields == {"image_id": 6, "domain": "out-domain"}
    with pytest.raises(ConfigError, match=r"options\.per is 'row'; it takes caption or image"):
        opened(tmp_path, "coco_captions", {"per": "row"}, captions=COCO)
    uncaptioned = {"images": COCO["images"], "annotations": []}
    with pytest.raises(DataError, match="record 5: its picture has no caption; write one, or remove the picture"):
        opened(tmp_path, "coco_captions", {"per": "image"}, captions=uncaptioned)[0]


def test_karpathys_split_takes_train_and_restval(tmp_path: Path) -> None:
    def picture(number: int, split: str) -> dict[str, Any]:
        sentences = [{"sentid": number * 10 + k, "raw": f" Caption {k}."} for k in range(2)]
        place = {"filepath": "val2014", "filename": f"{number}.jpg", "cocoid": number, "imgid": 0}
        return {**place, "split": split, "sentences": sentences}

    content = {"images": [picture(1, "train"), picture(2, "test"), picture(3, "restval")]}
    train = opened(tmp_path, "karpathy", captions=content)
    assert [sample.id for sample in train] == [f"set/split/{key}" for key in (10, 11, 30, 31)]
    assert train[2].images == (tmp_path / "pictures" / "val2014" / "3.jpg",)
    (test,) = opened(tmp_path, "karpathy", {"splits": ["test"], "per": "image"}, captions=content)
    assert test.references == ("Caption 0.", "Caption 1.")
    with pytest.raises(ConfigError, match=r"options\.splits is 'restval'; it takes a list"):
        opened(tmp_path, "karpathy", {"splits": "restval"}, captions=content)
    assert test.fields["image_id"] == 2


def test_vqa_joins_questions_and_annotations_and_keeps_ten_answers(tmp_path: Path) -> None:
    answers = [{"answer": "red" if k < 7 else "pink", "raw_answer": "reddish", "answer_id": k + 1} for k in range(10)]
    questions = [{"image_id": 42, "question_id": 42000 + k, "question": "What colour?"} for k in range(2)]
    annotation = {"question_id": 42000, "question_type": "what color", "answer_type": "other", "answers": answers}
    contents = {"questions": {"questions": questions}, "annotations": {"annotations": [annotation]}}
    records = opened(tmp_path, "vqa", {"image": "COCO_train2014_%012d.jpg"}, **contents)
    assert records[0].images[0].name == "COCO_train2014_000000000042.jpg"
    assert records[0].references == ("red",) * 7 + ("pink",) * 3
    assert records[0].fields == {
        "question": "What colour?",
        "image_id": 42,
        "question_type": "what color",
        "answer_type": "other",
    }
    assert records[0].id == "set/split/42000"
    with pytest.raises(
        DataError, match=r"record 42001: its question_id is not in .*annotations\.json; add its answers"
    ):
        records[1]
    assert opened(tmp_path, "vqa", {"answer": "raw_answer"}, **contents)[0].references == ("reddish",) * 10


def test_aokvqa_refers_to_direct_answers_or_to_the_right_choice(tmp_path: Path) -> None:
    row = {"image_id": 9, "question_id": "q", "question": "What?", "choices": ["cab", "bus"], "correct_choice_idx": 1}
    rows = [
        {**row, "direct_answers": ["bus"] * 10, "difficult_direct_answer": False},
        {**row, "question_id": "r", "direct_answers": ["bus"] * 10, "difficult_direct_answer": True},
    ]
    direct = opened(tmp_path, "aokvqa", {"difficult": "drop"}, questions=rows)
    assert len(direct) == 1
    assert (direct[0].references, direct[0].candidates) == (("bus",) * 10, ("cab", "bus"))
    choice = opened(tmp_path, "aokvqa", {"form": "multiple_choice"}, questions=rows)
    assert len(choice) == 2
    assert choice[0].references == ("bus",)
    assert choice[0].images[0].name == "000000000009.jpg"
    for place in (4, -1):
        rows[0]["correct_choice_idx"] = place
        with pytest.raises(DataError, match=f"record q: 'correct_choice_idx' is {place}; it must be at least 0"):
            opened(tmp_path, "aokvqa", questions=rows)[0]


def test_llava_conversations_lose_the_image_tag_and_keep_their_turns(tmp_path: Path) -> None:
    said = [("human", "<image>\nWhat is it?"), ("gpt", "A kite."), ("human", "Is it red?"), ("gpt", "Yes.")]
    row = {"id": "42", "image": "42.jpg", "conversations": [{"from": who, "value": what} for who, what in said]}
    short = {**row, "conversations": row["conversations"][:3]}
    empty = {**row, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    records = opened(tmp_path, "llava", conversations=[row, row, short, empty])
    assert records[0].turns == (Turn("What is it?", "A kite."), Turn("Is it red?", "Yes."))
    assert records[0].id != records[1].id
    with pytest.raises(DataError, match="record 2: its turns are by human, gpt, human; they must be"):
        records[2]
    with pytest.raises(DataError, match="record 3: turn 1 is empty; fill it, or remove the dialogue"):
        records[3]


def test_gqa_keeps_the_structural_type_as_kind(tmp_path: Path) -> None:
    row = {"question": "Is it?", "imageId": "n4", "answer": "no", "types": {"structural": "verify"}}
    (sample,) = opened(tmp_path, "gqa", questions={"201": row})
    assert (sample.id, sample.references, sample.fields["kind"]) == ("set/split/201", ("no",), "verify")
    assert sample.images[0].name == "n4.jpg"


def test_vsr_says_its_labels_in_the_cards_words(tmp_path: Path) -> None:
    rows = [{"image": "4.jpg", "caption": "The cat is under it.", "label": k, "relation": "under"} for k in (1, 0)]
    records = opened(tmp_path, "vsr", {"words": ["false", "true"]}, statements=lines(*rows))
    assert [sample.references for sample in records] == [("true",), ("false",)]
    assert records[0].fields["statement"] == "The cat is under it."
    for words in ({}, {"words": ["true"]}, {"words": [False, True]}, {"words": "no"}):
        with pytest.raises(ConfigError, match=r"options\.words must be two words, for label 0 and label 1, in quotes"):
            opened(tmp_path, "vsr", words, statements=lines(*rows))
    for label in (-1, 2):
        wrong = opened(tmp_path, "vsr", {"words": ["false", "true"]}, statements=lines({**rows[0], "label": label}))
        with pytest.raises(DataError, match=f"record 1: 'label' is {label}; it must be at least 0 and below 2"):
            wrong[0]
    with pytest.raises(DataError, match=r"line 2: not valid JSON \(.*\); mend or remove the line\.$"):
        opened(tmp_path, "vsr", {"words": ["false", "true"]}, statements=lines(rows[0], "{"))


def test_iconqa_offers_its_choices(tmp_path: Path) -> None:
    problems = {"12": {"question": "How many?", "choices": ["3", "5"], "answer": 1, "grade": "prek"}}
    contents = {"problems": problems, "splits": {"choose_txt_test": ["12", "13"]}}
    records = opened(tmp_path, "iconqa", **contents)
    assert (records[0].references, records[0].candidates) == (("5",), ("3", "5"))
    assert records[0].images == (tmp_path / "pictures" / "12" / "image.png",)
    problems["12"]["answer"] = -1
    with pytest.raises(DataError, match="record 12: 'answer' is -1; it must be at least 0 and below 2"):
        opened(tmp_path, "iconqa", **contents)[0]
    with pytest.raises(DataError, match=r"record 13: it is in .*splits\.json and not among the problems"):
        records[1]
    with pytest.raises(ConfigError, match=r"no split 'choose_txt_tests'.*Did you mean 'choose_txt_test'"):
        opened(tmp_path, "iconqa", {"split": "choose_txt_tests"}, **contents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ', "not valid JSON .*cut short"),
        ("{}", r"holds no record; is it the file that the card means\?"),
        ("[]", "not of the form expected"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, "gqa", questions=content)
    assert str(tmp_path / "questions.json") in str(caught.value)


def test_files_that_are_not_text_or_lack_a_part_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "questions.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="it cannot be read"):
        READERS["gqa"]({"questions": binary, "images": tmp_path}, {}, "set")
    with pytest.raises(DataError, match="it cannot be read as text"):
        READERS["jsonl"]({"records": binary, "images": tmp_path}, {}, "set")
    with pytest.raises(DataError, match=r"captions\.json: there is no field 'images'"):
        opened(tmp_path, "karpathy", captions={"pictures": []})


class TestOpenRecords:
    def card(self, **changes: Any) -> tuple[TrainCard, TaskCard]:
        section = {"reader": "jsonl", "files": {"records": "mine.jsonl", "images": "pictures"}, "template": "x"}
        train = TrainCard(**{**section, **changes})
        return train, TaskCard("mine", 1, source="example.org: mine.zip", train=train)

    def test_files_are_looked_for_under_the_root(self, tmp_path: Path) -> None:
        put(tmp_path / "mine.jsonl", lines(RECORD))
        (tmp_path / "pictures").mkdir()
        section, card = self.card()
        assert open_records(section, tmp_path, card)[0].task == "mine"
        scored = EvalCard("jsonl", section.files, "x", "dev", "rank", "accuracy")
        assert open_records(scored, tmp_path, card).split == "dev"

    def test_a_missing_root_or_file_says_what_to_download_and_where_it_belongs(self, tmp_path: Path) -> None:
        section, card = self.card()
        with pytest.raises(DataError, match=r"data\.root is '.*nowhere'.*To download: example\.org: mine\.zip"):
            open_records(section, tmp_path / "nowhere", card)
        with pytest.raises(DataError, match=r"no '.*mine\.jsonl' \(files\.records.*To download: example\.org"):
            open_records(section, tmp_path, card)

    def test_an_unknown_reader_or_role_is_a_wrong_setting(self, tmp_path: Path) -> None:
        put(tmp_path / "mine.jsonl", lines(RECORD))
        with pytest.raises(ConfigError, match=r"unknown reader 'json'.*Did you mean 'jsonl'"):
            open_records(*(self.card(reader="json")[0], tmp_path, self.card()[1]))
        with pytest.raises(ConfigError, match=r"mine: reader 'jsonl' needs files\.images; it takes records, images"):
            open_records(self.card(files={"records": "mine.jsonl"})[0], tmp_path, self.card()[1])
        files = {"records": "mine.jsonl", "images": ".", "record": "mine.jsonl"}
        with pytest.raises(ConfigError, match=r"has no files\.record\.? *.*Did you mean 'records'"):
            open_records(self.card(files=files)[0], tmp_path, self.card()[1])
