"""The measurement of large data sets, on small ones."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qformer import cards
from qformer.data.index import Index
from qformer.data.readers import open_records

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_scale.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_scale", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["data_scale"] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_written_has_the_official_shape_and_is_indexed(script: ModuleType, tmp_path: Path) -> None:
    script.write_files(tmp_path, questions=300, captions=40)
    questions = json.loads((tmp_path / "vqa" / "questions.json").read_text())["questions"]
    said = json.loads((tmp_path / "vqa" / "annotations.json").read_text())["annotations"]
    assert [row["question_id"] for row in questions[:5]] == [1000, 1001, 1002, 1003, 2000]
    assert [row["question_id"] for row in said] == [row["question_id"] for row in questions]
    assert {len(row["answers"]) for row in said} == {10}
    cost = script.index(tmp_path, "vqa")
    assert cost.seconds > 0 and cost.busy > 0
    assert cost.peak > 10_000_000  # no upper bound: Linux counts what the tests' own process held when it forked
    assert len(list((tmp_path / ".qformer-index").glob("*.arrow"))) == 1
    card = cards.load(str(tmp_path / "vqa.yaml"))
    assert card.train is not None
    records = open_records(card.train, tmp_path, card, Index(tmp_path))
    assert len(records) == 300
    assert len(records[299].references) == 10


def test_a_draw_over_25_million_records_takes_neither_time_nor_memory(script: ModuleType) -> None:
    micros, _, held = script.draws(25_000_000)
    assert micros < 1000
    assert held < 1_000_000


@pytest.mark.slow
def test_the_whole_script_prints_its_table(tmp_path: Path) -> None:
    small = "--questions 500 --captions 2000 --records 1000 --workers 2 --steps 6 --repeats 1 --folder"
    command = [sys.executable, str(SCRIPT), *small.split(), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 8  # the head, and a row each
    assert not list(tmp_path.iterdir())
