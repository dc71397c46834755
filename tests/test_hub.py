"""The ecosystem's names, hub ids out of a local cache, the model card, and the export command."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qformer
from qformer import cli, config, dryrun, hub, loading, modelcard
from qformer.errors import ConfigError, DataError
from tests import world
from tests.published import put_in_cache, tiny_published


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def model(towers: Path, tmp_path: Path) -> qformer.VLM:
    world.write_pictures(tmp_path)
    return loading.build(world.settings(towers, tmp_path, tmp_path / "run"), report=str).eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a directory into a hub cache as the hub's client lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return functools.partial(put_in_cache, tmp_path / "hub")


def same(one: qformer.VLM, other: qformer.VLM) -> bool:
    states = one.connector.state_dict(), other.connector.state_dict()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_hub_id_of_a_published_model_loads_out_of_the_cache(cache: Any, tmp_path: Path) -> None:
    directory = tiny_published(tmp_path / "published", "llama")
    name = cache(directory, "someone/instructblip")
    hub, local = qformer.load(name, report=str), qformer.load(directory, report=str)
    assert same(hub, local) and hub.settings.language.name == name
    assert torch.equal(hub.language.fingerprint(), local.language.fingerprint())
    assert hub.joiner().read_ids("what colour") == local.joiner().read_ids("what colour")
    hub.save(tmp_path / "adapter")
    assert same(qformer.load(tmp_path / "adapter", report=str), hub)


def test_a_hub_id_of_a_saved_adapter_loads_out_of_the_cache(cache: Any, model: qformer.VLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "adapter")
    again = qformer.VLM.from_pretrained(cache(tmp_path / "adapter", "someone/adapter"), report=str)
    assert same(again, model) and again.language.profile == model.language.profile


def test_a_hub_id_that_holds_something_else_is_refused(cache: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="no adapter there"):
        qformer.load(cache(tmp_path / "other", "someone/gpt"))


def test_an_adapter_is_uploaded_as_it_is_saved(
    model: qformer.VLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None):
            seen["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            seen["repo"] = (repo_id, private, exist_ok)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, **more: Any) -> Any:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}
            if more["revision"] == "gone":
                raise OSError("no such branch\nmore")
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert model.push_to_hub("birds", private=True, token="t") == "https://hub/someone/birds"
    assert seen["repo"] == ("birds", True, True) and seen["token"] == "t"
    assert {"adapter.safetensors", "config.json", "README.md", "instruction_tokenizer"} <= seen["files"]
    for more, name in (({}, "mine"), ({"repo_id": "someone/birds", "private": False}, "someone/birds")):
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, **more)
        assert seen["repo"] == (name, more.get("private"), True)
    assert same(qformer.load(tmp_path / "mine", report=str), model)
    with pytest.raises(ConfigError, match=r"birds: the hub does not take the adapter \(no such branch\); log in"):
        model.push_to_hub("birds", revision="gone")


def test_the_card_names_towers_data_recipe_and_scores(model: qformer.VLM, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    model.save(checkpoint)
    (tmp_path / "run" / "eval").mkdir()
    score = {"title": "Colours", "metric": "accuracy", "score": 0.75, "interval": [0.5, 0.9], "samples": 20, "of": 24}
    (tmp_path / "run" / "eval" / "colours.json").write_text(json.dumps({**score, "recipe": "ab12"}))
    again = qformer.load(tmp_path / "run", report=str)
    again.save(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: qformer\n")
    for words in (
        f"| language model | {model.settings.language.name} |",
        "| colours.yaml | 1 |",
        "| batch size | 6 |",
        "| Colours | accuracy | 0.7500 | 0.5000 to 0.9000 | 20 of 24 | ab12 |",
    ):
        assert words in card
    settings = dataclasses.replace(model.settings.language, name="google/flan-t5-xl")
    named = dataclasses.replace(model.settings, language=settings)
    lone = {**score, "task": "colours", "interval": [None, None]}  # of questions about one picture
    card = modelcard.text(named, model.connector.size, {}, [lone])
    assert "base_model: [google/flan-t5-xl]" in card
    assert "| Colours | accuracy | 0.7500 |  | 20 of 24 |  |" in card
    both = modelcard.text(named, model.connector.size, {}, [lone, {**lone, "role": "held_in", "title": "Known"}])
    assert both.index("## Scores, held-out") < both.index("| Colours |") < both.index("## Scores, held-in")
    assert both.index("## Scores, held-in") < both.index("| Known |")
    (tmp_path / "run" / "eval" / "colours.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        again.save(tmp_path / "adapter")


def test_the_export_command_writes_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tiny_published(tmp_path / "published", "llama"))
    assert cli.main(["export", source, str(tmp_path / "whole"), "--to", "transformers"]) == 0
    assert cli.main(["export", source, str(tmp_path / "lavis"), "--to", "lavis"]) == 0
    assert "epsilon 1e-05, and the adapter was trained with 1e-06" in capsys.readouterr().out
    assert (tmp_path / "whole" / "config.json").is_file() and (tmp_path / "lavis" / "adapter.pth").is_file()
    assert cli.main(["export", str(tmp_path / "nothing.pth"), str(tmp_path / "x"), "--to", "lavis"]) == 2
    assert "there is no such file or directory" in capsys.readouterr().err
    assert cli.main(["export", source, str(tmp_path / "lavis"), "--to", "lavis"]) == 2
    assert "adapter.pth is there already; give another directory, or remove it" in capsys.readouterr().err


def test_a_file_of_lavis_is_exported_with_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    whole = tiny_published(tmp_path / "published", "llama")
    assert cli.main(["export", str(whole), str(tmp_path / "lavis"), "--to", "lavis"]) == 0
    towers = ["--vision", str(whole), "--language", str(world.towers(tmp_path / "towers", "llama")["language"])]
    words = ["--instruction-tokenizer", str(whole / "qformer_tokenizer")]
    file = str(tmp_path / "lavis" / "adapter.pth")
    assert cli.main(["export", file, str(tmp_path / "back"), "--to", "transformers", *towers, *words]) == 0
    assert (tmp_path / "back" / "qformer_tokenizer" / "tokenizer.json").is_file()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are then looked up in the cache alone, and afterwards all is as before."""
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.asked_if_there():
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(ConfigError, match="someone/some-model: neither a path here nor a model"):
            qformer.load("someone/some-model")
    assert asked == [constants.ENDPOINT] and not constants.HF_HUB_OFFLINE

    monkeypatch.setattr(Session, "head", lambda self, url, timeout: asked.append(url))
    with hub.asked_if_there():
        assert not constants.HF_HUB_OFFLINE


def test_a_dry_run_asks_the_hub_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(hub, "reachable", lambda: bool(asked.append("hub")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    *_, last = dryrun.dry_run(config.load("instructblip_vicuna7b", [f"data.root={tmp_path / 'none'}"]))
    assert asked == ["hub"] and "No weight was read" in str(last)
