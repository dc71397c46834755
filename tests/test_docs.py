"""What the documents say is tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from qformer import cards, cli, config
from qformer.backbones.vision import OwnTower
from qformer.evaluate import metrics
from qformer.sample import Sample

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [content for named, content in fenced if named == language]


def test_the_card_in_contributing_loads(tmp_path: Path) -> None:
    card_file = tmp_path / "birds.yaml"
    card_file.write_text(blocks(ROOT / "CONTRIBUTING.md", "yaml")[0], encoding="utf-8")
    card = cards.load(str(card_file))
    assert card.name == "birds"
    assert card.train is not None
    assert card.eval is not None


def test_the_profile_in_contributing_loads(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("vision: {name: some_vit}\n" + blocks(ROOT / "CONTRIBUTING.md", "yaml")[1], encoding="utf-8")
    profile = config.load(file).language.profile
    assert (profile.layout, profile.end) == ("plain", [2])


def test_the_metric_in_contributing_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    source = blocks(ROOT / "CONTRIBUTING.md", "python")[0]
    exec(compile("from __future__ import annotations\n" + source, "CONTRIBUTING.md", "exec"), vars(metrics))
    samples = [Sample(id=str(number), task="birds", images=(), references=("wren",)) for number in range(2)]
    answers = [metrics.Answer("a wren, I think"), metrics.Answer("a robin")]
    assert metrics.METRICS["contains"].score(answers, samples, {}).scores == [1.0, 0.0]


def test_the_encoder_in_contributing_gives_tokens() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(blocks(ROOT / "CONTRIBUTING.md", "python")[1], names)
    assert OwnTower(names["Spectrogram"]())(torch.randn(2, 320)).values.shape == (2, 19, 17)


def test_the_config_in_the_readme_loads(tmp_path: Path) -> None:
    file = tmp_path / "birds-run.yaml"
    file.write_text(blocks(ROOT / "README.md", "yaml")[0], encoding="utf-8")
    assert config.load(file).directory == Path("runs/birds")


def test_the_commands_in_the_readme_are_understood() -> None:
    lines = [line for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qformer ")]
    assert len(commands) >= 5
    for command in commands:
        cli.parser().parse_args(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_are_there(document: Path) -> None:
    words = document.read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)\)", words) if "://" not in target]
    named = re.findall(r"`((?:qformer|tests|tasks|templates|configs|benchmarks|constraints)/[\w./]+)`", words)
    assert [name for name in linked + named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_make_targets_and_commands_that_are_there(document: Path) -> None:
    words = document.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", words, re.MULTILINE)) <= set(targets)
    assert set(re.findall(r"(?:^|`)qformer ([a-z]+)", words, re.MULTILINE)) <= set(cli.COMMANDS)
