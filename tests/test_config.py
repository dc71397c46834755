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
        ("", ["train.rate=0"], r"train\.rate is 0\.0; it must be above 0"),
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
        ("", ["train.=3"], r"command line: 'train\.=3' is not of the form key=value"),
        ("", ["train={"], r"command line: 'train=\{' has no value that YAML can read"),
        ("", ["a=[b"], r"command line: 'a=\[b' has no value that YAML can read"),
        ("", ["data.tasks=[a, b]"], r"command line: data\.tasks is \['a', 'b'\]; it takes named values"),
        ("", ["data.tasks={a: {b: 1}}"], r"data\.tasks\.a is \{'b': 1\}; it takes one value"),
        ("", ["data.tasks={a: x}"], r"data\.tasks\.a: Value 'x'"),
        ("data: {tasks: {a: {b: 1}}}", [], r"run\.yaml: data\.tasks\.a is \{'b': 1\}; it takes one value"),
        ("data: [a]", ["data.tasks={a: 1}"], r"run\.yaml: data is \['a'\]; it takes named values"),
        ("train: no", [], r"run\.yaml: train is the YAML boolean false; it takes named values"),
        ("evaluate: {tasks: gqa}", [], r"evaluate\.tasks is 'gqa'; it takes a list"),
        ("- a\n- b", [], r"holds a list"),
        ("a: [", [], r"not valid YAML"),
        ("seed: 1\nseed: 2", [], r"not valid YAML"),
    ],
)
def test_mistakes_are_told_with_file_and_key(write, text, overrides, message):
    base = "" if text.startswith(("language", "-", "a:", "seed")) else BASE
    with pytest.raises(ConfigError, match=message):
        config.load(write(base + text + "\n"), overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("language.target_limit=1", r"language\.target_limit is 1; it must be at least 2"),
        ("language.instruction_limit=0", r"language\.instruction_limit is 0; it must be at least 1"),
        ("language.profile.end=[]", r"language\.profile\.end is \[\]; it takes at least one token id"),
        ("qformer.instruction_limit=2", r"qformer\.instruction_limit is 2; it must be at least 3"),
        ("qformer.layers=0", r"qformer\.layers is 0; it must be at least 1"),
        ("vision.image_size=0", r"vision\.image_size is 0; it must be at least 1"),
        ("train.betas=[0.9]", r"train\.betas is \[0\.9\]; it takes two numbers"),
        ("train.betas=[0.9,1.0]", r"train\.betas is \[0\.9, 1\.0\]; .* below 1"),
        ("train.betas=[-0.1,0.9]", r"train\.betas is \[-0\.1, 0\.9\]"),
        ("train.rate=.inf", r"train\.rate is inf; it must be a finite number, above 0"),
        ("train.rate=.nan", r"train\.rate is nan"),
        ("train.final_rate=-1", r"train\.final_rate is -1\.0; it must be at least 0"),
        ("train.warmup_rate=.nan", r"train\.warmup_rate is nan"),
        ("train.monitor_every=-1", r"train\.monitor_every is -1"),
        ("data.workers=-1", r"data\.workers is -1; it must be at least 0"),
        ("data.max_pixels=0", r"data\.max_pixels is 0; it must be at least 1"),
        ("data.tasks.gqa=0", r"data\.tasks: the multiplier of 'gqa' is 0\.0; it must be above 0"),
        ("data.tasks.gqa=-2", r"the multiplier of 'gqa' is -2\.0"),
        ("data.tasks.gqa=.inf", r"the multiplier of 'gqa' is inf"),
        ("seed=-1", r"seed is -1; it must be at least 0 and below 2\^63"),
        ("seed=9223372036854775808", r"seed is 9223372036854775808"),
        ("evaluate.limit=0", r"evaluate\.limit is 0; it must be at least 1"),
        ("evaluate.batch_size=0", r"evaluate\.batch_size is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_when_settings_are_read(write, change, message):
    with pytest.raises(ConfigError, match=message):
        config.load(write(BASE), [change])


def test_a_target_has_room_for_the_end_marks_it_is_given(write):
    with pytest.raises(ConfigError, match=r"target_limit is 3; it must be at least 4"):
        config.load(write(BASE), ["language.profile.end=[1,2,3]", "language.target_limit=3"])


@pytest.mark.parametrize(
    ("changes", "mixture"),
    [
        (["data.tasks.gqa=3"], {"gqa": 3.0, "vqav2": 2.0}),
        (["data.tasks.mine/birds.yaml=3"], {"gqa": 1.0, "vqav2": 2.0, "mine/birds.yaml": 3.0}),
        (["data.tasks={nocaps: 3}"], {"nocaps": 3.0}),
        (["data.tasks={nocaps: 3}", "data.tasks.gqa=4"], {"nocaps": 3.0, "gqa": 4.0}),
        (["data.tasks.gqa=4", "data.tasks={nocaps: 3}"], {"nocaps": 3.0}),
        (["data.tasks={gqa: 1}", "data.tasks={nocaps: 3}"], {"nocaps": 3.0}),
    ],
)
def test_a_whole_mixture_replaces_the_files_and_one_card_changes_it(write, changes, mixture):
    write(BASE + "data: {root: /data, tasks: {gqa: 1}}\n", "parent.yaml")
    loaded = config.load(write("extends: parent.yaml\ndata: {tasks: {vqav2: 2}}\n"), changes)
    assert loaded.data.tasks == mixture and loaded.data.root == "/data"


def test_what_a_file_replaces_is_not_merged_with_its_parents(write):
    language = "vision: {name: v}\nlanguage: {name: l, architecture: {a: 1}}\n"
    write(language + "data: {root: /data, tasks: {gqa: 1, vqav2: 2}}\n", "top.yaml")
    write("extends: top.yaml\ndata: {tasks: {nocaps: 1}}\n", "middle.yaml")
    child = "extends: middle.yaml\nreplaces: [data.tasks, language.architecture]\ndata: {tasks: {vsr: 3}}\n"
    loaded = config.load(write(child))
    assert loaded.data.tasks == {"vsr": 3.0} and loaded.data.root == "/data" and loaded.language.architecture == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere", r"run\.yaml: 'extends' names a parent that is not there: unknown config 'nowhere'"),
        ("extends: nowhere.yaml", r"run\.yaml: 'extends' names a parent .*nowhere\.yaml': there is no such file"),
        ("extends: [demo]", r"run\.yaml: 'extends' is \['demo'\]; it takes the parent's name"),
        ("extends: no", r"'extends' is the YAML boolean false; it takes"),
        ("replaces: [data.tasks]", r"'extends' is None; it takes the parent's name"),
        ("extends: demo\nreplaces: data.tasks", r"'replaces' is 'data\.tasks'; it takes a list of keys"),
    ],
)
def test_parents_that_cannot_be_are_named_with_the_file(write, text, message):
    with pytest.raises(ConfigError, match=message):
        config.load(write(text + "\n"))


def test_towers_must_be_named(write):
    with pytest.raises(ConfigError, match=r"run\.yaml: vision\.name is not set"):
        config.load(write("language: {name: x}\n"))


def test_unknown_and_missing_configs(tmp_path):
    with pytest.raises(ConfigError, match="unknown config 'nothing_like_it'"):
        config.load("nothing_like_it")
    with pytest.raises(ConfigError, match=r"there is no such file; check its path, or take a shipped one\..* Known: "):
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
