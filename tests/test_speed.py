"""The benchmark against transformers, on models of a few thousand weights: what it compares is equal there too."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qformer.train import compiling

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY_LLM = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TINY = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks with models that are no work."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ranking
    import speed

    monkeypatch.setattr(ranking, "SMOL", {**ranking.SMOL, **TINY_LLM})
    monkeypatch.setattr(speed, "VISION", {**speed.VISION, **TINY, "patch_size": 56})
    monkeypatch.setattr(speed, "QFORMER", {**speed.QFORMER, **TINY, "encoder_hidden_size": 48})


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_row_of_the_table_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import speed

    plot = tmp_path / "growth.svg"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--repeats", "2", "--plot", str(plot), "--most", "4"])
    speed.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    named = [line.split(" | ")[0] for line in lines]
    assert [name.removeprefix("| ").split(",")[0] for name in named] == [
        "work", "training step", "training step", "training step", "our own code", "generation", "of ours",
        "ranking 100 candidates", "ranking 4 candidates",
        "ranking 4 candidates behind each of 8 prompts", "what grows", "rows", "text", "queries", "frames",
    ]  # fmt: skip
    drawing = ElementTree.parse(plot).getroot()
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}polyline"))) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore")  # torch warns of its own doings while it traces
def test_each_saving_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import parts
    import ranking

    monkeypatch.setattr(sys, "argv", ["parts.py", "--repeats", "1", "--compile"])
    monkeypatch.setattr(parts, "SIDE", 64)
    monkeypatch.setattr(ranking, "T5_SMALL", {**ranking.T5_SMALL, "d_model": 32, "d_ff": 64, "num_layers": 2})
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    parts.main()
    out = capsys.readouterr().out
    named = (*parts.SAVINGS, *parts.OPTIONS, parts.BY_LENGTH, parts.COMPILED)
    assert all(f"| {name} | " in out for name in named)
    assert all(f"| {name} (tried, not kept) | " in out for name in parts.TRIED)
    assert "times the floor" in out


@pytest.mark.usefixtures("tiny")
def test_where_the_time_of_a_step_goes_is_told_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import spans

    plot = tmp_path / "step.svg"
    monkeypatch.setattr(sys, "argv", ["spans.py", "--repeats", "1", "--plot", str(plot)])
    spans.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == list(spans.PARTS)
    shares = [float(row[2].removesuffix("%")) for row in rows[1:]]
    assert sum(shares) == pytest.approx(100, abs=1) and all(share > 0 for share in shares[:-2])  # each hook was met
    drawing = ElementTree.parse(plot).getroot()
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}rect"))) == len(spans.PARTS)
