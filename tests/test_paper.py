"""The paper's runs: their mixture, their settings, and what a dry run says of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from qformer import cards, cli, config, dryrun, loading, resources
from qformer.backbones import blueprints
from qformer.config import DataConfig, LanguageConfig, RunConfig, ValidationConfig, VisionConfig
from qformer.errors import ConfigError, DataError
from tests import fixtures, world

PAPER = ("instructblip_flant5xl", "instructblip_flant5xxl", "instructblip_vicuna7b", "instructblip_vicuna13b")
RUNS = [name for name in resources.names("configs") if name.startswith(("instructblip_", "finetune_", "no_"))]
HELD_IN = [
    "web_capfilt", "ocrvqa", "coco_caption", "vqav2", "vqg_vqav2", "textcaps", "llava_reasoning", "llava_conversation",
    "llava_detail", "aokvqa", "vqg_aokvqa", "okvqa", "vqg_okvqa",
]  # fmt: skip
"""By falling p_d."""
P_D = {
    "coco_caption": 0.092316, "web_capfilt": 0.456742, "textcaps": 0.040627, "vqav2": 0.081688, "okvqa": 0.011639,
    "aokvqa": 0.016015, "ocrvqa": 0.109795, "vqg_vqav2": 0.081688, "vqg_okvqa": 0.011639, "vqg_aokvqa": 0.016015,
    "llava_conversation": 0.029195, "llava_detail": 0.018694, "llava_reasoning": 0.033948,
}  # fmt: skip
"""√S_d over their sum, 8154.862, reckoned apart."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.root(tmp_path_factory.mktemp("fixtures"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Changes that put tiny towers, stripped of their weights, in the place of the paper's."""
    folder = tmp_path_factory.mktemp("towers")
    places = world.towers(folder, "llama")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    words = f"qformer.init={places['bert']}", f"qformer.tokenizer={places['bert']}"
    return f"vision.name={places['vision']}", "vision.block=null", f"language.name={places['language']}", *words


def shown(settings: RunConfig, width: int = 200, samples: int = 10) -> str:
    """What a dry run prints."""
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for block in dryrun.dry_run(settings, samples):
            console.print(block, soft_wrap=not isinstance(block, Table))
    return captured.get()


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_role_stands_for_its_cards_and_a_name_behind_it_wins() -> None:
    found, multipliers = cards.mixture(DataConfig(tasks={"held_in": 1.0, "aokvqa": 0.5}))
    assert set(found) == set(cards.load_all(["held_in"], "train"))
    assert multipliers == {**dict.fromkeys(found, 1.0), "aokvqa": 0.5}


def test_a_variant_is_taken_of_every_card() -> None:
    found, multipliers = cards.mixture(DataConfig(tasks={"aokvqa": 2.0}, variant="multiple_choice"))
    assert multipliers == {"aokvqa:multiple_choice": 2.0} and list(found) == list(multipliers)
    with pytest.raises(ConfigError, match=r"data\.variant is 'plain', and data\.tasks names 'aokvqa:multiple_choice'"):
        cards.mixture(DataConfig(tasks={"aokvqa:multiple_choice": 1.0}, variant="plain"))
    with pytest.raises(ConfigError, match=r"vqav2\.yaml: no variant 'upside_down'"):
        cards.mixture(DataConfig(tasks={"vqav2": 1.0}, variant="upside_down"))


def test_held_out_cards_are_trained_and_validated_on_where_that_is_allowed() -> None:
    settings = RunConfig(validation=ValidationConfig(tasks=["gqa"]), data=DataConfig(tasks={"gqa": 1.0}))
    with pytest.raises(ConfigError, match=r"set data\.allow_held_out: true to fine-tune on it"):
        cards.mixture(settings.data)
    with pytest.raises(ConfigError, match=r"validation\.tasks names 'gqa', which is held out"):
        cards.validated(settings)
    allowed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, allow_held_out=True))
    assert list(cards.validated(allowed)) == ["gqa"]
    with pytest.raises(ConfigError, match="'gqa' has no 'train' section"):
        cards.mixture(allowed.data)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "language", "batch", "start"),
    [
        ("instructblip_flant5xl", "google/flan-t5-xl", 192, "blip2_pretrained_flant5xl.pth"),
        ("instructblip_flant5xxl", "google/flan-t5-xxl", 64, "blip2_pretrained_flant5xxl.pth"),
        ("instructblip_vicuna7b", "lmsys/vicuna-7b-v1.1", 128, "blip2_pretrained_vicuna7b.pth"),
        ("instructblip_vicuna13b", "lmsys/vicuna-13b-v1.1", 64, "blip2_pretrained.pth"),
    ],
)
def test_the_papers_runs_are_as_published(name: str, language: str, batch: int, start: str) -> None:
    settings = config.load(name)
    train = settings.train
    assert (settings.name, settings.language.name, train.batch_size) == (name, language, batch)
    assert (train.steps, train.warmup_rate, train.rate, train.final_rate) == (60_000, 1e-8, 1e-5, 0.0)
    assert (train.warmup_steps, train.betas, train.weight_decay) == (1000, [0.9, 0.999], 0.05)
    assert settings.data.tasks == dict.fromkeys(P_D, 1.0) and settings.data.sampling == "sqrt"
    assert (settings.vision.block, settings.vision.norm, settings.qformer.queries) == (-2, False, 32)
    assert settings.validation.every == 3000 and list(cards.validated(settings))
    assert config.init_sources(settings.qformer.init)[-1].source == start
    assert settings.language.architecture == ({"dense_act_fn": "gelu"} if "t5" in name else {})
    if "vicuna" in name:
        assert (settings.language.profile.opening, settings.language.profile.end) == ([2], [2])


@pytest.mark.parametrize("name", RUNS)
def test_every_value_of_a_run_says_where_it_is_from(name: str) -> None:
    """A file says what it differs from in its first lines, and an ablation is three lines."""
    lines = (resources.folder("configs") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    if name.startswith("no_"):
        assert len(lines) == 3 and lines[1] == "extends: instructblip_flant5xl" and "#" in lines[2]
    else:
        assert (lines[0].startswith("#") and any("ours" in line.lower() for line in lines)) or name.endswith("xxl")
    assert config.load(name).name == name


def test_an_ablation_changes_one_thing() -> None:
    parent = dataclasses.asdict(config.load("instructblip_flant5xl"))
    changes = {
        "no_instruction": ("qformer", "instruction", False),
        "no_balancing": ("data", "sampling", "uniform"),
        "no_templates_plain": ("data", "variant", "plain"),
        "no_templates_dataset_name": ("data", "variant", "dataset_name"),
    }
    for name, (section, key, value) in changes.items():
        wanted = {**parent, "name": name, section: {**parent[section], key: value}}
        assert dataclasses.asdict(config.load(name)) == wanted


def test_fine_tuning_is_on_one_set_from_the_published_adapter() -> None:
    for name in (run for run in RUNS if run.startswith("finetune_")):
        settings = config.load(name)
        assert list(settings.data.tasks) == [name.removeprefix("finetune_")] == settings.evaluate.tasks
        assert [each.source for each in config.init_sources(settings.qformer.init)] == [
            "instruct_blip_vicuna7b_trimmed.pth"
        ]
        assert list(cards.mixture(settings.data)[0]) == list(settings.data.tasks)


# -- dry runs ---------------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the mixture's table by set."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│")
    return {first: rest for first, *rest in cells if len(rest) == 6}


def test_a_dry_run_with_the_published_names_needs_neither_hub_nor_data(tmp_path: Path) -> None:
    text = shown(config.load("instructblip_vicuna7b", [f"data.root={tmp_path / 'nowhere'}"]))
    assert "  steps: 60000" in text and "  batch_size: 128" in text and "checkpoint: null" in text
    assert re.search(r"eva_giant_patch14_clip_224\.laion400m +│ +0 +│ +985,894,528", text)
    assert re.search(
        r"lmsys/vicuna-7b-v1\.1 +│ +0 +│ +6,738,415,616 │ the sizes shipped in configs/architectures", text
    )
    assert "184,112,640 │     4,723,968" in text and "7,729,034,112" in text
    assert "blip2_pretrained.pth (not here): text" in text
    assert "60,000 steps of 128 are 7,680,000 draws" in text
    table = rows(text)
    assert list(table) == HELD_IN
    for name, (size, _, share, here, draws, passes) in table.items():
        published = cards.load(name).train.size  # type: ignore[union-attr]
        assert (size, share, here) == (f"{published:,}", f"{P_D[name]:.4f}", "–")
        assert float(draws.replace(",", "")) == pytest.approx(7_680_000 * P_D[name], rel=1e-4)
        assert float(passes) == pytest.approx(7_680_000 * P_D[name] / published, abs=0.006)
    assert f"data.root is '{tmp_path / 'nowhere'}', and there is no such folder." in text
    assert f"qformer data check --data {tmp_path / 'nowhere'} says what to download" in text
    assert "No weight was read." in text and "samples" not in text.partition("mixture")[2]


def test_a_dry_run_in_words_shows_ten_samples_of_each_set(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tokenizer at hand, on small files in the official layouts."""
    towers = ("vision.name=demo:image", "vision.block=null", "vision.norm=true")
    text = shown(config.load("instructblip_vicuna7b", [f"data.root={data}", *towers]))
    assert "Shown in words alone, since no tokenizer can be had here: language.name is 'lmsys/vicuna-7b-v1.1'" in text
    for name in HELD_IN:
        records = int(rows(text)[name][3])
        drawn = re.findall(rf"^{name}, draw (\d+) in step (\d+)$", text, re.MULTILINE)
        assert len(drawn) == min(10, records)
        assert all(int(number) // 128 == int(step) for number, step in drawn)
    assert re.search(r"vqg_vqav2\n.*\n  words +.*\bred\b.* ▸What colour is the kite\?◂", text)
    assert re.search(
        r"textcaps\n.*\n  words +OCR tokens: TONIC, water, est\. 1872\. .* ▸Bottle of tonic water\.◂", text
    )
    assert "What is in the sky? A red kite. Is it windy? ▸Probably, since the kite is flying.◂" in text
    assert "data that are not there" not in text


def test_a_dry_run_counts_what_the_run_would_train(
    data: Path, tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Towers whose weights are not there are counted as the loaded ones are, and tokens are shown."""
    assert cli.main(["train", "instructblip_vicuna7b", "--dry-run", f"data.root={data}", *tiny]) == 0
    text = capsys.readouterr().out
    places = world.towers(tmp_path, "llama")
    whole = [f"vision.name={places['vision']}", f"language.name={places['language']}", f"qformer.init={places['bert']}"]
    more = ["vision.block=null", "vision.dtype=float32", "language.dtype=float32"]
    changes = [*whole, *more, f"qformer.tokenizer={places['bert']}"]
    model = loading.build(config.load("instructblip_vicuna7b", changes), report=str)
    trained = sum(each.numel() for each in model.trainable().values())
    frozen = sum(each.numel() for each in model.parameters()) - trained
    assert re.search(rf"│ in all +│ +│ +{trained:,} │ +{frozen:,} │", text)
    assert re.search(r"  LLM +⟨32 soft tokens of picture 1⟩.*▸.*◂", text) and "  Q-Former     [CLS]" in text
    assert "samples: the first of each set" in text and "Shown in words" not in text
    assert cli.main(["train", "demo", "--dry-run", "train.steps=3", "--nonsense"]) == 2


@pytest.mark.parametrize("name", [name for name in RUNS if name not in PAPER])
def test_every_other_run_can_be_tried_dry(name: str, data: Path, tiny: tuple[str, ...]) -> None:
    text = shown(config.load(name, [f"data.root={data}", *tiny]), samples=1)
    assert "data that are not there" not in text and "▸" in text and "Shown in words" not in text
    if name == "no_balancing":
        assert {row[2] for row in rows(text).values()} == {"0.0769"}
    if name == "no_templates_dataset_name":
        assert "set          vqav2:dataset_name" in text
    if name == "finetune_scienceqa":
        assert rows(text)["scienceqa"][0] == "6,218" and rows(text)["scienceqa"][4] == "93,280"


def test_sets_that_are_there_are_shown_beside_those_that_are_not(
    data: Path, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    part = tmp_path / "part"
    for folder in ("okvqa", "coco"):
        shutil.copytree(data / folder, part / folder)
    text = shown(config.load("instructblip_flant5xl", [f"data.root={part}", *tiny]))
    table = rows(text)
    assert table["okvqa"][2] == "0.0116" and table["okvqa"][3] == "3" and table["vqav2"][3] == "–"
    assert "okvqa, draw" in text and "vqav2, draw" not in text
    assert f"  vqav2: there is no '{part}/vqav2/v2_OpenEnded_mscoco_train2014_questions.json'" in text
    assert f"  textcaps, to be scored: there is no '{part}/textcaps/" in text and "  okvqa, to be scored" not in text
    sizeless = tmp_path / "mine.yaml"
    sizeless.write_text(
        "name: mine\nversion: 1\ntrain: {reader: jsonl, files: {records: r, images: i}, template: instruction}\n"
    )
    with pytest.raises(DataError, match=r"mine: there is no '.*/r'"):
        shown(config.load("instructblip_flant5xl", [f"data.root={part}", *tiny, f"data.tasks={{{sizeless}: 1}}"]))


def test_a_tower_whose_config_cannot_be_had_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    changes = [
        f"data.root={tmp_path}",
        "language.name=nobody/nothing",
        "vision.name=no_one/nowhere",
        "vision.block=null",
    ]
    text = shown(config.load("instructblip_vicuna7b", changes), width=400)
    assert re.search(
        r"LLM +│ nobody/nothing +│ +0 │ +not known │ nothing: language\.name is 'nobody/nothing', and", text
    )
    size = dryrun.adapter_size(config.load("instructblip_vicuna7b"))[0]
    known, frozen = dryrun.adapter_parameters(size, None, None)
    assert (f"at least {known:,} │" in text and "at least" in text.splitlines()[-1]) or "less what is as wide" in text
    whole = dryrun.adapter_parameters(size, 1408, 4096)
    assert whole[0] - known == 2 * 1408 + 12 * 768 * 1408 + 4096 * 769 and whole[1] == frozen


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [
        ("google/flan-t5-xl", 2_849_757_184, 2048),
        ("google/flan-t5-xxl", 11_135_332_352, 4096),
        ("lmsys/vicuna-7b-v1.1", 6_738_415_616, 4096),
        ("lmsys/vicuna-13b-v1.1", 13_015_864_320, 5120),
    ],
)
def test_the_shipped_sizes_are_the_published_ones(name: str, parameters: int, width: int) -> None:
    found = blueprints.language(LanguageConfig(name=name))
    assert (found.parameters, found.width) == (parameters, width) and "sizes shipped" in found.known_from


def test_the_size_of_a_start_is_read_off_its_config(tmp_path: Path) -> None:
    from tests.published import tiny_published

    places = world.towers(tmp_path, "llama")
    published = tiny_published(tmp_path / "published", "llama")
    for source in (places["bert"], str(published)):
        found = loading.described_size(source)
        described = json.loads((Path(source) / "config.json").read_text())
        inner = described.get("qformer_config", described)
        assert (
            found is not None and found["hidden"] == inner["hidden_size"] and found["vocabulary"] == inner["vocab_size"]
        )
    world.write_pictures(tmp_path)
    model = loading.build(world.settings(tmp_path, tmp_path, tmp_path / "run"), report=str)
    model.save(tmp_path / "adapter")
    assert loading.described_size(str(tmp_path / "adapter")) == dataclasses.asdict(model.connector.size)
    assert loading.described_size("blip2_pretrained.pth") is None and loading.described_size("no_one/nowhere") is None


def test_the_blueprint_of_an_encoder_is_what_is_held_of_it(tmp_path: Path) -> None:
    settings = VisionConfig(name="vit_tiny_patch16_224", block=-3, norm=False, pretrained=False)
    from qformer.backbones.vision import load_vision

    found, tower = blueprints.vision(settings), load_vision(settings)
    assert (found.parameters, found.width) == (blueprints.count(tower), tower.width)
