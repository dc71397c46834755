"""`qformer data`: what is missing of a root and where it belongs, what is broken, and annotations in the index."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer import cards, cli, resources
from qformer.data import index as index_module
from qformer.data.check import sample, sections_of
from qformer.data.index import FOLDER
from qformer.data.readers import expected
from tests import fixtures

CARD = """
name: birds
version: 1
title: "Birds"
licence: "CC0"
source: "example.org: birds.zip"
downloads:
  - {what: "birds.zip", source: "example.org", into: "birds", gigabytes: 1.5}
  - {what: "wings.zip", source: "example.org, Wings", into: "wings", gigabytes: 0.25}
train: {reader: jsonl, files: {records: birds/train.jsonl, images: wings}, template: instruction, size: 9}
eval: {reader: jsonl, files: {records: birds/test.jsonl, images: wings}, template: instruction, split: test,
  answer: generate, metric: exact_match}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "birds.yaml").write_text(CARD)
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def fill(root: Path, count: int = 6, train: int | None = None) -> None:
    for folder in ("birds", "wings"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, number in (("train", count if train is None else train), ("test", 2)):
        rows = [
            {"id": f"{name}{place}", "image": f"{place}.png", "instruction": "Who?", "target": "wren"}
            for place in range(number)
        ]
        (root / "birds" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in range(count):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(root / "wings" / f"{place}.png")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


class TestCheck:
    def check(self, capsys: Any, root: Path, *more: str) -> tuple[int, str]:
        code, out, err = run(capsys, "check", "--data", root, "--tasks", root.parent / "birds.yaml", *more)
        assert err == ""
        return code, out

    def test_of_a_set_that_is_nearly_there_only_the_missing_download_is_told(self, tmp_path: Path, capsys: Any) -> None:
        data = fixtures.root(tmp_path)
        (data / "vqav2" / "v2_mscoco_val2014_annotations.json").unlink()
        (data / "okvqa" / "OpenEnded_mscoco_train2014_questions.json").unlink()
        _, out, _ = run(capsys, "check", "--data", data, "--tasks", "vqav2,okvqa")
        told = re.findall(r"^    (\S+), from ", out, re.MULTILINE)
        assert told == ["v2_Annotations_Val_mscoco.zip", "OpenEnded_mscoco_train2014_questions.json.zip"]

    def test_brackets_in_a_cards_name_are_no_markup(self, root: Path, capsys: Any) -> None:
        (root.parent / "birds.yaml").write_text(CARD.replace("name: birds", "name: 'birds [/b] [red]'"))
        _, out = self.check(capsys, root)
        assert "│ birds [/b] [red] │" in out

    def test_files_that_a_card_names_by_absolute_paths_are_missed_like_others(self, root: Path, capsys: Any) -> None:
        elsewhere = root.parent / "elsewhere"
        (root.parent / "birds.yaml").write_text(CARD.replace("records: birds", f"records: {elsewhere}"))
        code, out = self.check(capsys, root)
        assert code == 1
        assert f"missing  {elsewhere}/train.jsonl  (records)" in out
        assert f"birds.zip, from example.org: into {root}/birds" in out

    def test_an_empty_root_is_told_in_full_for_every_shipped_card(self, root: Path, capsys: Any) -> None:
        code, out, _ = run(capsys, "check", "--data", root)
        assert code == 1
        for name in resources.names("tasks"):
            card = cards.load(name)
            assert f"\n{name}  {card.title}" in out
            assert f"Licence: {card.licence}" in out
            for _, section in sections_of(card):
                for role, path in expected(section, root):
                    assert f"missing  {path}  ({role})" in out
            for each in card.downloads:
                assert f"{each.what}, from {each.source}: into {root / each.into} ({each.gigabytes:g} GB)" in out
        number = len(resources.names("tasks"))
        assert f"Of {number} cards {number} lack files. To get them: " in out
        assert "free at" in out

    def test_a_root_that_is_not_there_is_told_too(self, root: Path, capsys: Any) -> None:
        root.rmdir()
        code, out = self.check(capsys, root)
        assert code == 1
        assert f"There is no folder {root}: make it, or name another with --data." in out
        assert "Of 1 card 1 lack files. To get them: 2 downloads, 1.8 GB on disk" in out
        assert not root.exists()

    def test_a_whole_root_is_sound(self, root: Path, capsys: Any) -> None:
        fill(root)
        code, out = self.check(capsys, root)
        assert "train: 6 records, 9 published; 6 of 6 pictures could be opened." in out
        assert "eval: 2 records; 2 of 2 pictures could be opened." in out
        assert out.endswith("All files of 1 card are there.\n")
        assert "To do" not in out
        assert code == 0

    def test_one_missing_file_asks_for_what_brings_it_alone(self, root: Path, capsys: Any) -> None:
        fill(root)
        (root / "birds" / "test.jsonl").unlink()
        code, out = self.check(capsys, root)
        assert code == 1
        assert f"missing  {root}/birds/test.jsonl  (records)" in out
        assert f"there    {root}/birds/train.jsonl  (records)" in out
        assert "eval: no record was read, since its files are not all there." in out
        assert "train: 6 records" in out
        assert "To do: download 1 file, 1.5 GB on disk:\n    birds.zip" in out
        assert "wings.zip" not in out

    def test_records_are_read_although_pictures_are_not_there(self, root: Path, capsys: Any) -> None:
        fill(root)
        for picture in (root / "wings").iterdir():
            picture.unlink()
        (root / "wings").rmdir()
        code, out = self.check(capsys, root)
        assert code == 1
        assert "train: 6 records, 9 published; no picture was opened, since the folder of its pictures is not" in out
        assert "wings.zip, from example.org, Wings: into" in out

    def test_pictures_that_are_gone_or_broken_are_told_one_by_one(self, root: Path, capsys: Any) -> None:
        fill(root, 12)
        for place in range(7):
            (root / "wings" / f"{place}.png").unlink()
        (root / "wings" / "8.png").write_bytes(b"no picture")
        code, out = self.check(capsys, root)
        assert code == 1
        assert "train: 12 records, 9 published; 4 of 12 pictures could be opened." in out
        assert f"record 1: the picture {root}/wings/0.png is missing" in out
        assert "and 3 more broken pictures." in out
        assert "Broken records or pictures: birds." in out

    def test_broken_records_and_files_are_told(self, root: Path, capsys: Any) -> None:
        fill(root)
        (root / "birds" / "train.jsonl").write_text('{"id": "a"}\n{"id": \n')
        (root / "birds" / "test.jsonl").write_bytes(b"\xff")
        code, out = self.check(capsys, root)
        assert code == 1
        assert "train: 2 records, 9 published; none of its pictures was looked at." in out
        assert "train.jsonl, line 1: there is no field" in out
        assert "train.jsonl, line 2: not valid JSON" in out
        assert "test.jsonl: it cannot be read as text" in out

    def test_a_sample_is_looked_at_unless_all_are_wanted(self, root: Path, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr("qformer.data.check.SAMPLED", 3)
        fill(root, 8)
        assert "3 of 3 pictures could be opened" in self.check(capsys, root)[1]
        for place in sample(8, 3, seed=1, key="birds"):
            (root / "wings" / f"{place}.png").unlink()
        assert "train: 8 records, 9 published; 0 of 3 pictures" in self.check(capsys, root, "--seed", "1")[1]
        assert "train: 8 records, 9 published; 5 of 8 pictures" in self.check(capsys, root, "--all")[1]

    def test_a_wrong_card_is_a_wrong_command(self, root: Path, capsys: Any) -> None:
        code, _, err = run(capsys, "check", "--data", root, "--tasks", "vqav3")
        assert code == 2
        assert "Did you mean 'vqav2'?" in err

    def test_neither_torch_nor_a_model_is_loaded(self, root: Path) -> None:
        fill(root)
        code = (
            "import sys; from qformer import cli; code = cli.main(sys.argv[1:]);"
            "print(code, {'torch', 'transformers', 'timm', 'datasets'} & set(sys.modules))"
        )
        command = [sys.executable, "-c", code, "data", "check", "--data", str(root), "--tasks"]
        ran = subprocess.run(
            [*command, str(root.parent / "birds.yaml")], capture_output=True, text=True, check=True, timeout=120
        )
        assert ran.stdout.splitlines()[-1] == "0 set()", ran.stderr


class TestIndex:
    def test_cards_are_indexed_and_found_again(self, root: Path, capsys: Any) -> None:
        fill(root)
        for _ in range(2):
            code, out, _ = run(capsys, "index", "--data", root, "--tasks", root.parent / "birds.yaml")
            assert code == 0
            assert "birds train: 6 records, " in out
            assert "birds eval: 2 records, " in out
            assert str(root / FOLDER) in out
        assert len(list((root / FOLDER).iterdir())) == 4

    def test_pictures_are_not_needed(self, root: Path, capsys: Any) -> None:
        fill(root)
        for picture in (root / "wings").iterdir():
            picture.unlink()
        (root / "wings").rmdir()
        assert run(capsys, "index", "--data", root, "--tasks", root.parent / "birds.yaml")[0] == 0

    def test_what_a_config_trains_and_scores_on(self, root: Path, capsys: Any) -> None:
        fill(root, train=4)
        config = root.parent / "run.yaml"
        config.write_text(
            "vision: {name: v}\nlanguage: {name: l}\n"
            f"data: {{root: {root}, index: {root.parent}/kept, tasks: {{birds.yaml: 1.0}}}}\n"
            "evaluate: {tasks: [birds.yaml]}\n"
        )
        code, out, _ = run(capsys, "index", config)
        assert code == 0
        assert "birds train: 4 records" in out
        assert "birds eval: 2 records" in out
        assert len(list((root.parent / "kept").iterdir())) == 4
        assert not (root / FOLDER).exists()
        code, _, err = run(capsys, "index", config, "--tasks", "vqav2")
        assert code == 2
        assert "give a config or --tasks, not both" in err

    def test_missing_files_are_named_and_the_others_indexed(self, root: Path, capsys: Any) -> None:
        fill(root)
        (root / "birds" / "test.jsonl").unlink()
        code, out, _ = run(capsys, "index", "--data", root, "--tasks", root.parent / "birds.yaml")
        assert code == 1
        assert "birds train: 6 records" in out
        assert f"birds eval: there is no '{root}/birds/test.jsonl' (files.records of the card" in out
        assert f"1 not indexed; `qformer data check --data {root}` says what is missing" in out

    def test_without_names_cards_whose_files_are_there_are_indexed(self, root: Path, capsys: Any) -> None:
        code, out, _ = run(capsys, "index", "--data", root)
        assert code == 1
        questions = root / "gqa" / "questions1.2" / "testdev_balanced_questions.json"
        questions.parent.mkdir(parents=True)
        questions.write_text('{"1": {"question": "Is it?"}}')
        code, out, _ = run(capsys, "index", "--data", root)
        assert code == 0
        assert "gqa eval: 1 record" in out

    def test_a_root_or_folder_that_cannot_be_is_a_sentence(self, root: Path, capsys: Any) -> None:
        fill(root)
        card = root.parent / "birds.yaml"
        code, _, err = run(capsys, "index", "--data", root / "nowhere", "--tasks", card)
        assert code == 1
        assert "nowhere', and there is no such folder; `qformer data check` says what it takes" in err
        code, out, _ = run(capsys, "index", "--data", root, "--tasks", card, "--index", card)
        assert code == 1
        assert f"no index can be written to '{card}' (File exists); make room, or set data.index" in out

    def test_training_and_scoring_start_from_it(self, root: Path, capsys: Any, monkeypatch: Any) -> None:
        from qformer.data.batch import open_sources
        from qformer.data.jsonl import JsonLines
        from qformer.evaluate import run as evaluation

        fill(root)
        assert run(capsys, "index", "--data", root, "--tasks", root.parent / "birds.yaml")[0] == 0
        monkeypatch.setattr(JsonLines, "_read", lambda self: pytest.fail("the files were read"))
        named = cards.load_all([str(root.parent / "birds.yaml")], "train")
        index = index_module.Index(root)
        assert len(open_sources(named, root, index=index)["birds"].records) == 6
        assert len(evaluation._open(named["birds"], root, index).records) == 2
