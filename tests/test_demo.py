"""The demo's own code path, scaled down: scenes in the official formats, tuning, zero-shot scores, a page."""

import dataclasses
import json
import re

import pytest

from qformer import cards, cli, config, resources
from qformer.demo import run as demo_run
from qformer.errors import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`qformer demo` with 30 steps and 40 questions a set, on few pictures."""
    output = tmp_path_factory.mktemp("demo") / "run"
    demo_run.write_scenes(output / "data", 0, 60, 60, say=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "PICTURES_TRAIN", 60)
        patch.setattr(demo_run, "PICTURES_TEST", 60)
        assert cli.main(["demo", "--output", str(output), "--steps", "30", "--limit", "40", "train.log_every=6"]) == 0
    return output


def test_the_demo_leaves_what_it_promises(finished):
    settings = config.load(finished / "config.yaml")
    assert (settings.train.steps, settings.train.log_every) == (30, 6)
    mixture = json.loads((finished / "mixture.json").read_text())
    assert set(mixture) == {"coco_caption", "vqav2", "vqg_vqav2", "aokvqa", "llava_conversation"}
    assert sum(each["asked"] for each in mixture.values()) == pytest.approx(1.0)
    for task in ("gqa", "vsr", "iconqa", "nocaps"):
        result = json.loads((finished / "eval" / f"{task}.partial.json").read_text())
        assert result["partial"] and result["samples"] == 40 and result["role"] == "held_out"
        assert result["shuffled"]["score"] is not None and result["most_frequent"]["score"] is not None


def test_the_page_stands_alone(finished):
    page = (finished / "report.html").read_text()
    assert all(name in page for name in ("GQA", "Visual Spatial Reasoning", "IconQA", "NoCaps"))
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)


@pytest.mark.slow
def test_the_full_mixture_takes_the_same_path(tmp_path, monkeypatch, capsys):
    """`qformer demo --full` with few steps and questions, on few pictures: 26 sets are drawn from or scored."""

    def unshuffled(*given, **named):  # half of the time
        made = settings(*given, **named)
        return dataclasses.replace(made, evaluate=dataclasses.replace(made.evaluate, shuffled=False))

    settings = demo_run.demo_settings
    monkeypatch.setattr(demo_run, "demo_settings", unshuffled)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_run, "PICTURES_TRAIN", 160)
    monkeypatch.setattr(demo_run, "PICTURES_TEST", 24)
    assert cli.main(["demo", "--full", "--steps", "3", "--limit", "4"]) == 0
    output = tmp_path / "runs" / "demo_full"
    mixture = json.loads((output / "mixture.json").read_text())
    shipped = [cards.load(name) for name in resources.names("tasks")]
    assert set(mixture) == {card.name for card in shipped if card.role == "held_in" and card.train}
    assert len(mixture) == 13
    assert all(each["records"] > 0 for each in mixture.values())
    assert sum(each["drawn"] > 0 for each in mixture.values()) > 8
    results = [json.loads(file.read_text()) for file in sorted((output / "eval").glob("*.partial.json"))]
    scored = {role: {each["task"] for each in results if each["role"] == role} for role in ("held_out", "held_in")}
    assert scored["held_out"] == {card.name for card in shipped if card.role == "held_out"}
    assert len(scored["held_out"]) == 13
    assert scored["held_in"] == {card.name for card in shipped if card.role == "held_in" and card.eval} | {
        "aokvqa:multiple_choice"
    }
    for each in results:
        assert each["samples"] == 4 and each["score"] is not None and each["most_frequent"] and not each["broken"]
    films = [each for each in results if each["task"] in ("msvd_qa", "msrvtt_qa", "ivqa")]
    assert [each["recipe_settings"]["reader"]["options"]["frames"] for each in films] == [4, 4, 4]
    page = (output / "report.html").read_text()
    assert "web_capfilt" in page
    zero_shot = page.split("<h2>Scores on parts of held-out sets</h2>")[1].split("<h2>")[0]
    known = page.split("<h2>Scores on parts of held-in sets</h2>")[1].split("<h2>")[0]
    for each in results:
        assert (each["title"] in zero_shot) == (each["role"] == "held_out") != (each["title"] in known)
    said = capsys.readouterr().out
    assert said.index("Scores on parts of held-out sets") < said.index("Scores on parts of held-in sets")
    for full, seed in ((False, 0), (True, 1)):
        with pytest.raises(ConfigError, match="scenes of another demo"):
            demo_run.write_scenes(output / "data", seed, 160, 24, full=full, say=lambda _: None)


def test_scenes_of_another_seed_are_not_taken_for_ones_own(finished):
    with pytest.raises(ConfigError, match="scenes of another demo"):
        demo_run.write_scenes(finished / "data", 1, 60, 60, say=lambda _: None)
