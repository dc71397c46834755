"""The measurement of how fast pictures come in, on few pictures."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "input.py"


def test_pictures_of_both_kinds_are_as_large_as_they_are_said_to_be(tmp_path: Path) -> None:
    from PIL import Image

    spec = importlib.util.spec_from_file_location("input_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for kind, size in (("scenes", (96, 96)), ("photos", (640, 480))):
        script.write(tmp_path, kind, 3)
        [first, *others] = sorted((tmp_path / kind).iterdir())
        with Image.open(first) as picture:
            assert picture.size == size and len(others) == 2
    weights = [file.stat().st_size for file in (tmp_path / "photos").iterdir()]
    assert 60_000 < sum(weights) / 3 < 250_000  # as COCO's are


def test_both_tables_are_printed() -> None:
    small = "--pictures 12 --steps 4 --batch 4 --repeats 1 --workers 1 --clock cpu"
    ran = subprocess.run([sys.executable, str(SCRIPT), *small.split()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split(" | ") for line in ran.stdout.splitlines() if line.startswith(("| scenes", "| photos"))]
    assert [row[1] for row in rows] == ["–", "read"] * 4
    assert all(float(row[2].split(" ")[0]) > 0 for row in rows)
    assert all(0 <= float(row[3].split(" ")[0]) < 100 for row in rows[4:])
