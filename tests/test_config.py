"""Settings: read strictly, before anything else happens, with errors that say where and what would work."""

import pytest

from qformer import config
from qformer.config import RunConfig
from qformer.errors import ConfigError

BASE = "vision: {name: some_vit}\nlanguage: {name: some/llm}\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_file_and_overrides_make_one_frozen_config(write):
    loaded = config.load(write(BASE + "train: {rate: 1e-4}\n"), ["train.steps=7", "data.root=/data"])
    assert (loaded.train.rate, loaded.train.steps, loaded.data.root) == (1e-4, 7, "/data")
    with pytest.raises(AttributeError):
        loaded.train.steps = 8


def test_saved_config_reads_back_equal(write, tmp_path):
    loaded = config.load(write(BASE + "data: {tasks: {gqa: 2}}\nqformer: {queries: 4}\n"))
    config.save(loaded, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == loaded


def test_a_config_names_its_parent_and_changes_what_it_says(write):
    write(BASE + "train: {steps: 10, rate: 1e-3}\n", "parent.yaml")
    child = config.load(write("extends: parent.yaml\nqformer: {instruction: false}\n", "child.yaml"))
    assert (child.train.steps, child.train.rate, child.qformer.instruction) == (10, 1e-3, False)


def test_cards_beside_the_config_are_found_from_anywhere(write, tmp_path, monkeypatch):
    write("name: mine\nversion: 1\n", "mine.yaml")
    path = write(BASE + "data: {tasks: {mine.yaml: 1}}\nevaluate: {tasks: ['mine.yaml:small', gqa]}\n")
    monkeypatch.chdir("/")
    loaded = config.load(path)
    assert list(loaded.data.tasks) == [str(tmp_path / "mine.yaml")]
    assert loaded.evaluate.tasks == [f"{tmp_path / 'mine.yaml'}:small", "gqa"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {stepz: 5}", [], r"run\.yaml: unknown key 'train\.stepz'\. Did you mean 'steps'\?"),
        ("trian: {steps: 5}", [], r"unknown key 'trian'\. Did you mean 'train'\?"),
        ("train: {steps: many}", [], r"run\.yaml: train\.steps: Value 'many'"),
        ("train: {precision: float17}", [], r"train\.precision"),
        ("name: no", [], r"run\.yaml: name is the YAML boolean false where a word belongs; put the word in quotes"),
        ("language: {name: x, profile: {stop: [yes]}}", [], r"language\.profile\.stop\[0\] is the YAML boolean true"),
        ("qformer: {init: off}", [], r"qformer\.init is the YAML boolean false"),
        ("data: {tasks: {on: 1.0}}", [], r"data\.tasks has the key True, a YAML boolean"),
        ("", ["train.steps=0"], r"train\.steps is 0; it must be at least 1"),
        ("", ["train.max_norm=-1"], r"train\.max_norm is -1\.0"),
        ("", ["train.micro_batch_tokens=0"], r"train\.micro_batch_tokens is 0"),
        ("", ["train.rate=0"], r"train\.rate must be above 0"),
        (
            "",
            ["qformer.hidden=10", "qformer.heads=3"],
            r"qformer\.hidden \(10\) must divide evenly by qformer\.heads \(3\)",
        ),
        ("", ["qformer.queries=0"], r"qformer\.queries"),
        ("", ["qformer.dropout=1"], r"qformer\.dropout is 1\.0"),
        ("", ["vision.train_transform.flip=2"], r"flip is 2\.0"),
        ("", ["vision.train_transform.scale=[1]"], r"scale is \[1\.0\]"),
        ("", ["steps"], r"command line: 'steps' is not of the form key=value"),
        ("- a\n- b", [], r"holds a list"),
        ("a: [", [], r"not valid YAML"),
        ("seed: 1\nseed: 2", [], r"not valid YAML"),
    ],
)
def test_mistakes_are_told_with_file_and_key(write, text, overrides, message):
    base = "" if text.startswith(("language", "-", "a:", "seed")) else BASE
    with pytest.raises(ConfigError, match=message):
        config.load(write(base + text + "\n"), overrides)


def test_towers_must_be_named(write):
    with pytest.raises(ConfigError, match=r"run\.yaml: vision\.name is not set"):
        config.load(write("language: {name: x}\n"))


def test_unknown_and_missing_configs(tmp_path):
    with pytest.raises(ConfigError, match="unknown config 'nothing_like_it'"):
        config.load("nothing_like_it")
    with pytest.raises(ConfigError, match="there is no such file"):
        config.load(tmp_path / "absent.yaml")


def test_extends_that_leads_back_is_refused(write):
    write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(ConfigError, match="leads back to itself"):
        config.load(write("extends: a.yaml\n", "b.yaml"))


def test_defaults_are_the_papers():
    train = RunConfig().train
    assert (train.rate, train.warmup_rate, train.warmup_steps, train.final_rate) == (1e-5, 1e-8, 1000, 0.0)
    assert (train.betas, train.weight_decay, train.max_norm) == ([0.9, 0.999], 0.05, None)
    assert RunConfig().qformer.queries == 32
