"""The benchmark of one GPU by models that are no work: every row is there, and what cannot be measured is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = (
    "step of 6 samples,",
    "step of 6 samples, features at hand",
    "ranking 100",
    "ranking 4",
    "ranking 4",
    "generation, 16",
)


@pytest.mark.parametrize(
    ("config", "goal", "more"),
    [
        ("instructblip_vicuna7b", "130/s", []),
        pytest.param("instructblip_flant5xl", "340/s", ["--gpu", "h200"], marks=pytest.mark.slow),
    ],
)
def test_every_row_is_measured_by_the_code_of_a_gpu(config: str, goal: str, more: list[str]) -> None:
    """In a process of its own, since one has one precision for ever (accelerate)."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--size", "tiny", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ran = subprocess.run([*command, "--configs", config, *more], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    table = ran.stdout.partition("## ")[2]
    assert table.startswith(f"{config}\n")
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(ROWS)
    for row, begins in zip(rows, ROWS, strict=True):
        assert row.startswith(f"| {begins}"), row
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 10
        assert float(cells[2]) > 0 and float(cells[3]) > 0 and re.fullmatch(r"\*\*[\d.]+×\*\*", cells[4])
    assert f"| {goal} |" in rows[0] and rows[0].count("%") == rows[1].count("%") == len(more) // 2
    assert re.search(r"The step: 6 samples, \d+ rows, \d+ pictures, \d+ micro-batches, .* operations", table)
    assert re.search(r"Steps that came for the first time: [\d.]+(, [\d.]+)* s\.", table)
    near = re.search(r"encoder's outputs ([\d.]+)%, soft tokens ([\d.]+)%, loss ([\d.]+)%", table)
    assert near is not None and all(float(each) < 5 for each in near.groups())
    assert ("`qformer plan` on h200 (NVIDIA, H200 data sheet, SXM): " in table) == bool(more)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(gpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"^not measured: no GPU \(--device cpu --size tiny runs the same code"):
        gpu.main()  # type: ignore[attr-defined]


def test_true_sizes_are_refused_on_a_cpu(
    gpu: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()  # type: ignore[attr-defined]
    assert "--device cpu goes with --size tiny: models of true size would take hours on it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", None),
        ("GH200 480GB", None),
    ],
)
def test_a_gpu_is_known_by_what_it_calls_itself(gpu: object, name: str, known: str | None) -> None:
    assert gpu.known_gpu(name) == known  # type: ignore[attr-defined]


def test_rows_that_do_not_fit_are_halved_until_they_do(gpu: object) -> None:
    """The loop around a GPU that runs out of memory at more than three rows."""

    class Small(gpu.Both):  # type: ignore[attr-defined,misc,name-defined]
        def __init__(self) -> None:
            self.device, self.asked = torch.device("cpu"), list[int]()
            self.step = gpu.Step(tuple(range(10)), {}, (), {})  # type: ignore[attr-defined]
            self.other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

        def padded(self, rows: int) -> list[int]:
            self.asked.append(rows)
            return [rows]

        def their_step(self, parts: list[int]) -> None:
            if parts[0] > 3:
                raise torch.OutOfMemoryError

    both = Small()
    assert both.fitting() == [3] and both.asked == [10, 5, 3]
