"""Validation in the midst of training: it leaves no trace, the best adapter is kept, and a stop changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from qformer import cli, config, loading, run, saved
from qformer.config import RunConfig
from qformer.errors import ConfigError, DataError, TrainingError
from qformer.train import checkpoint, loop
from qformer.vlm import ADAPTER_FILE
from qformer.weights import load_tensors
from tests import world

Scores = Callable[[Any, int], dict[str, float]]
SCORES = {2: 0.2, 4: 0.6, 6: 0.4}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def make(towers: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Settings of a run of six steps in a folder of its own."""
    world.write_pictures(tmp_path / "data")

    def make(*changes: str, name: str = "run", family: str = "llama") -> RunConfig:
        given = ("train.steps=6", "qformer.dropout=0.1", "validation.every=2", *changes)
        return world.settings(towers, tmp_path / "data", tmp_path / name, *given, family=family)

    return make


def train(settings: RunConfig, validate: Scores | None = None) -> Path:
    return loop.train(settings, validate=validate, say=lambda _: None, quiet=True)


def named(_: Any, step: int) -> dict[str, float]:
    """Scores that are best in the middle."""
    return {"one": SCORES[step], "other": SCORES[step] + 0.2}


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_tensors(directory / ADAPTER_FILE)


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines(directory: Path) -> list[dict[str, Any]]:
    """What was measured, without the clock's readings."""
    told = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if "per_second" not in name and name != "waited"} for line in told
    ]


def colours(settings: RunConfig) -> str:
    return f"validation.tasks=[{Path(settings.data.root) / 'colours.yaml'}]"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_is_bit_equal_with_validation_and_without(make: Callable[..., RunConfig], family: str) -> None:
    plain = train(make(name="plain", family=family))
    settings = make(colours(make(name="plain", family=family)), "evaluate.shuffled=false", name="seen", family=family)
    seen = run.fit(settings, say=lambda _: None, quiet=True)
    assert same(adapter(saved.last_checkpoint(plain)), adapter(saved.last_checkpoint(seen)))
    told = lines(seen)
    assert lines(plain) == [line for line in told if "loss" in line]
    validated = [line for line in told if "validation" in line]
    assert [line["step"] for line in validated] == [2, 4, 6]
    for line in validated:
        found = json.loads((seen / "validation" / f"step-{line['step']}" / "colours.json").read_text())
        assert line["validation"] == line["validation/colours"] == found["score"] and found["shuffled"] is None


def test_the_best_adapter_is_kept_apart_and_loaded(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings = make("train.keep_checkpoints=1", "train.checkpoint_every=6")
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def validate(model: Any, step: int) -> dict[str, float]:
        kept[step] = {name: tensor.clone() for name, tensor in model.connector.state_dict().items()}
        return named(model, step)

    directory = train(settings, validate)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["best", "step-6"]
    told = json.loads((directory / "checkpoints" / "best" / "validation.json").read_text())
    assert told["step"] == 4 and told["mean"] == pytest.approx(0.7) and told["scores"]["one"] == 0.6
    best = loading.load(directory, report=str)
    assert same(best.connector.state_dict(), kept[4]) and best.run == directory
    last = loading.load(saved.last_checkpoint(directory), report=str)
    assert same(last.connector.state_dict(), kept[6]) and not same(kept[4], kept[6])
    assert same(loading.read_adapter(directory)[0], kept[4])
    with pytest.raises(ConfigError, match="it is no run directory with a checkpoint"):
        saved.last_checkpoint(tmp_path / "data")


def test_the_command_line_takes_the_best_or_the_last(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train(make(), named)
    taken: list[str] = []
    monkeypatch.setattr(run, "export", lambda source, *_, **__: taken.append(source) or [])
    for more in ([], ["--last"]):
        assert cli.main(["export", str(directory), str(tmp_path / "out"), "--to", "lavis", *more]) == 0
    assert taken == [str(directory), str(directory / "checkpoints" / "step-6")]
    assert cli.main(["ask", str(tmp_path), "x.png", "what", "--last"]) == 2


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", ["in validation", "behind the best", "behind the line"])
def test_a_run_stopped_around_a_validation_ends_as_if_it_never_was(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = train(make(name="whole"), named)
    settings = make(name="stopped")

    def validate(model: Any, step: int) -> dict[str, float]:
        torch.rand(3)  # a validation may draw what it likes
        if moment == "in validation" and step == 4:
            raise Stopped
        return named(model, step)

    def stop_after(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def stopping(*given: Any) -> Any:
            result = function(*given)
            if when(*given):
                raise Stopped
            return result

        return stopping

    with monkeypatch.context() as patch:
        if moment == "behind the best":
            patch.setattr(checkpoint, "keep_best", stop_after(checkpoint.keep_best, lambda _, step, *__: step == 4))
        if moment == "behind the line":
            write = loop._Lines.write
            ending = stop_after(write, lambda _, values: values["step"] == 4 and "validation" in values)
            patch.setattr(loop._Lines, "write", ending)
        with pytest.raises(Stopped):
            train(settings, validate)
    assert [path.name for path in saved.checkpoints(settings.directory)] == ["step-2", "step-4"]
    stopped = train(settings, named)
    assert lines(whole) == lines(stopped)
    for name in ("best", "step-6"):
        assert same(adapter(whole / "checkpoints" / name), adapter(stopped / "checkpoints" / name))
    assert checkpoint.best_of(whole) == checkpoint.best_of(stopped)


def test_of_equals_the_first_is_the_best(make: Callable[..., RunConfig]) -> None:
    assert (checkpoint.best_of(train(make(), lambda *_: {"one": 0.5})) or {})["step"] == 2


def test_a_damaged_best_is_named(make: Callable[..., RunConfig]) -> None:
    directory = train(make("train.steps=2"), named)
    (directory / "checkpoints" / "best" / "validation.json").write_text("{")
    with pytest.raises(TrainingError, match=r"validation\.json: it is not whole .* remove .*best"):
        train(make("train.steps=4"), named)


def test_a_run_does_not_go_on_with_another_validation(make: Callable[..., RunConfig]) -> None:
    train(make("train.steps=2"), named)
    train(make("validation.batch_size=7", "train.steps=4"), named)
    with pytest.raises(ConfigError, match=r"validation\.limit was None and is 5"):
        train(make("validation.limit=5"), named)


def test_a_held_out_card_chooses_no_checkpoint(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"validation\.tasks names 'gqa', which is held out: a checkpoint that is"):
        run.fit(make("validation.tasks=[gqa]"))


def test_what_cannot_be_validated_on_is_said_before_any_training(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "build", None)
    with pytest.raises(DataError, match=r"vqav2: there is no .*val2014_questions"):
        run.fit(make("validation.tasks=[vqav2]"))
    with pytest.raises(ConfigError, match="no 'eval' section"):
        run.fit(make("validation.tasks=[vqg_vqav2]"))
    with pytest.raises(ConfigError, match=r"validation\.every is 0; it must be at least 1"):
        make("validation.every=0")


def test_a_task_without_a_score_ends_the_run_in_a_sentence(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qformer.evaluate import run as evaluation

    unscored = {"colours": {"score": None, "metric": "auroc", "samples": 3}}
    monkeypatch.setattr(evaluation, "score", lambda *_, **__: unscored)
    settings = make(colours(make()))
    with pytest.raises(DataError, match=r"'colours' has no auroc over the 3 samples chosen; raise validation\.limit"):
        run.fit(settings, say=lambda _: None, quiet=True)


@pytest.mark.parametrize("validate", [None, lambda *_: {"one": 0.5}])
def test_other_processes_wait_for_a_long_validation(
    make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, validate: Scores | None
) -> None:
    given: list[Any] = []
    state = loop.PartialState

    def watched(**settings: Any) -> Any:
        given.append(settings.get("timeout"))
        return state(**settings)

    monkeypatch.setattr(loop, "PartialState", watched)
    train(make("train.steps=1"), validate)
    assert given[0] == (timedelta(hours=12) if validate else None)  # later ones find the processes joined


VALIDATED = """
import sys
from qformer import config
from qformer.run import fit

fit(config.load(sys.argv[1], sys.argv[2:]), say=lambda _: None, quiet=True)
"""


@pytest.mark.slow
def test_two_processes_validate_as_one_does(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(VALIDATED)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    told = []
    for ranks in (1, 2):
        given = (colours(make()), "validation.every=2", "train.steps=4")
        directory = make(*given, name=f"ranks{ranks}").directory
        launch = ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={28400 + os.getpid() % 500}"]
        command = [sys.executable, "-m", *launch, str(script), f"{directory}.yaml", *given]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        assert (directory / "checkpoints" / "best" / "adapter.safetensors").exists()
        told.append([line for line in lines(directory) if "validation" in line])
    assert [line["step"] for line in told[1]] == [2, 4]
    for alone, shared in zip(*told, strict=True):
        assert shared["validation"] == pytest.approx(alone["validation"], abs=0.1)


def test_the_settings_of_a_run_are_read_back(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    settings = make(colours(make()), "validation.limit=3")
    config.save(settings, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == settings
