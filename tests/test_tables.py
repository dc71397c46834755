"""Tables of the hub, tar shards with captions, and the options that cards' variants set."""

from __future__ import annotations

import inspect
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from qformer import cards, text
from qformer.cards import TrainCard
from qformer.data import ocr
from qformer.data.columns import Cell
from qformer.data.readers import READERS, open_records
from qformer.data.records import Records
from qformer.errors import ConfigError, DataError
from qformer.evaluate.baselines import shuffled_pictures
from qformer.evaluate.run import picture_name
from qformer.images import load_image, picture_key
from qformer.sample import Packed, Sample
from tests import broken, fixtures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import datasets

    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield fixtures.root(folder)


def jpeg(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(stream, "JPEG")
    return stream.getvalue()


def stored(colour: str) -> dict[str, Any]:
    return {"bytes": jpeg(colour), "path": f"{colour}.jpg"}


def table(folder: Path, split: str = "train", /, **columns: list[Any]) -> Path:
    """A table in parquet where a card looks for one."""
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return folder


def read(root: Path, name: str, section: str = "train") -> list[Sample]:
    card = cards.load(name)
    return list(open_records(getattr(card, section), root, card))


def answers(*words: str) -> list[dict[str, Any]]:
    return [{"answer": word, "answer_confidence": "yes", "answer_id": place} for place, word in enumerate(words, 1)]


@pytest.fixture(scope="class")
def written(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of a class write, all of them: each may have run in another process, or not yet.

    `root` is asked for since it keeps what is read out of the user's cache.
    """
    folder = fixtures.root(tmp_path_factory.mktemp("written"))
    for name, test in vars(request.cls).items():
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["self", "root"]:
            test(request.cls(), folder)
    return folder


class TestMirrors:
    """By one line, `name:hub`, a card reads the mirror's columns: here from a folder of parquet in that layout."""

    def test_vqav2(self, root: Path) -> None:
        columns: dict[str, list[Any]] = {
            "question_type": ["what is", "is it"],
            "multiple_choice_answer": ["kite", "yes"],
            "answers": [answers(*["kite"] * 6, *["drache"] * 4), answers(*["yes"] * 10)],
            "image_id": [42, 42],
            "answer_type": ["other", "yes/no"],
            "question_id": [42000, 42001],
            "question": ["What is it?", "Is it red?"],
            "image": [stored("red"), stored("red")],
        }
        table(root / "hub" / "VQAv2", **columns)
        table(root / "hub" / "VQAv2-validation", "validation", **columns)
        first, second = read(root, "vqav2:hub")
        assert first.id == "vqav2/train/42000"
        assert first.references == ("kite",) * 6 + ("drache",) * 4
        assert {first.fields[name] for name in ("question", "answer_type", "image_id")} == {"What is it?", "other", 42}
        assert read(root, "vqav2:hub", "eval")[1].references == ("yes",) * 10
        (picture,) = first.images
        assert isinstance(picture, Packed)
        assert load_image(picture, 1000, first.id).size == (12, 10)
        assert picture_key(picture, root) == "hub/VQAv2/42"
        assert first.images == second.images  # two questions about one picture
        assert [s.fields["question"] for s in read(root, "vqg_vqav2:hub")] == ["What is it?", "Is it red?"]

    def test_okvqa(self, root: Path) -> None:
        said = [[{**each, "raw_answer": f"{each['answer']}ing"} for each in answers("race", "race", "run")]]
        table(
            root / "hub" / "OK-VQA",
            image=[stored("blue")], question_type=["one"], answers=said, image_id=[7], answer_type=["other"],
            question_id=[71], question=["What sport?"],
        )  # fmt: skip
        table(
            root / "hub" / "OK-VQA-val2014", "val2014",
            question_id=["72"], image=[stored("blue")], question=["What?"], answers=[["a", "b"]], question_type=["two"],
            answer_type=["other"],
        )  # fmt: skip
        assert read(root, "okvqa:hub")[0].references == ("race", "race", "run")
        assert read(root, "vqg_okvqa:hub")[0].references == ("raceing", "raceing", "runing")
        assert read(root, "okvqa:hub", "eval")[0].references == ("a", "b")

    def test_aokvqa_whose_direct_answers_are_a_list_written_as_text(self, root: Path) -> None:
        columns: dict[str, list[Any]] = {
            "image": [stored("red"), stored("green")],
            "question_id": ["q1", "q2"],
            "question": ["What?", "Who?"],
            "choices": [["cab", "train"], ["he", "she"]],
            "correct_choice_idx": pyarrow.array([1, 0], pyarrow.int8()),  # type: ignore[dict-item]
            "direct_answers": ["['cab', \"driver's cab\"]", "['he']"],
            "difficult_direct_answer": [False, True],
            "rationales": [["a"], ["b"]],
        }
        table(root / "hub" / "A-OKVQA", **columns)
        table(root / "hub" / "A-OKVQA", "validation", **columns)
        first, second = read(root, "aokvqa:hub")
        assert (first.references, first.candidates) == (("cab", "driver's cab"), ("cab", "train"))
        assert second.references == ("he",)
        assert [sample.id for sample in read(root, "aokvqa:hub", "eval")] == ["aokvqa/val/q1"]
        options = {"columns": {"id": "question_id", "image": "image", "question": "question", "choices": "choices"}}
        options["columns"] |= {"right": "correct_choice_idx"}
        chosen = READERS["columns"]({"table": root / "hub" / "A-OKVQA"}, {**options, "form": "multiple_choice"}, "x")
        assert [sample.references for sample in chosen] == [("train",), ("he",)]

    def test_ocrvqa_has_a_row_a_cover_and_words_of_its_own(self, root: Path) -> None:
        columns: dict[str, list[Any]] = {
            "image": [stored("red"), stored("green")],
            "image_id": ["0123", "0456"],
            "questions": [["Who?", "What?"], ["Is it?"]],
            "answers": [["Jane Roe", "Rivers"], ["No"]],
            "ocr_tokens": [["RIVERS", " ", "Roe"], []],
            "ocr_info": [[{"word": "RIVERS", "bounding_box": None}], None],
            "title": ["Rivers", "X"],
        }
        table(root / "hub" / "OCR-VQA", **columns)
        samples = read(root, "ocrvqa:hub")
        assert [sample.id.rpartition("train/")[2] for sample in samples] == ["0123/0", "0123/1", "0456/0"]
        assert [sample.references for sample in samples] == [("Jane Roe",), ("Rivers",), ("No",)]
        assert [sample.fields["ocr"] for sample in samples] == ["RIVERS, Roe", "RIVERS, Roe", ""]
        assert samples[0].images == samples[1].images != samples[2].images

    def test_textcaps_takes_its_words_from_the_side_file(self, root: Path) -> None:
        table(
            root / "hub" / "TextCaps",
            question_id=["1"], question=[""], image=[stored("red")], image_id=["0a1b2c3d4e5f6789"],
            caption_id=[[1, 2]], caption_str=[["A bottle.", "A tonic."]], reference_strs=[["A bottle.", "A tonic."]],
        )  # fmt: skip
        samples = read(root, "textcaps:hub")
        assert [sample.references for sample in samples] == [("A bottle.",), ("A tonic.",)]
        assert samples[0].fields["ocr"] == "TONIC, water, est. 1872"

    def test_coco_caption_whose_pictures_are_files(self, root: Path) -> None:
        for split, number, folder in (("train", 42, "train2014"), ("restval", 77, "val2014"), ("test", 91, "val2014")):
            table(
                root / "hub" / "coco-karpathy", split,
                filename=[f"COCO_{folder}_{number:012d}.jpg"], imgid=[number], sentences=[["One.", "Two."]],
                url=["https://example.org/a.jpg"],
            )  # fmt: skip
        samples = read(root, "coco_caption:hub")
        assert sorted(sample.id.rpartition("train/")[2] for sample in samples) == ["42/0", "42/1", "77/0", "77/1"]
        assert {str(picture.relative_to(root)) for sample in samples for picture in sample.images} == {  # type: ignore[union-attr]
            "coco/train2014/COCO_train2014_000000000042.jpg",
            "coco/val2014/COCO_val2014_000000000077.jpg",
        }
        (test,) = read(root, "coco_caption:hub", "eval")
        assert test.references == ("One.", "Two.")

    @pytest.mark.parametrize("name", [name for name in fixtures.HELD_IN if "hub" in cards.load(name).variants])
    def test_no_card_lacks_a_test_above(self, written: Path, name: str) -> None:
        assert read(written, f"{name}:hub")


class TestHeldOutMirrors:
    """The same of the sets that are scored zero-shot, where a mirror holds what they are scored by."""

    def test_flickr30k_of_which_one_column_says_the_split(self, root: Path) -> None:
        table(
            root / "hub" / "flickr30k", "test",
            image=[stored("red"), stored("green"), stored("blue")], img_id=["0", "1", "2"],
            caption=[["One.", "Two."], ["Three.", "Four."], ["Five."]], sentids=[["0", "1"], ["2", "3"], ["4"]],
            split=["train", "test", "val"], filename=["0.jpg", "1.jpg", "2.jpg"],
        )  # fmt: skip
        (sample,) = read(root, "flickr30k:hub", "eval")
        assert (sample.id, sample.references) == ("flickr30k/karpathy_test/1", ("Three.", "Four."))
        assert load_image(sample.images[0], 1000, "here").getpixel((5, 5))[1] > 100  # type: ignore[arg-type, index]

    def test_gqa_whose_pictures_are_in_a_table_of_their_own(self, root: Path) -> None:
        folder = root / "hub" / "GQA"
        types = {"detailed": "a", "semantic": "rel", "structural": "verify"}
        table(
            folder / "testdev_balanced_instructions", "testdev",
            id=["201", "202", "203"], imageId=["n5", "n4", "n9"], question=["Is it?", "What is it?", "Who?"],
            answer=["no", "cup", "man"], fullAnswer=["No.", "A cup.", "A man."], isBalanced=[True] * 3,
            types=[types] * 3,
        )  # fmt: skip
        table(folder / "testdev_balanced_images", "testdev", id=["n4", "n5"], image=[stored("red"), stored("green")])
        card = cards.load("gqa:hub")
        assert card.eval
        records = open_records(card.eval, root, card)
        assert [records[place].references for place in (0, 1)] == [("no",), ("cup",)]
        assert records[0].fields["kind"] == "verify" and records[0].fields["image_id"] == "n5"
        greens = [load_image(records[place].images[0], 1000, "here").getpixel((5, 5))[1] for place in (0, 1)]  # type: ignore[arg-type, index]
        assert greens[0] > 100 > greens[1]
        assert records[0].images != records[1].images
        with pytest.raises(DataError, match=r"record 203: its picture 'n9' is not in .*_images; fetch both again"):
            records[2]
        assert set(records.sources()) == {"table", "pictures"}
        files, options = dict(records.files), dict(records.options)
        with pytest.raises(ConfigError, match=r"options\.pictures must name the columns 'id' and 'image'"):
            READERS["columns"](files, {**options, "pictures": {"id": "id"}}, "set")
        options["pictures"] = {**options["pictures"], "id": "nmae"}
        with pytest.raises(DataError, match=r"there is no column 'nmae' \(options\.pictures\.id\)"):
            READERS["columns"](files, options, "set")

    def test_nocaps(self, root: Path) -> None:
        table(
            root / "hub" / "NoCaps", "validation",
            image=[stored("red")], image_id=[7], image_file_name=["a.jpg"], annotations_ids=[[70, 71]],
            annotations_captions=[["A tuba.", "A tuba rests."]],
        )  # fmt: skip
        (sample,) = read(root, "nocaps:hub", "eval")
        assert sample.references == ("A tuba.", "A tuba rests.") and sample.fields["image_id"] == 7

    def test_iconqa_whose_choices_are_one_text(self, root: Path) -> None:
        table(
            root / "hub" / "ICON-QA", "test",
            question_id=["1", "2", "3"], question=["How many?", "Which?", "Who?"], grade=["prek"] * 3,
            choices=["3,5", "choice_0.png", "a, b,c"], answer=["5", "0", "a, b"], query_image=[stored("red")] * 3,
            ques_type=["choose_txt", "choose_img", "choose_txt"],
        )  # fmt: skip
        card = cards.load("iconqa:hub")
        assert card.eval
        records = open_records(card.eval, root, card)
        assert len(records) == 2
        assert (records[0].candidates, records[0].references) == (("3", "5"), ("5",))
        with pytest.raises(
            DataError, match="record 3: its answer 'a, b' is not among its choices a, b, c; a choice may"
        ):
            records[1]

    def test_scienceqa(self, root: Path) -> None:
        for split in ("train", "test"):
            table(
                root / "hub" / "ScienceQA" / "ScienceQA-IMG", split,
                image=[stored("red")], question=["Which is a solid?"], choices=[["water", "rock"]], answer=[1],
                hint=["Look at\nthe table."], lecture=["A solid keeps its shape."], subject=["natural science"],
            )  # fmt: skip
        (sample,) = read(root, "scienceqa:hub", "eval")
        card = cards.load("scienceqa:hub")
        assert card.eval
        asked = text.render_eval(card.eval, text.load_templates(card.eval.template), sample).instruction
        assert asked == ("Context: Look at the table. Question: Which is a solid? Options: (a) water (b) rock. Answer:")
        assert sample.references == ("rock",) == read(root, "scienceqa:hub")[0].references

    def test_textvqa_brings_words_of_its_own(self, root: Path) -> None:
        table(
            root / "hub" / "textvqa", "validation",
            image_id=["a"], question_id=pyarrow.array([34602], pyarrow.int32()), question=["what day?"],
            image=[stored("red")], answers=[["monday"] * 9 + [""]], ocr_tokens=[[f"w{n}" for n in range(40)]],
        )  # fmt: skip
        (sample,) = read(root, "textvqa:hub", "eval")
        assert sample.fields["ocr"] == ", ".join(f"w{n}" for n in range(30))
        assert sample.references == ("monday",) * 9 + ("",)

    def test_vizwiz(self, root: Path) -> None:
        table(
            root / "hub" / "VizWiz-VQA", "val",
            question_id=["VizWiz_val_00000000.jpg"], image=[stored("red")], question=["What  is this?"],
            answers=[["cup"] * 10], category=["other"],
        )  # fmt: skip
        (sample,) = read(root, "vizwiz:hub", "eval")
        assert sample.fields["answer_type"] == "other" and sample.fields["question"] == "What is this?"

    @pytest.mark.parametrize("name", [name for name in fixtures.HELD_OUT if "hub" in cards.load(name).variants])
    def test_no_card_lacks_a_test_above(self, written: Path, name: str) -> None:
        """The two whose mirrors hold the official files are read in tests/test_heldout.py."""
        if name not in ("vsr", "hatefulmemes"):
            card = cards.load(f"{name}:hub")
            assert card.eval and len(open_records(card.eval, written, card))

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"keep": ["split"]}, ConfigError, r"options\.keep is \['split'\]; it takes values by column"),
            ({"keep": {"splitt": "test"}}, DataError, r"no column 'splitt' \(options\.keep\.splitt\)"),
            ({"drop": "spilt"}, DataError, r"no column 'spilt' \(options\.drop\).*Did you mean 'split'"),
            ({"pictures": {"id": "a"}}, ConfigError, r"take both files\.pictures and options\.pictures"),
        ],
    )
    def test_what_is_wrong_with_an_option_is_said(
        self, root: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        made = table(tmp_path, image=[stored("red")], answers=[["a"]], split=["test"])
        options = {"columns": {"image": "image", "answers": "answers"}, **changes}
        with pytest.raises(kind, match=message):
            READERS["columns"]({"table": made}, options, "set")

    def test_questions_about_one_picture_stand_or_fall_together(self, root: Path, tmp_path: Path) -> None:
        """Two rows hold its bytes, and no column its id: in bootstrap, shuffling and file it is one picture."""
        table(
            tmp_path / "hub" / "OK-VQA-val2014", "val2014",
            question_id=["1", "2", "3", "4"], image=[stored(c) for c in ("red", "blue", "red", "blue")],
            question=["What?"] * 4, answers=[["a"] * 4] * 4, question_type=["one"] * 4, answer_type=["other"] * 4,
        )  # fmt: skip
        samples = read(tmp_path, "okvqa:hub", "eval")
        red, blue, *_ = (sample.images for sample in samples)
        assert [sample.images for sample in samples] == [red, blue] * 2 and red != blue
        assert len({sample.images for sample in samples}) == 2
        assert shuffled_pictures(samples, 0) == [blue, red] * 2
        names = [picture_name(sample.images[0], tmp_path) for sample in samples]
        assert names[0] == names[2] != names[1] and names[0].startswith("hub/OK-VQA-val2014/sha256:")
        assert names == [picture_key(sample.images[0], tmp_path) for sample in samples]  # and is encoded once
        torn = Cell(Path("t"), "3", [{"image": None}], 0)
        assert torn.identity == "3" and torn == Cell(Path("t"), "3", [{"image": 7}], 0) != samples[0].images[0]


class TestColumns:
    def opened(self, folder: Path, per: str = "row", split: str = "train", **columns: Any) -> Records:
        wanted = {"image": "image", "question": "question", "answers": "answers", **columns}
        return READERS["columns"]({"table": folder}, {"columns": wanted, "per": per, "split": split}, "set")

    def made(self, folder: Path, **more: list[Any]) -> Path:
        return table(folder, **{"image": [stored("red")], "question": ["Q?"], "answers": [["a", "b", "a"]], **more})

    def test_a_row_for_each_distinct_answer(self, root: Path, tmp_path: Path) -> None:
        records = self.opened(self.made(tmp_path), per="answer")
        assert [(sample.id, sample.references) for sample in records] == [
            ("set/train/0/0", ("a",)),
            ("set/train/0/1", ("b",)),
        ]

    def test_a_row_that_is_wrong_is_listed_and_the_others_are_split(self, root: Path, tmp_path: Path) -> None:
        made = self.made(
            tmp_path, image=[stored("red")] * 3, question=[["Q?", "R?"], None, ["S?"]],
            answers=[["a", "b"], ["a"], ["a", "b"]],
        )  # fmt: skip
        records = self.opened(made, per="item")
        assert [(records[place].fields["question"], records[place].references) for place in (0, 1)] == [
            ("Q?", ("a",)),
            ("R?", ("b",)),
        ]
        for place, shown in ((2, "null"), (3, r'\["S\?"\]')):
            with pytest.raises(DataError, match=rf"record {place - 1}: 'question' is {shown} where text belongs"):
                records[place]

    def test_an_answer_that_is_none_is_no_word(self, root: Path, tmp_path: Path) -> None:
        records = self.opened(self.made(tmp_path, answers=[[None, "a"]]), per="answer")
        assert records[1].references == ("a",)
        with pytest.raises(DataError, match="one of 'answers' is null where text belongs"):
            records[0]

    def test_words_in_pictures_that_are_no_list_are_named_with_their_row(self, root: Path, tmp_path: Path) -> None:
        made = self.made(tmp_path, words=[7])
        with pytest.raises(DataError, match=r"record 0: 'ocr_tokens' must be a list of words\."):
            self.opened(made, ocr="words")

    def test_what_is_wrong_with_a_table_is_said(self, root: Path, tmp_path: Path) -> None:
        made = self.made(tmp_path / "t")
        with pytest.raises(
            DataError, match=r"no column 'questoin' \(options\.columns\.question\).*Did you mean 'question'"
        ):
            self.opened(made, question="questoin")
        with pytest.raises(ConfigError, match=r"options\.columns must say which column is for what"):
            READERS["columns"]({"table": made}, {}, "set")
        with pytest.raises(DataError, match="no parquet file of the split 'test'"):
            self.opened(made, split="test")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="no parquet file of the split 'train'"):
            self.opened(tmp_path / "empty")
        with pytest.raises(DataError, match=r"there is no '.*nowhere' \(files\.table of the card"):
            self.opened(tmp_path / "nowhere")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "train-0.parquet").write_bytes(b"PAR1 no table")
        with pytest.raises(DataError, match=r"set: the table cannot be read from .*bad"):
            self.opened(tmp_path / "bad")

    def test_a_hub_that_cannot_be_reached_is_named(self, root: Path, tmp_path: Path) -> None:
        options = {"columns": {"image": "image"}, "repository": "nobody/nothing-here"}
        with pytest.raises(
            DataError, match=r"cannot be read from nobody/nothing-here on the hub, since there is no '.*t'"
        ):
            READERS["columns"]({"table": tmp_path / "t"}, options, "set")

    def test_a_picture_that_is_none_is_named_with_its_row(self, root: Path, tmp_path: Path) -> None:
        folder = self.made(
            tmp_path, image=[{"bytes": b"no picture", "path": None}, {"bytes": None, "path": "a.jpg"}],
            question=["Q?", "Q?"], answers=[["a"], ["a"]],
        )  # fmt: skip
        records = self.opened(folder)
        for place, message in ((0, "is not a picture that can be read"), (1, "is null where a file's bytes belong")):
            with pytest.raises(DataError, match=message):
                load_image(records[place].images[0], 1000, "here")  # type: ignore[arg-type]

    def test_wrong_cells_are_listed(self, root: Path, tmp_path: Path) -> None:
        folder = self.made(tmp_path, question=[None], answers=[["a"]])
        with pytest.raises(DataError, match="record 0: 'question' is null where text belongs"):
            self.opened(folder)[0]

    def test_words_beside_a_table_of_the_hub_are_a_source_too(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else an index would keep those of an older file."""
        import datasets

        rows = datasets.Dataset.from_dict({"image": ["a.jpg"], "image_id": ["a"], "answers": [["b"]]})
        rows.save_to_disk(str(tmp_path / "cache"))
        side = tmp_path / "ocr.json"
        side.write_text('{"a": ["TONIC"]}')
        columns = {"image": "image", "image_id": "image_id", "answers": "answers"}
        files = {"table": tmp_path / "nowhere", "ocr": side, "images": tmp_path}
        for table in (datasets.load_from_disk(str(tmp_path / "cache")), rows):
            monkeypatch.setattr("qformer.data.columns._load", lambda *_, table=table: table)
            records = READERS["columns"](files, {"columns": columns}, "set")
            assert records[0].fields["ocr"] == "TONIC"
            kept = [Path(each["filename"]) for each in table.cache_files]
            assert list(records.sources().values()) == ([side, *kept] if kept else [])

    def test_a_table_that_was_saved_to_disk(self, root: Path, tmp_path: Path) -> None:
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answers": [datasets.Value("string")]}
        )
        rows = {"image": [stored("red")], "question": ["Q?"], "answers": [["a"]]}
        whole = datasets.Dataset.from_dict(rows, features=features)
        whole.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "many"))
        for name in ("one", "many"):
            (sample,) = self.opened(tmp_path / name)
            assert load_image(sample.images[0], 1000, "here").size == (12, 10)  # type: ignore[arg-type]


class TestShards:
    def test_pictures_and_captions_come_out_of_tar_shards(self, root: Path) -> None:
        broken.shards(root)
        samples = read(root, "web_capfilt:shards")
        assert [sample.id.rpartition("train/")[2] for sample in samples] == [
            "00000/000000000", "00000/000000001", "00001/000010000", "00001/000010001",
        ]  # fmt: skip
        assert samples[3].references == ("a caption — 000010001",)
        for sample in samples:
            assert load_image(sample.images[0], 10_000, sample.id).size == (40, 36)  # type: ignore[arg-type]
        files = {"shards": root / "web_capfilt" / "shards"}
        said = READERS["shards"](files, {"caption": "json"}, "set")
        assert [sample.references for sample in said] == [sample.references for sample in samples]

    def shard(self, folder: Path, members: Mapping[str, bytes | None]) -> Path:
        with tarfile.open(folder / "0.tar", "w") as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                if content is None:
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    member.size = len(content)
                archive.addfile(member, io.BytesIO(content or b""))
        return folder

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"a.jpg": jpeg("red")}, "record 0/a: its caption is null where text belongs"),
            ({"a.jpg": jpeg("red"), "a.txt": b" \n"}, "its caption is empty; fill it, or remove the record"),
            ({"a.jpg": jpeg("red"), "a.txt": b"\xff\xfe"}, "its caption is null"),
            ({"a.jpg": jpeg("red"), "a.txt": b"x" * ((1 << 20) + 1)}, "its caption is null"),
            ({"a.jpg": jpeg("red"), "a.txt": None}, "its caption is null"),
            ({"a.jpg": None, "a.txt": b"words"}, r"'a\.jpg' in 0\.tar is a link, and is not followed; pack"),
        ],
    )
    def test_what_is_wrong_with_a_member_is_said(
        self, tmp_path: Path, members: Mapping[str, bytes | None], message: str
    ) -> None:
        records = READERS["shards"]({"shards": self.shard(tmp_path, members)}, {}, "set")
        with pytest.raises(DataError, match=message):
            records[0]

    def test_what_is_wrong_with_a_folder_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no tar archive in it"):
            READERS["shards"]({"shards": tmp_path}, {}, "set")
        with pytest.raises(DataError, match="holds no record"):
            READERS["shards"]({"shards": self.shard(tmp_path, {"readme.md": b"words"})}, {}, "set")
        with pytest.raises(ConfigError, match=r"options\.caption is 'xml'; it takes txt or json"):
            READERS["shards"]({"shards": tmp_path}, {"caption": "xml"}, "set")


class TestChoices:
    def test_question_generation_may_take_a_row_for_each_distinct_answer(self, root: Path) -> None:
        card = cards.load("vqg_vqav2:per_answer")
        assert card.train and card.train.size is None
        samples = read(root, "vqg_vqav2:per_answer")
        rows = [text.render_train(card.train, text.load_templates("plain_answer"), each, 0, 0)[0] for each in samples]
        assert [(row.instruction, row.target) for row in rows[:5]] == [
            ("red", "What colour is the kite?"), ("dark red", "What colour is the kite?"),
            ("pink", "What colour is the kite?"), ("yes", "Is it windy?"), ("no", "Is it windy?"),
        ]  # fmt: skip
        assert samples[0].id != samples[1].id
        assert len(read(root, "vqg_aokvqa:per_answer")) > len(read(root, "vqg_aokvqa"))

    def test_dialogues_are_counted_as_they_are_asked_for(self, root: Path) -> None:
        def rows(name: str) -> list[list[text.Rendered]]:
            section = cards.load(name).train
            assert section is not None
            templates = text.load_templates(section.template)
            return [text.render_train(section, templates, sample, 0, 0) for sample in read(root, name)]

        each, single, first, whole = (rows(f"llava_conversation{v}") for v in ("", ":turns", ":first", ":whole"))
        assert [len(found) for found in each] == [3, 1, 2]
        assert [row for (row,) in single] == [row for found in each for row in found]
        assert [row for (row,) in first] == [found[0] for found in each]
        assert [len(row.turns) for (row,) in whole] == [3, 1, 2]

    def test_the_words_of_a_picture_come_first_and_leave_nothing_behind_where_there_are_none(self) -> None:
        preface = ["[A:B]", "OCR tokens: {ocr}."]
        assert text.prefaced(preface, {"ocr": "a, b"}, "What?") == "[A:B] OCR tokens: a, b. What?"
        for absent in ({}, {"ocr": ""}, {"ocr": None}):
            assert text.prefaced(preface, absent, "What?") == "[A:B] What?"
        assert text.prefaced([], {"ocr": "a"}, "What?") == "What?"
        assert text.prefaced(["OCR tokens: {ocr}."], {}, "") == ""
        assert text.prefaced(["{ocr}\n", "{ocr}:  "], {"ocr": "a"}, "What?") == "a\na:  What?"

    def test_thirty_words_are_kept_unless_the_card_says_otherwise(self, root: Path) -> None:
        words = [f"w{number}" for number in range(40)]
        assert ocr.joined(words) == ", ".join(words[:30])
        assert ocr.joined(["a", "", None, "b\n c"], 4) == "a, b c"
        assert ocr.joined(None) == ""
        section = cards.load("textcaps").train
        assert section is not None
        files = {role: root / path for role, path in section.files.items()}
        few = READERS["textvqa"](files, {**section.options, "ocr_tokens": 2}, "set")
        assert few[0].fields["ocr"] == "TONIC"  # the second of the file's words is empty
        with pytest.raises(DataError, match=r"'options\.ocr_tokens' is \"few\" where a whole number belongs"):
            READERS["textvqa"](files, {**section.options, "ocr_tokens": "few"}, "set")

    def test_a_list_may_name_pictures_by_their_place_on_another_disk(self, tmp_path: Path) -> None:
        file = tmp_path / "annotation.json"
        rows = [{"image": path, "caption": "a boat"} for path in ("/disk/web/0/a.jpg", "0/b.jpg", "/other/c.jpg")]
        file.write_text(json.dumps(rows), encoding="utf-8")
        files = {"captions": file, "images": tmp_path / "images"}
        records = READERS["caption_list"](files, {"prefix": "/disk/web"}, "set")
        assert [records[place].images[0] for place in (0, 1)] == [
            tmp_path / "images" / "0" / "a.jpg",
            tmp_path / "images" / "0" / "b.jpg",
        ]
        with pytest.raises(DataError, match=r"'/other/c\.jpg' is an absolute path; say in options\.prefix what"):
            records[2]

    def test_splits_are_a_list(self, root: Path) -> None:
        section = cards.load("ocrvqa").train
        assert section is not None
        files = {role: root / path for role, path in section.files.items()}
        with pytest.raises(ConfigError, match=r"set: options\.splits is '1'; it takes a list, even of one"):
            READERS["ocrvqa"](files, {"splits": 1}, "set")

    @pytest.mark.parametrize(("reader", "pattern"), [("vqa", "COCO_%s.jpg"), ("vqa", "a.jpg"), ("vqa", 7)])
    def test_a_pattern_without_a_place_for_the_number_is_refused(self, root: Path, reader: str, pattern: Any) -> None:
        section = cards.load("vqav2").train
        assert section is not None
        files = {role: root / path for role, path in section.files.items()}
        records = READERS[reader](files, {"image": pattern}, "set")
        if pattern == "COCO_%s.jpg":
            assert records[0].images[0] == root / "coco" / "train2014" / "COCO_42.jpg"
            return
        with pytest.raises(ConfigError, match=r"options\.image is .*; it takes a file name with a place for a number"):
            records[0]


SAMPLE = Sample("set/train/1", "set", (), {"question": "Q?"}, references=("red",) * 6 + ("pink",) * 3 + ("dark red",))
SECTION = TrainCard("vqa", {}, "vqa")


class TestDraws:
    def drawn(self, rule: str, number: int = 0, draws: int = 4000) -> Counter[str]:
        found: Counter[str] = Counter()
        for each in range(draws):
            key = (0, "set", f"set/train/{each}", number)
            answer = text.choose_answer(SAMPLE.references, rule, key)  # type: ignore[arg-type]
            assert answer is not None
            found[answer] += 1
        return found

    def test_answers_are_drawn_by_count_or_evenly(self) -> None:
        sampled, even = self.drawn("sampled"), self.drawn("uniform_distinct")
        assert [sampled[word] / 4000 for word in ("red", "pink", "dark red")] == pytest.approx(
            [0.6, 0.3, 0.1], abs=0.025
        )
        assert [even[word] / 4000 for word in ("red", "pink", "dark red")] == pytest.approx([1 / 3] * 3, abs=0.025)
        assert self.drawn("most_frequent") == {"red": 4000}

    def test_a_pass_has_draws_of_its_own_and_the_same_ones_again(self) -> None:
        def pass_(number: int) -> list[str | None]:
            return [text.choose_answer(SAMPLE.references, "sampled", (0, "set", each, number)) for each in range(50)]

        assert pass_(0) == pass_(0) != pass_(1)

    @pytest.mark.parametrize(("name", "count"), [("caption", 13), ("vqa", 10), ("vqg", 6)])
    def test_phrasings_are_spread_evenly_over_samples_and_over_passes(self, name: str, count: int) -> None:
        templates = text.load_templates(name)
        section = TrainCard("vqa", {}, name)

        def drawn(samples: range, passes: range) -> Counter[str]:
            return Counter(
                text.render_train(
                    section, templates, Sample(f"s/{each}", "s", (), {"question": "Q"}, references=("a",)), 0, number
                )[0].instruction
                for each in samples
                for number in passes
            )

        for found in (drawn(range(3000), range(1)), drawn(range(1), range(3000))):
            assert len(found) == count
            assert max(abs(times / 3000 - 1 / count) for times in found.values()) < 0.02

    def test_phrasings_stand_in_the_papers_order(self) -> None:
        ends = {
            name: [text.load_templates(name).templates[place] for place in (0, -1)]
            for name in ("caption", "vqa", "vqg")
        }
        assert ends == {
            "caption": ["A short image caption:", "Use a few words to illustrate what is happening in the picture."],
            "vqa": ["{question}", 'The question "{question}" can be answered using the image. A short answer is'],
            "vqg": [
                "Given the image, generate a question whose answer is: {answer}. Question:",
                "Taking the image into account, generate an question that has the answer: {answer}. Question:",
            ],
        }
