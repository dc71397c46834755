"""What the documents say is tried."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qformer import cards, checkpoints, cli, config, instruction, loading
from qformer.backbones.vision import OwnTower
from qformer.config import QFormerConfig
from qformer.evaluate import habits, metrics, published
from qformer.evaluate.outcome import Answer
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.sample import Sample
from tests import fixtures, world
from tests.published import put_in_cache, tiny_published

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/reproducing.md", "docs/many_gpus.md")
DOCUMENTS = [ROOT / name for name in NAMES]


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
    answers = [Answer("a wren, I think"), Answer("a robin")]
    assert metrics.METRICS["contains"].score(answers, samples, {}).scores == [1.0, 0.0]


def test_the_encoder_in_contributing_gives_tokens() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(blocks(ROOT / "CONTRIBUTING.md", "python")[1], names)
    assert OwnTower(names["Spectrogram"]())(torch.randn(2, 320)).values.shape == (2, 19, 17)


def test_the_config_in_the_readme_loads(tmp_path: Path) -> None:
    file = tmp_path / "birds-run.yaml"
    file.write_text(blocks(ROOT / "README.md", "yaml")[0], encoding="utf-8")
    assert config.load(file).directory == Path("runs/birds")


@pytest.mark.parametrize("document", ["README.md", "docs/reproducing.md"])
def test_the_commands_in_the_documents_are_understood(document: str) -> None:
    """Options, cards, their variants, published rows and ways of decoding."""
    lines = [line for block in blocks(ROOT / document, "") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("qformer ")]
    assert len(commands) >= 5
    for command in commands:
        options = vars(cli.parser().parse_args(command))
        names = [name for name in (options.get("tasks") or "").split(",") if not name.endswith(".yaml")]
        assert cards.load_all(names, "eval") if names not in ([], [""]) else True
        if options.get("decoding"):
            assert habits.load(options["decoding"])
        if options.get("against"):
            table, _, row = options["against"].partition(":")
            assert not row or row in published.load(table).rows


def test_the_page_on_reproducing_names_variants_and_published_scores_that_there_are() -> None:
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`(\w+:[\w+]+)`", page) if not name.endswith(":as_lavis")}
    assert len(named) >= 20 and all(cards.load(name).eval is not None for name in named)
    rows = [line.split("|")[1:3] for line in page.splitlines() if re.match(r"\| [A-Za-z].* \| [\d., ]+ \|", line)]
    paper = list(published.load("paper").rows["vicuna7b"].scores.values())
    told = [float(number) for _, numbers in rows for number in numbers.split(",")]
    assert len(told) == 12 and set(told) <= set(paper)


def section(document: Path, title: str) -> str:
    """What stands under a heading."""
    return document.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_commands_of_the_papers_mixture_do_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, with tiny towers, three steps and small files in the official layouts."""
    words = section(ROOT / "README.md", "Train the paper's mixture")
    commands = [shlex.split(line, comments=True)[1:] for line in words.splitlines() if line.startswith("qformer ")]
    assert [command[0] for command in commands] == ["data", "train", "train", "train", "eval"]
    data = fixtures.root(tmp_path)
    places = world.towers(tmp_path / "towers", "llama")
    tiny = [
        f"vision.name={places['vision']}", "vision.block=null", "vision.dtype=float32", "data.workers=0",
        f"language.name={places['language']}", "language.dtype=float32", f"qformer.tokenizer={places['bert']}",
        "train.steps=3", "train.batch_size=8", "train.precision=float32", "validation.limit=2", "evaluate.limit=2",
        "validation.every=2", "language.profile.opening=[1]",
    ]  # fmt: skip
    first = [f"qformer.init={places['bert']}", "validation.tasks=[okvqa]"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        given = [part.replace("/data", str(data)) for part in command]
        if command[0] == "train":
            given += tiny + ([] if "qformer.init=runs/instructblip_vicuna7b" in command else first)
        if command[0] == "eval":
            given[given.index("held_out")] = "scienceqa"
            given += ["--limit", "2"]
        assert cli.main(given) == 0, command
    said = capsys.readouterr().out
    assert "p_d in proportion to √S_d" in said and "step 3: validation" in said
    assert (tmp_path / "runs" / "instructblip_vicuna7b" / "checkpoints" / "best").is_dir()
    assert (tmp_path / "runs" / "finetune_okvqa" / "checkpoints" / "step-3").is_dir()


def test_what_the_paper_leaves_open_names_settings_that_there_are() -> None:
    words = section(ROOT / "README.md", "What the paper leaves open")
    assert len(words.strip().splitlines()) <= 15
    named = re.findall(r"`([\w.:=]+)`", words)
    variants = [name for name in named if re.fullmatch(r"\w+:\w+", name)]
    assert len(variants) >= 4 and all(cards.load(name) for name in variants)
    settings = config.load("instructblip_vicuna7b", [name for name in named if "=" in name])
    assert settings.data.tasks["aokvqa"] == 0.5 and settings.data.sampling == "sqrt"
    assert sorted(settings.validation.tasks) == ["aokvqa", "coco_caption:val", "okvqa", "textcaps"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and an empty folder to work in."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def test_the_lines_in_the_readme_lead_from_a_checkpoint_to_an_answer(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_cache(hub, tiny_published(tmp_path, "t5"), "Salesforce/instructblip-flan-t5-xl")
    Image.new("RGB", (50, 40), "red").save("picture.jpg")
    [lines] = blocks(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(lines, names)
    assert len(lines.split("\n\n")[1].splitlines()) <= 5
    assert capsys.readouterr().out.startswith("['")
    assert names["model"].language.dtype == torch.bfloat16
    assert Path("bird-adapter/adapter.safetensors").is_file()


def test_the_start_in_the_readme_is_made_of_both_stages(hub: Path, tmp_path: Path) -> None:
    """The text half and its words from stage 1, all else from stage 2, by the names of LAVIS' files."""
    settings = world.settings(tmp_path / "towers", tmp_path, tmp_path / "run", family="t5")
    put_in_cache(hub, Path(world.towers(tmp_path / "towers", "t5")["bert"]), "bert-base-uncased")
    words = len(instruction.read_tokenizer("bert-base-uncased"))
    size = {"vision_width": 24, "hidden": 64, "layers": 2, "heads": 1, "intermediate": 48, "positions": 160}
    made = []
    for file, reads in (("blip2_pretrained.pth", True), ("blip2_pretrained_flant5xl.pth", False)):
        sizes = QFormerSize(**size, vocabulary=words, instruction=reads)
        made.append(QFormerConnector(QFormer(sizes), 32))
        tensors = checkpoints.renamed_for(made[-1].state_dict(), "lavis", "t5_proj")
        torch.save({"model": {name: t for name, t in tensors.items() if not (reads and "_proj" in name)}}, file)
    Path("run.yaml").write_text(blocks(ROOT / "README.md", "yaml")[1], encoding="utf-8")
    told: list[str] = []
    given = config.structured(QFormerConfig, [("run.yaml", config.read_yaml(Path("run.yaml"))["qformer"])])
    model = loading.build(dataclasses.replace(settings, qformer=given), report=told.append)
    for name, tensor in model.connector.state_dict().items():
        stage = made[0 if re.search("word_|position_|text_feed", name) else 1]
        assert torch.equal(tensor, stage.state_dict()[name]), name
    assert "blip2_pretrained.pth: qformer.word_embeddings" in told[0]


def test_the_launch_lines_for_many_gpus_are_understood() -> None:
    lines = re.findall(r"-m qformer (.+)$", (ROOT / "docs/many_gpus.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 5
    for line in map(shlex.split, lines):
        options = cli.parser().parse_args(line)
        if options.command == "train" and options.config != "my-run.yaml":
            assert config.load(options.config, options.changes).language.shard == ("language.shard=true" in line)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_files_that_are_there(document: Path) -> None:
    words = document.read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)\)", words) if "://" not in target]
    named = re.findall(r"`((?:qformer|tests|tasks|templates|configs|benchmarks|constraints)/[\w./]+)`", words)
    assert [name for name in linked if not (document.parent / name).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_make_targets_and_commands_that_are_there(document: Path) -> None:
    words = document.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", words, re.MULTILINE)) <= set(targets)
    assert set(re.findall(r"(?:^|`)qformer ([a-z]+)", words, re.MULTILINE)) <= set(cli.COMMANDS)
