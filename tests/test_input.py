"""The measurement of how fast pictures come in, on few pictures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests import world

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "input.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("input_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_both_kinds_are_as_large_as_they_are_said_to_be(script: ModuleType, tmp_path: Path) -> None:
    for kind, size in (("scenes", (96, 96)), ("photos", (640, 480))):
        script.write(tmp_path, kind, 3)
        [first, *others] = sorted((tmp_path / kind).iterdir())
        with Image.open(first) as picture:
            assert picture.size == size and len(others) == 2
    weights = [file.stat().st_size for file in (tmp_path / "photos").iterdir()]
    assert 80_000 < sum(weights) / 3 < 250_000  # as COCO's are


def test_both_tables_are_printed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.settings(tmp_path / "towers", tmp_path, tmp_path / "run")
    small = "--pictures 6 --steps 4 --batch 3 --repeats 1 --workers 1 --clock cpu --kinds photos --config"
    monkeypatch.setattr(sys, "argv", ["input.py", *small.split(), str(tmp_path / "run.yaml")])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| photos")]
    assert [row[1] for row in rows] == ["–", "read"] * 2
    assert all(float(row[2].split(" ")[0]) > 0 for row in rows)
    assert all(0 <= float(row[3].split(" ")[0]) < 100 for row in rows[2:])
