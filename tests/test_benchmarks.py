"""What stands in `benchmarks/` beside the scripts: its configs and cards load, and converters write what cards read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qformer import cards, config, dryrun
from qformer.data.readers import open_records
from qformer.demo.run import demo_settings

ROOT = Path(__file__).parent.parent / "benchmarks"


def photographs(root: Path) -> None:
    """A record of each kind, as the page shows them."""
    (root / "train").mkdir()
    Image.new("RGB", (32, 32)).save(root / "train/frog-0001.jpg")
    asked = {"name": "frog", "yesno": "yes", "kind": "animal"}
    for split in ("train", "test"):
        records = [
            {"id": f"frog-0001-{kind}", "image": "train/frog-0001.jpg", "instruction": "what?", "target": target,
             "candidates": [target, "no"]}
            for kind, target in asked.items()
        ]  # fmt: skip
        (root / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def test_the_photographs_page_has_a_config_that_would_run(tmp_path: Path) -> None:
    photographs(tmp_path)
    settings = config.load(str(ROOT / "photos/tune.yaml"), [f"data.root={tmp_path}", "language.name=demo:language"])
    assert settings.train.steps * settings.train.batch_size <= 15_000  # samples that the page is held to
    [card] = cards.load_all(settings.evaluate.tasks, "eval").values()
    samples = list(open_records(card.eval, tmp_path, card))
    assert [sample.fields["kind"] for sample in samples] == ["name", "yesno", "kind"]
    assert next(iter(dryrun.dry_run(settings)))


def test_nlvr_is_converted_to_what_its_card_reads(tmp_path: Path) -> None:
    """The official layout: a line a sentence, its pictures in up to six orders of the boxes."""
    for split in ("dev", "test"):
        folder = tmp_path / "nlvr" / split / "images/2"
        folder.mkdir(parents=True)
        for order in (0, 3):
            Image.new("RGB", (40, 10)).save(folder / f"{split}-15-1-{order}.png")
        row = {"identifier": "15-1", "sentence": " There is a box. ", "label": "true", "structured_rep": []}
        (tmp_path / "nlvr" / split / f"{split}.json").write_text(json.dumps(row) + "\n")
    command = [sys.executable, ROOT / "nlvr/convert.py", tmp_path / "nlvr", tmp_path / "records"]
    assert "dev.jsonl: 2 records" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    card = cards.load(str(ROOT / "nlvr/nlvr.yaml"))
    for section in (card.train, card.eval):
        samples = list(open_records(section, tmp_path, card))
        assert [sample.references for sample in samples] == [("true",), ("true",)]
        assert samples[0].fields["instruction"] == "True or false: There is a box."
        assert samples[0].images[0].is_file()


def test_nlvr_without_a_folder_says_how_it_is_called() -> None:
    ran = subprocess.run([sys.executable, ROOT / "nlvr/convert.py"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "python convert.py NLVR_FOLDER OUT" in ran.stderr


def test_ablations_take_scores_of_the_same_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import ablations

    monkeypatch.setattr(ablations, "VARIANTS", {"as it is": ()})
    place = tmp_path / "out" / "as_it_is-0"
    (place / "eval").mkdir(parents=True)
    config.save(demo_settings(place, 0, 960, None, (ablations.UNSHUFFLED,)), place / "config.yaml")
    for task in ("gqa", "vsr", "iconqa", "nocaps"):
        (place / "eval" / f"{task}.json").write_text(json.dumps({"score": 0.5, "metric": "accuracy"}))
    monkeypatch.chdir(tmp_path)
    words = ["ablations.py", "--seeds", "1", "--output", "out"]
    monkeypatch.setattr(sys, "argv", words)
    ablations.main()
    assert "| as it is | 50.00 (50.00 to 50.00) |" in capsys.readouterr().out
    for change in (["--steps", "7"], ["--set", "language.packing=false"]):
        monkeypatch.setattr(sys, "argv", [*words, *change])
        with pytest.raises(
            SystemExit, match=r"as_it_is-0: made with other settings; give those of its config\.yaml, or"
        ):
            ablations.main()


def test_ablations_intervals_are_students_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences 1, 2 and 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = 2.6458, over sqrt(3) 1.5275, times 4.303 6.57.

    With four, 0, 2, 4 and 6: mean 3, deviation 2.5820, over 2 1.2910, times 3.182 4.11.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    import ablations

    assert ablations.interval([1.0, 2.0, 6.0]) == "+3.00 ± 6.57"
    assert ablations.interval([0.0, -2.0, -4.0, -6.0]) == "-3.00 ± 4.11"
    assert ablations.interval([2.5]) == "+2.50"  # one seed has no spread
    scores = {"as it is": [50.0, 60.0, 40.0], "no instruction in the Q-Former": [51.0, 62.0, 46.0]}
    page = ablations.table({name: [{"gqa": value} for value in values] for name, values in scores.items()})
    assert page.splitlines()[2:] == [
        "| as it is | 50.00 (40.00 to 60.00) |",
        "| no instruction in the Q-Former | 53.00 (46.00 to 62.00); +3.00 ± 6.57 |",  # by seed, so narrower than both
    ]


@pytest.mark.parametrize("seeds", range(2, 9))
def test_the_table_of_students_t_is_the_integral_of_its_density(monkeypatch: pytest.MonkeyPatch, seeds: int) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import ablations

    freedom, end = seeds - 1, ablations.T_95[seeds]
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    at = np.linspace(-end, end, 200_001)
    inside = np.trapezoid(scale * (1 + at**2 / freedom) ** (-(freedom + 1) / 2), at)
    assert inside == pytest.approx(0.95, abs=5e-5)  # as far as its three digits go


def test_the_demos_llm_finds_what_it_is_told_as_nine_soft_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has learnt to: so what it does not answer there, no Q-Former can make it answer."""
    monkeypatch.syspath_prepend(str(ROOT))
    import told

    monkeypatch.setattr(told, "SETS", {"as it has read": ("attribute", "exists"), "ScienceQA": ("property",)})
    monkeypatch.setattr(sys, "argv", ["told.py", "--questions", "10"])
    told.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()][2:]
    assert [row[1] for row in rows] == ["attribute", "exists", "property", "ten rounds, mean reciprocal rank"]
    assert [row[2] for row in rows] == ["10", "10", "10", "10"]
    right, beside = ([float(row[at].removesuffix("%")) for row in rows] for at in (3, 4))
    assert min(right[:2]) > 80 and beside[1] == 50
    assert all(share > blindly for share, blindly in zip(right[2:], beside[2:], strict=True))


def test_the_demos_llm_is_asked_as_the_cards_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import told

    [mean] = told.questions("mean", 1)
    assert mean.rendered.instruction.startswith('This is an image with: "') and mean.candidates == ("yes", "no")
    [matter] = told.questions("matter", 1)
    assert matter.rendered.instruction.startswith("Context: A thing made of rubber would bounce. A thing")
    assert " Options: (a) " in matter.rendered.instruction and matter.answer in matter.candidates
    [reads] = told.questions("reads", 1)
    assert reads.rendered.instruction.startswith("Question: What does the ") and not reads.candidates
