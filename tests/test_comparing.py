"""Scores beside other scores: another run's, published ones, those of other prompts and habits; and their traces."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformer import cards, cli, resources
from qformer.cards import Decoding
from qformer.errors import ConfigError, DataError
from qformer.evaluate import compare, habits, published, sweep
from qformer.evaluate.outcome import averaged
from qformer.evaluate.run import score
from qformer.evaluate.tables import as_text, tables
from qformer.processes import ALONE, Processes
from qformer.sample import Sample
from qformer.text import Rendered, load_templates, render_eval
from tests.test_evaluate import AUROC, RANK, Namer, world


class Unsure(Namer):
    """Takes every picture whose number can be divided by `wrong` for a green one."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
        seen = super().look(samples, instructions)
        numbers = [int(Path(str(sample.images[0])).stem.partition("-")[2]) for sample in samples]
        return ["green" if number % self.wrong == 0 else colour for number, colour in zip(numbers, seen, strict=True)]


def scored(root: Path, where: str, wrong: int, section: str = RANK, **options: Any) -> Path:
    """The directory of scores of a model that is wrong at times."""
    chosen = world(root, section)
    given = {"quiet": True, "say": lambda line: None, **options}
    score(Unsure(wrong), chosen, root, directory=root / where, **given)
    return root / where


# -- two runs ---------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_sample_by_sample(tmp_path: Path) -> None:
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10)
    found, notes = compare.compare(one, other)
    result = found["colours"]
    # Pictures 0, 3 … 27 are red, and ten of thirty are taken for green; in the other run 0, 10 and 20 are, of which 10
    # is green.
    assert (result["one"]["score"], result["other"]["score"]) == (pytest.approx(20 / 30), pytest.approx(28 / 30))
    assert result["difference"] == pytest.approx(8 / 30)
    low, high = result["interval"]
    assert 0 < low < 8 / 30 < high < 0.5
    assert result["better"] == [2, 18]  # two questions a picture
    assert (result["samples"], result["same_recipe"], notes) == (60, True, [])
    [table] = map(as_text, compare.tables(found, "one", "other"))
    for words in ("66.7", "93.3", "+26.7 (", "18", "60", result["one"]["recipe"]):
        assert words in table
    assert compare.compare(other, one)[0]["colours"]["difference"] == pytest.approx(-8 / 30)
    assert "-26.7 (" in as_text(compare.tables(compare.compare(other, one)[0], "a", "b")[0])


def test_a_difference_that_there_is_not_has_no_sign(tmp_path: Path) -> None:
    one = scored(tmp_path, "one", 3)
    found, _ = compare.compare(one, one)
    nothing = {"colours": {**found["colours"], "difference": None, "interval": [None, None]}}
    [table] = map(as_text, compare.tables(nothing, "one", "other"))
    assert "–" in table and "+–" not in table


def test_what_runs_of_one_recipe_differ_in_is_listed(tmp_path: Path) -> None:
    def whose(step: int, mode: str) -> dict[str, Any]:
        vision = {"name": "v", "eval_transform": {"mode": mode}, "fingerprint": str(step)}
        return {"source": str(step), "checkpoint": None, "step": step, "adapter": str(step), "vision": vision}

    one = scored(tmp_path, "one", 3, origin=whose(1, "squash"))
    other = scored(tmp_path, "other", 10, origin=whose(2, "crop"))
    file = other / "colours.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps({**result, "libraries": {**result["libraries"], "torch": "0.1"}}))
    torch = result["libraries"]["torch"]
    found, _ = compare.compare(one, other)
    listed = ["model.vision.eval_transform.mode is 'squash' and 'crop'", f"libraries.torch is '{torch}' and '0.1'"]
    assert found["colours"]["same_recipe"] and found["colours"]["apart"] == listed
    assert compare.apart(found) == [f"{each} (A and B; in no recipe)." for each in listed]
    found["birds"] = {**found["colours"], "apart": listed[1:]}
    assert compare.apart(found)[0] == f"colours: {listed[0]} (A and B; in no recipe)."
    assert compare.apart({"colours": compare.compare(one, one)[0]["colours"]}) == []


def test_variants_are_scored_on_the_same_part_and_compared_as_a_pair(tmp_path: Path) -> None:
    def part(key: str, where: str, wrong: int, variant: str) -> dict[str, Any]:
        world(tmp_path)
        card = tmp_path / "colours.yaml"
        card.write_text(card.read_text() + "variants: {short: {eval: {metric_options: {normaliser: lower}}}}\n")
        chosen = cards.load_all([f"{card}{variant}"], "eval")
        given: dict[str, Any] = {"quiet": True, "say": str, "limit": 20, "directory": tmp_path / where}
        return score(Unsure(wrong), chosen, tmp_path, **given)[key]

    one, other = part("colours", "one", 3, ""), part("colours:short", "other", 3, ":short")
    assert one["recipe"] != other["recipe"]
    for name in ("ids", "answers"):
        assert one["recipe_settings"]["split"][name] == other["recipe_settings"]["split"][name]
    assert [one[name] for name in ("score", "interval", "shuffled")] == [
        other[name] for name in ("score", "interval", "shuffled")
    ]
    folders = tmp_path / "one", tmp_path / "other"
    with pytest.raises(
        DataError, match=r"no scored set in common; .* or name two that are to be compared, as gqa=gqa:"
    ):
        compare.compare(*folders)
    with pytest.raises(ConfigError, match=r"different recipes.*card\.variant is '' and 'short'"):
        compare.compare(*folders, tasks=["colours=colours:short"])
    with pytest.raises(DataError, match=r"colours=colours:long: not scored in both"):
        compare.compare(*folders, tasks=["colours=colours:long"])
    found, _ = compare.compare(*folders, tasks=["colours=colours:short"], despite=True)
    [(name, result)] = found.items()
    assert (name, result["task"]) == ("colours=colours.short.partial", "colours=colours:short")
    assert (result["samples"], result["difference"], result["interval"]) == (20, 0.0, [0.0, 0.0])
    assert "colours=colours:short" in as_text(compare.tables(found, "one", "other")[0])


def test_a_run_is_no_better_than_itself(tmp_path: Path) -> None:
    one = scored(tmp_path, "one", 3)
    result = compare.compare(one, one)[0]["colours"]
    assert (result["difference"], result["interval"], result["better"]) == (0.0, [0.0, 0.0], [0, 0])


def test_the_paired_interval_is_narrower_than_that_of_unpaired_draws() -> None:
    """Both know the same hard samples; the standard error of the paired difference is that of the few that differ."""
    generator = np.random.default_rng(0)
    hard = generator.random(400) < 0.5
    better = hard | (generator.random(400) < 0.05)
    first, second = averaged(hard.astype(float)), averaged(better.astype(float))
    low, high = compare.paired_interval(first, second, range(400)) or (0.0, 0.0)
    difference = better.astype(float) - hard
    error = difference.std() / 20
    assert (low, high) == pytest.approx((difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=0.003)
    assert compare.paired_interval(first, second, [0] * 400) is None


def test_a_score_that_is_no_mean_is_computed_anew(tmp_path: Path) -> None:
    one, other = scored(tmp_path, "one", 3, AUROC), scored(tmp_path, "other", 4, AUROC)
    result = compare.compare(one, other)[0]["colours"]
    files = [json.loads((folder / "colours.json").read_text()) for folder in (one, other)]
    assert [result["one"]["score"], result["other"]["score"]] == [each["score"] for each in files]
    assert result["difference"] == pytest.approx(files[1]["score"] - files[0]["score"]) and result["difference"] > 0


def test_scores_of_different_recipes_are_refused_unless_told(tmp_path: Path) -> None:
    one = scored(tmp_path, "one", 3)
    other = scored(tmp_path, "other", 10, f"{RANK}, normalize: mean, end: false")
    message = (
        r"colours: the two scores are of different recipes, \w{12} and \w{12} \(ranking\.normalize is 'sum' and "
        r"'mean'; ranking\.end is True and False\); score both alike, or add --different-recipes"
    )
    with pytest.raises(ConfigError, match=message):
        compare.compare(one, other)
    found, _ = compare.compare(one, other, despite=True)
    assert not found["colours"]["same_recipe"]
    assert " / " in as_text(compare.tables(found, "one", "other")[0])
    with pytest.raises(ConfigError, match="one score is accuracy and the other auroc; their difference says nothing"):
        compare.compare(one, scored(tmp_path, "third", 3, AUROC), despite=True)


def test_parts_are_compared_with_the_same_parts_and_stand_apart(tmp_path: Path) -> None:
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10)
    scored(tmp_path, "one", 3, limit=20)
    with pytest.raises(DataError, match=r"colours2: not scored in both"):
        compare.compare(one, other, tasks=["colours2"])
    found, notes = compare.compare(one, other)
    assert list(found) == ["colours"] and notes == ["colours (a part of it): scored in one of the two alone; left out."]
    scored(tmp_path, "other", 10, limit=20)
    found, notes = compare.compare(one, other)
    assert list(found) == ["colours", "colours.partial"] and not notes
    whole_sets, parts = map(as_text, compare.tables(found, "one", "other"))
    assert "partial" not in whole_sets and "on parts of sets" in parts and "20 of 60, partial" in parts
    scored(tmp_path, "other", 10, limit=20, seed=1)  # other samples are another recipe
    with pytest.raises(ConfigError, match=r"different recipes.*split\.ids is"):
        compare.compare(one, other)
    assert 0 < compare.compare(one, other, despite=True)[0]["colours.partial"]["samples"] < 20


def test_a_role_stands_for_its_cards_that_both_were_scored_on(tmp_path: Path) -> None:
    """Each of the two has a card that the other has not, and `colours` is held in."""
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10)
    for folder, alone in ((one, "birds"), (other, "cats")):
        content = json.loads((folder / "colours.json").read_text())
        for name in ("shapes", alone):
            shutil.copy(folder / "colours.predictions.jsonl", folder / f"{name}.predictions.jsonl")
            text = json.dumps({**content, "task": name, "role": "held_out"})
            (folder / f"{name}.json").write_text(text)
    found, notes = compare.compare(one, other, tasks=["held_out"])
    assert list(found) == ["shapes"]
    assert notes == [f"{name}: scored in one of the two alone; left out." for name in ("birds", "cats")]
    assert list(compare.compare(one, other, tasks=["held_in"])[0]) == ["colours"]
    found, notes = compare.compare(one, other, tasks=["held_out", "colours", "shapes"])
    assert list(found) == ["shapes", "colours"] and len(notes) == 2
    for folder in (one, other):
        (folder / "colours.json").unlink()
    with pytest.raises(DataError, match="held_in: not scored in both"):
        compare.compare(one, other, tasks=["held_in"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"other: holds no scores; run qformer eval on it first"),
        (lambda folder: (folder / "colours.json").write_text("{"), r"colours\.json: cannot be read as JSON"),
        (lambda folder: (folder / "colours.json").write_text("{}"), r"it is not what evaluation writes \(it names no"),
        (
            lambda folder: (folder / "colours.json").write_text('{"task": "colours"}'),
            r"colours\.json: it is not what evaluation writes \(KeyError\('score'\)\); score the set again",
        ),
        (
            lambda folder: (folder / "colours.predictions.jsonl").unlink(),
            r"the predictions beside it do not add up to its score \(0 of them for 60 samples\)",
        ),
    ],
)
def test_files_that_cannot_be_compared_are_said(tmp_path: Path, spoil: Any, message: str) -> None:
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10)
    spoil(other)
    with pytest.raises(DataError, match=message):
        compare.compare(one, other)


def test_runs_without_a_set_in_common_are_said(tmp_path: Path) -> None:
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10, limit=9)
    with pytest.raises(DataError, match="they have no scored set in common; score both on the same tasks"):
        compare.compare(one, other)
    file = tmp_path / "one" / "colours.json"
    moved = json.loads(file.read_text())
    for line, name in enumerate(("a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "colours.json").write_text(json.dumps({**moved, "samples": 1, "score": 1.0}))
        (folder / "colours.predictions.jsonl").write_text(json.dumps({"id": line, "images": [], "score": 1.0}) + "\n")
    with pytest.raises(DataError, match="colours: the two runs have no sample in common"):
        compare.compare(tmp_path / "a", tmp_path / "b")


def test_what_a_server_scores_is_left_out(tmp_path: Path) -> None:
    one, other = scored(tmp_path, "one", 3), scored(tmp_path, "other", 10)
    for folder in (one, other):
        (folder / "vizwiz.json").write_text('{"task": "vizwiz", "score": null}')
        (folder / "vizwiz.submission.json").write_text("[]")
    assert list(compare.compare(one, other)[0]) == ["colours"]


# -- parts of sets ----------------------------------------------------------------------------------------------------


def test_a_part_is_never_in_one_table_with_a_whole(tmp_path: Path) -> None:
    scored(tmp_path, "whole", 3)
    scored(tmp_path, "part", 3, limit=10)
    read = [json.loads(file.read_text()) for file in (*tmp_path.glob("whole/*.json"), *tmp_path.glob("part/*.json"))]
    whole_sets, parts = tables({"one": read[0], "two": read[1]})
    assert "two" not in whole_sets and "partial" not in whole_sets
    assert "one" not in parts and "Scores on parts of sets" in parts and "10 of 60, partial" in parts


def test_held_in_scores_have_a_table_of_their_own(tmp_path: Path) -> None:
    scored(tmp_path, "whole", 3)
    [read] = [json.loads(file.read_text()) for file in tmp_path.glob("whole/*.json")]
    out, inside = tables({"a": {**read, "role": "held_out"}, "b": {**read, "role": "held_in"}})
    assert "Scores on held-out sets (95" in out and "│ a " in out and "│ b " not in out
    assert "Scores on held-in sets (95" in inside and "│ b " in inside and "│ a " not in inside
    [alone] = tables({"b": {**read, "role": "held_in"}})
    assert "Scores (95" in alone


# -- published scores -------------------------------------------------------------------------------------------------


def result(**changes: Any) -> dict[str, Any]:
    made = {
        "metric": "exact_match", "score": 0.5, "interval": [0.48, 0.52], "partial": False, "samples": 12578,
        "of": 12578, "published_size": None, "split": "testdev_balanced", "recipe": "abc",
    }  # fmt: skip
    return {**made, **changes}


def test_ours_stand_beside_published_scores_with_the_difference() -> None:
    paper = published.load("paper")
    ours = {
        "gqa": result(),
        "nocaps": result(metric="cider", score=1.25, interval=[None, None], split="val"),
        "scienceqa:hint_and_lecture+as_lavis": result(metric="accuracy", score=0.6, split="test"),
    }
    [table], left_out = published.compared(ours, paper, paper.row("", "lmsys/vicuna-7b-v1.1"))
    shown = as_text(table)
    for words in ("49.2*", "+0.8", "50.0 (48.0 to 52.0)", "125.0", "123.1*", "+1.9", "60.5", "-0.5", "abc"):
        assert words in shown
    assert "60.5*" not in shown and not left_out
    assert published.remarks(paper, "vicuna7b")[1].startswith("* ")
    assert published.remarks(paper, "vicuna7b")[2].startswith("Written down from the paper as its readers cite it;")
    plain = dataclasses.replace(paper, rows={"x": published.PublishedRow("", {})}, note="")
    assert len(published.remarks(plain, "x")) == 1


def test_a_published_mean_stands_beside_ours_where_all_its_cards_were_scored_whole() -> None:
    """By the ablations' table: COCO, OKVQA, A-OKVQA and TextCaps as one number, CIDEr times 100 as the rest."""
    paper = published.load("paper")
    ours = {
        "coco_caption": result(metric="cider", score=1.4), "textcaps": result(metric="cider", score=1.2),
        "okvqa": result(metric="vqa_accuracy", score=0.5, split="val2014", recipe="okv"),
        "aokvqa": result(metric="vqa_accuracy", score=0.6, split="val"),
    }  # fmt: skip
    [table], _ = published.compared(ours, paper, "vicuna7b_no_balancing")
    [cells] = zip(*(column.cells for column in table.columns))
    assert cells[:6] == ("held_in", "mean", "92.5", "98.8*", "-6.3", "50,312")
    assert cells[7:] == ("mean over coco_caption, okvqa, aokvqa, textcaps", "abc, okv, abc, abc")
    changes = ({"partial": True}, {"score": None}, {"published_size": 3}, {"split": "train2014"})
    spoiled = [{**ours, "okvqa": {**ours["okvqa"], **change}} for change in changes]
    for given in (*spoiled, {"gqa": result(published_size=None)}):
        tables, _ = published.compared(given, paper, "vicuna7b_no_balancing")
        assert "mean" not in [cell for table in tables for column in table.columns for cell in column.cells]
    means = {name: row.averages["held_in"] for name, row in paper.rows.items() if row.averages}
    assert means == {
        "flant5xl": 94.1, "flant5xl_no_instruction": 89.8, "flant5xl_no_balancing": 92.6,
        "vicuna7b": 100.8, "vicuna7b_no_instruction": 98.9, "vicuna7b_no_balancing": 98.8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        (
            "gqa",
            {"partial": True, "samples": 10},
            r"gqa: 10 of 12,578 samples were scored, and a part of a set does not",
        ),
        ("gqa", {"metric": "cider"}, "gqa: its metric is cider, and what is published is exact_match"),
        ("gqa", {"score": None}, "gqa: it has no score"),
        (
            "vsr",
            {"metric": "accuracy", "of": 616, "samples": 616, "published_size": 1222},
            "vsr: its files hold 616 records and the published split 1,222, so its score does not stand beside",
        ),
        ("textcaps", {}, "textcaps: nothing is published for it in the row 'vicuna7b'"),
    ],
)
def test_what_cannot_stand_beside_a_published_score_is_said(key: str, changes: dict[str, Any], message: str) -> None:
    tables, left_out = published.compared({key: result(**changes)}, published.load("paper"), "vicuna7b")
    assert not tables and message in left_out[0]


def test_scores_of_another_split_stand_apart_and_have_no_difference() -> None:
    ours = {
        "gqa": result(),
        "vizwiz": result(metric="vqa_accuracy", score=0.433, split="val"),
        "scienceqa:val": result(metric="accuracy", split="val"),
        "visdial:last_round": result(metric="retrieval", split="val_last_round"),
        "hatefulmemes:dev_unseen": result(metric="auroc", split="dev_unseen"),  # which of the two is not said
    }
    [beside, apart], said = published.compared(ours, published.load("paper"), "vicuna7b")
    assert list(beside.columns[0].cells) == ["gqa", "hatefulmemes:dev_unseen"]
    assert list(apart.columns[0].cells) == ["vizwiz", "scienceqa:val", "visdial:last_round"]
    assert set(apart.columns[4].cells) == {"another split"}
    assert "ours are of other splits, so there is no difference to give" in as_text(apart)
    assert said[0] == (
        "vizwiz: it was scored on val, and what is published is of test-dev, scored by a server: another split, so the "
        "two stand apart and without a difference."
    )
    assert [line.partition(":")[0] for line in said] == ["vizwiz", "scienceqa", "visdial"]


def test_combined_variants_stand_beside_what_is_published_for_one_of_them() -> None:
    ours = {"aokvqa:coco2014+multiple_choice": result(metric="accuracy", score=0.8, split="val")}
    [table], said = published.compared(ours, published.load("paper"), "vicuna7b_finetuned")
    assert "75.7" in as_text(table) and not said


def test_a_row_is_found_by_the_llm_or_by_its_name() -> None:
    paper = published.load("paper")
    assert [paper.row("", name) for name in ("google/flan-t5-xl", "/models/flan-t5-xxl/", "vicuna-13b-v1.1")] == [
        "flant5xl", "flant5xxl", "vicuna13b",
    ]  # fmt: skip
    assert paper.row("vicuna7b_no_balancing", "anything") == "vicuna7b_no_balancing"
    with pytest.raises(ConfigError, match=r"no row for the LLM 'gpt2'; name one, as in paper:flant5xl\. Known: "):
        paper.row("", "gpt2")
    with pytest.raises(ConfigError, match=r"unknown row of the published table 'paper' 'vicuna7'\. Did you mean"):
        paper.row("vicuna7", "")
    with pytest.raises(ConfigError, match=r"unknown published table 'papers'\. Did you mean 'paper'\?"):
        published.load("papers")


def test_published_tables_name_cards_and_metrics_that_there_are() -> None:
    from qformer.evaluate.metrics import METRICS

    for name in resources.names("configs/published"):
        table = published.load(name)
        assert len(table.source) > 20
        assert all(cards.load(key).eval for keys in table.averages.values() for key in keys)
        for key, of in table.sets.items():
            card = cards.load(key)
            section = card.eval
            assert section is not None and set(of.metrics) <= set(METRICS), key
            assert section.metric in of.metrics, key  # what the card gives can stand beside what is published
            known = {section.split, *(changes.get("eval", {}).get("split") for changes in card.variants.values())}
            assert set(of.splits) <= known, key
            assert (section.split in of.splits) == (key != "vizwiz"), key  # whose published split is a server's
    paper = published.load("paper")
    zero_shot = [paper.rows[name] for name in ("flant5xl", "flant5xxl", "vicuna7b", "vicuna13b")]
    held_out = set(cards.load_all(["held_out"], "eval"))
    assert all(set(row.scores) == held_out for row in zero_shot)
    assert sum(sum(row.scores.values()) for row in zero_shot) == pytest.approx(2920.9)  # not one digit has slipped


def test_a_published_table_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        'name: "m"\nversion: 1\ntitle: "t"\nsource: "s"\nsets: {}\nrows: {r: {title: "r", scores: {gqa: 1.0}}}\n'
    )
    with pytest.raises(ConfigError, match=r"mine\.yaml.*rows\.r names 'gqa', which `sets` or its scores do not"):
        published.load(str(file))
    file.write_text(file.read_text().replace("scores: {gqa: 1.0}", "scores: {}, averages: {all: 1.0}"))
    with pytest.raises(ConfigError, match=r"rows\.r has a mean 'all', and `averages` does not say over which cards"):
        published.load(str(file))


# -- prompts ----------------------------------------------------------------------------------------------------------


class Particular(Namer):
    """Sees as well as it is asked: the second wording confuses it about every third picture, the last about all."""

    asked: list[str]

    def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
        plain = [Rendered(f"what colour {each.instruction}") for each in instructions]
        seen = super().look(samples, plain)
        worse = {"Q": 3, "Z": 1}
        return [
            "purple" if number % worse.get(rendered.instruction[0], 10**6) == 0 else colour
            for number, (rendered, colour) in enumerate(zip(instructions, seen, strict=True), start=len(self.batches))
        ]


def swept(root: Path, **options: Any) -> dict[str, dict[str, Any]]:
    (root / "words.yaml").write_text(
        'name: "words"\nversion: 1\nsource: "a test"\n'
        'templates: ["W {instruction}", "Q {instruction}", "Z {instruction}", "V {instruction}"]\n'
    )
    world(root, "answer: generate, metric: exact_match", **options.get("records", {}))
    card = root / "colours.yaml"
    card.write_text(card.read_text().replace("template: instruction", f"template: {root / 'words.yaml'}"))
    chosen = cards.load_all([str(card)], "eval")

    def one(given: Any, wordings: Any, directory: Path) -> dict[str, dict[str, Any]]:
        keep = {"quiet": True, "say": lambda line: None, "finish": False, "shuffled": False, "origin": {"adapter": 1}}
        keep |= options.get("given", {})
        return score(options.get("model") or Particular(), given, root, directory=directory, wordings=wordings, **keep)

    return sweep.sweep(chosen, one, root / "eval", options.get("processes", ALONE))


def test_a_sweep_scores_each_listed_prompt_and_names_best_median_and_worst(tmp_path: Path) -> None:
    content = swept(tmp_path)["colours"]
    scores = [each["score"] for each in content["prompts"]]
    assert scores[0] == scores[3] == 1.0 > scores[1] > scores[2] == 0.0
    assert [content[name] for name in ("best", "median", "worst")] == [0, 1, 2]
    assert len({each["recipe"] for each in content["prompts"]}) == 4
    assert json.loads((tmp_path / "eval" / "prompts" / "colours.json").read_text()) == content
    third = (tmp_path / "eval" / "prompts" / "2" / "colours.predictions.jsonl").read_text().splitlines()
    assert json.loads(third[0])["instruction"].startswith("Z what colour")
    assert not list((tmp_path / "eval").rglob(".unfinished"))
    [shown] = map(as_text, sweep.tables({"colours": content}))
    for words in ("own, best", "median", "worst", "W {instruction}", content["prompts"][2]["recipe"]):
        assert words in shown


def test_a_sweep_of_a_part_has_a_table_of_its_own(tmp_path: Path) -> None:
    whole = swept(tmp_path)["colours"]
    part = swept(tmp_path, given={"limit": 9})["colours"]
    one, other = map(as_text, sweep.tables({"one": part, "other": whole}))
    assert "other" in one and "partial" not in one
    assert "Prompts, on parts of sets (" in other and "9 of 60, partial" in other and "│ other" not in other


def test_a_sweep_that_leaves_broken_records_out_keeps_no_answers_on_any_machine(tmp_path: Path) -> None:
    records = {"_3": {"image": "broken.png"}}
    content = swept(tmp_path, records=records, given={"on_error": "skip"})["colours"]
    assert content["partial"] and [each["samples"] for each in content["prompts"]] == [59] * 4
    assert not list((tmp_path / "eval").rglob(".unfinished"))
    assert (tmp_path / "eval" / "prompts" / "colours.partial.json").exists()

    class Second(Processes):
        """Of two machines the second, on whose disk something was kept too."""

        first = False

    left = tmp_path / "eval" / "prompts" / "0" / ".unfinished" / "colours-0a" / "1.jsonl"
    left.parent.mkdir(parents=True)
    swept(tmp_path, records=records, given={"on_error": "skip"}, processes=Second())
    assert not left.parent.exists()


def test_the_report_has_the_prompts(tmp_path: Path) -> None:
    from qformer.report import write_report

    content = swept(tmp_path)["colours"]
    scored(tmp_path, "eval", 3)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>Prompts</h2>" in page and "W {instruction}" in page and content["prompts"][1]["recipe"] in page


def test_a_sweep_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    class Stopped(Particular):
        left = 5

        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            Stopped.left -= 1
            if Stopped.left < 0:
                raise KeyboardInterrupt
            return super().look(samples, instructions)

    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, model=Stopped())
    model = Particular()
    swept(tmp_path, model=model)
    assert len(model.batches) == 4 * 2 - 5


def test_a_card_with_one_prompt_cannot_be_swept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'colours': its template 'instruction' lists one prompt alone, so there is"):
        sweep.check(world(tmp_path))
    [said] = sweep.check({**world(tmp_path), "gqa": cards.load("gqa")})
    assert said.startswith("the card 'colours': its template 'instruction' lists one prompt alone")
    assert sweep.check({"gqa": cards.load("gqa")}) == []


def test_a_sweep_says_what_a_person_should_know_of_each_score(tmp_path: Path) -> None:
    said: list[str] = []
    records = {"_3": {"image": "broken.png"}}
    swept(tmp_path, records=records, given={"on_error": "skip", "say": said.append})
    told = [line for line in said if line.startswith("colours: 1 broken records left out (numbers 4);")]
    assert len(told) == 4 and "prompts/2/colours.partial.broken.jsonl" in told[2]
    assert not [line for line in said if "Scores" in line]  # of which the sweep has a table of its own


def test_a_sweep_without_a_score_names_none() -> None:
    found = [{"prompt": "p", "score": None, "metric": "auroc", "title": "t", "samples": 1, "of": 1, "partial": False}]
    assert sweep._summary(found)["best"] is None


# -- habits of the original code --------------------------------------------------------------------------------------


def lavis(name: str, encoder_decoder: bool = True) -> cards.TaskCard:
    return habits.with_habits(cards.load(name), habits.load("lavis"), encoder_decoder=encoder_decoder)


@pytest.mark.parametrize(("encoder_decoder", "length", "most"), [(True, -1.0, 10), (False, 0.0, 9)])
def test_short_answers_are_decoded_as_lavis_does(encoder_decoder: bool, length: float, most: int) -> None:
    card = lavis("gqa", encoder_decoder)
    assert card.key == "gqa:as_lavis" and card.eval is not None
    assert card.eval.decoding == Decoding(
        max_new_tokens=most, min_new_tokens=0, num_beams=5, length_penalty=length, repetition_penalty=1.5
    )
    assert card.eval.template == "short_answer"  # it has no run file for GQA
    video = lavis("msvd_qa:generated", encoder_decoder)
    assert video.key == "msvd_qa:generated+as_lavis" and video.eval is not None
    assert load_templates(video.eval.template).templates == ["Question: {question} Short Answer:"]
    assert video.eval.decoding.max_new_tokens == most + 20
    bare = lavis("okvqa", encoder_decoder).eval
    assert bare is not None and load_templates(bare.template).templates == ["{question}"]


def test_captions_are_decoded_as_lavis_does() -> None:
    for encoder_decoder, most in ((True, 80), (False, 79)):
        section = lavis("nocaps", encoder_decoder).eval
        assert section is not None and load_templates(section.template).templates == ["A short image caption."]
        assert (section.decoding.max_new_tokens, section.decoding.min_new_tokens) == (most, 9)
        assert (section.decoding.num_beams, section.decoding.repetition_penalty) == (5, 1.15)
        assert section.decoding.length_penalty == 1.0


def test_candidates_are_ranked_as_lavis_does() -> None:
    """Sums; T5 with its end mark, Vicuna without; the context as its code writes it, empty or not."""
    t5, vicuna = lavis("scienceqa").eval, lavis("scienceqa:hint_and_lecture", False)
    assert t5 is not None and (t5.normalize, t5.end, t5.preface) == ("sum", True, ["context: {context}."])
    assert vicuna.key == "scienceqa:hint_and_lecture+as_lavis" and vicuna.eval is not None
    assert (vicuna.eval.normalize, vicuna.eval.end, vicuna.eval.preface) == ("sum", False, [])
    dialogue = lavis("visdial:caption").eval
    assert dialogue is not None and dialogue.template == "short_answer"
    fields = {"question": "Is it sunny?", "history": "Question: Who? Answer: A dog.", "caption": "a dog"}
    sample = Sample("1", "visdial", (), fields)
    assert render_eval(dialogue, load_templates(dialogue.template), sample).instruction == (
        'This image has the caption "a dog". dialog history: Question: Who? Answer: A dog.\n'
        "Question: Is it sunny? Short answer:"
    )
    asked = load_templates(vicuna.eval.template).templates[0]
    assert asked.format(context="", question="Q?", options="(a) x").startswith("context: . Question: Q? Options: ")


def test_what_lavis_would_not_rank_is_said() -> None:
    names = ["msvd_qa", "msvd_qa:generated", "msrvtt_qa:top_4000", "scienceqa"]
    ranked = [cards.load(f"scienceqa{variant}") for variant in ("", ":mean_per_token")]
    assert habits.overruled(ranked, habits.load("lavis"), encoder_decoder=False) == [
        "scienceqa:mean_per_token: its candidates are ranked by 'sum', as lavis does, and not by 'mean'; leave one of "
        "the two out."
    ]
    assert habits.unlike(map(lavis, names), habits.load("lavis")) == [
        "msvd_qa:as_lavis: its candidates are ranked, where lavis lets the model write; msvd_qa:generated does so.",
        "msrvtt_qa:top_4000+as_lavis: its candidates are ranked, where lavis lets the model write; "
        "msrvtt_qa:generated does so.",
    ]
    assert all(f"{name}:generated" == cards.load(f"{name}:generated").key for name in habits.load("lavis").writes)


@pytest.mark.parametrize("name", resources.names("tasks"))
@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_every_card_can_be_asked_so(name: str, encoder_decoder: bool) -> None:
    card = cards.load(name)
    if card.eval is not None:
        made = habits.with_habits(card, habits.load("lavis"), encoder_decoder=encoder_decoder)
        assert made.eval is not None and load_templates(made.eval.template).templates


def test_habits_name_templates_and_cards_that_there_are() -> None:
    for name in resources.names("configs/decoding"):
        sections = [card.eval for card in map(cards.load, resources.names("tasks")) if card.eval]
        for rule in habits.load(name).rules:
            assert rule.template in [section.template for section in sections]
            assert all(cards.load(card).eval is not None for card in rule.cards)
            assert rule.behind is None or any(rule.behind in section.preface for section in sections)
        assert set(habits.load(name).prefaces) <= {piece for section in sections for piece in section.preface}


def test_habits_for_one_kind_of_llm_alone_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('name: "m"\nversion: 1\nsource: "s"\npresets: {decoder_only: "lavis_vicuna"}\ncaptions: {}\n')
    with pytest.raises(ConfigError, match=r"presets and captions are for decoder_only; they take encoder_decoder and"):
        habits.load(str(file))
    with pytest.raises(ConfigError, match=r"unknown way of decoding 'laviz'\. Did you mean 'lavis'\?"):
        habits.load("laviz")
    strange = dataclasses.replace(habits.load("lavis"), presets={"encoder_decoder": "lavis", "decoder_only": "lavis"})
    with pytest.raises(ConfigError, match="the preset 'lavis' does not say how answers are decoded"):
        habits.with_habits(cards.load("gqa"), strange, encoder_decoder=True)


# -- where a number is from, and the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, cards, and a run of seed 5 with an adapter of step 3 in `run/checkpoints`, built and not trained."""
    from qformer import loading
    from tests import world as whole

    root = tmp_path_factory.mktemp("place")
    card = whole.write_pictures(root, count=6)
    said = "{answer: generate, metric: exact_match, decoding: {max_new_tokens: 2}}"
    card.write_text(f"{card.read_text()}variants: {{said: {{eval: {said}}}}}\n")
    settings = whole.settings(root / "towers", root, root / "run", "seed=5")
    model = loading.build(settings, report=str)
    model.save(root / "run" / "checkpoints" / "step-3")
    (root / "run" / "config.yaml").write_text("seed: 5\n")
    return root


def test_a_score_names_its_checkpoint_its_step_its_seed_and_its_towers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, out = str(place / "colours.yaml"), place / "scores"
    given = ["--tasks", card, "--data", str(place), "--device", "cpu", "--output", str(out), "--no-shuffled"]
    assert cli.main(["eval", str(place / "run"), *given]) == 0
    one = json.loads((out / "colours.json").read_text())
    assert one["seed"] == 5  # of the run
    model = one["model"]
    assert model["checkpoint"] == str(place / "run" / "checkpoints" / "step-3") and model["step"] == 3
    assert model["vision"]["name"].endswith("vision") and model["language"]["name"].endswith("llama")
    assert all(
        len(each) == 16 for each in (model["adapter"], *(model[t]["fingerprint"] for t in ("vision", "language")))
    )
    assert cli.main(["eval", str(place / "run"), *given, "--seed", "9", "--limit", "4"]) == 0
    assert json.loads((out / "colours.partial.json").read_text())["seed"] == 9
    capsys.readouterr()


def test_fingerprints_tell_adapters_and_towers_apart(place: Path) -> None:
    from qformer import loading
    from qformer import origin as traces

    model = loading.load(place / "run", report=str)
    before = traces.origin(model, step=7)
    assert (before["source"], before["checkpoint"], before["step"]) == (None, None, 7)
    assert (before["qformer"]["instruction_limit"], before["max_pixels"]) == (128, 100_000_000)
    assert before == traces.origin(loading.load(place / "run" / "checkpoints" / "step-3", report=str), step=7)
    model.connector.projection.bias.data[0] += 1e-3
    after = traces.origin(model, step=7)
    assert after["adapter"] != before["adapter"]
    assert (after["vision"], after["language"]) == (before["vision"], before["language"])
    next(iter(model.vision.parameters())).data += 1e-3
    assert traces.origin(model)["vision"]["fingerprint"] != before["vision"]["fingerprint"]
    best = place / "best"
    best.mkdir(exist_ok=True)
    assert traces.step_of(best) is None
    (best / "validation.json").write_text('{"step": 40}')
    assert traces.step_of(best) == 40


def test_the_command_line_sweeps_decodes_and_compares(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "run", place / "again", dirs_exist_ok=True)
    common = ["--data", str(place), "--device", "cpu", "--no-shuffled"]
    task = str(place / "colours.yaml")
    for run in ("run", "again"):
        assert cli.main(["eval", str(place / run), "--tasks", f"{task}:said", *common]) == 0
    assert cli.main(["eval", str(place / "run"), "--tasks", f"{task}:said", *common, "--decoding", "lavis"]) == 0
    asked = json.loads((place / "run" / "eval" / "colours.said+as_lavis.json").read_text())["recipe_settings"][
        "decoding"
    ]
    assert (asked["num_beams"], asked["repetition_penalty"], asked["max_new_tokens"]) == (5, 1.5, 9)
    assert cli.main(["eval", str(place / "run"), str(place / "again"), "--output", str(place / "compared")]) == 0
    said = capsys.readouterr().out
    assert "in no recipe" not in said  # they are alike
    assert "B − A" in said and "scored in one of the two alone; left out" in said
    written = json.loads((place / "compared" / "comparison.json").read_text())
    assert written["tasks"]["colours.said"]["difference"] == 0.0
    assert cli.main(["eval", str(place / "run"), "--tasks", task, *common, "--against", "paper:flant5xl"]) == 0
    said = capsys.readouterr().out
    assert "colours: nothing is published for it in the row 'flant5xl'" in said and "arXiv 2305.06500" in said
    words = place / "words.yaml"
    words.write_text('name: "w"\nversion: 1\nsource: "s"\ntemplates: ["{instruction}", "Q: {instruction}"]\n')
    card = place / "swept.yaml"
    card.write_text((place / "colours.yaml").read_text().replace("template: instruction,\n  answer: rank",
                    f"template: {words},\n  answer: rank").replace("name: colours", "name: swept"))  # fmt: skip
    assert cli.main(["eval", str(place / "run"), "--tasks", str(card), *common, "--prompt-sweep"]) == 0
    said = capsys.readouterr().out
    assert "Q: {instruction}" in said and "best" in said
    asked = ["eval", str(place / "run"), "--tasks", f"{card},{task}", *common, "--prompt-sweep"]
    assert cli.main(asked) == 0
    assert "the card 'colours': its template 'instruction' lists one prompt alone" in capsys.readouterr().out
    rules = place / "rules.yaml"
    rules.write_text((resources.find("configs/decoding", "lavis", "file")).read_text().replace("rules:", "rules:\n"
                     f'  - {{template: "{words}", asks: "instruction"}}', 1))  # fmt: skip
    assert cli.main([*asked[:3], str(card), *asked[4:], "--decoding", str(rules)]) == 2
    assert "'swept:as_lavis': its template 'instruction' lists one prompt alone" in capsys.readouterr().err
    assert (place / "run" / "eval" / "prompts" / "swept.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "--tasks", "gqa"], 2, "--data is missing; name the folder that the cards' paths start from"),
        (["run", "--data", "."], 2, "no task to score; name cards"),
        (["run", "b", "c"], 2, "3 runs are named; it scores one, or compares two"),
        (["run", "b", "--data", "."], 2, "two runs are compared by the scores they have; score each alone"),
        (["run", "nowhere"], 1, "holds no scores; run qformer eval on it first"),
        (["run", "--tasks", "gqa", "--data", ".", "--decoding", "lavi"], 2, "unknown way of decoding 'lavi'"),
        (["run", "--tasks", "gqa", "--data", ".", "--prompt-sweep", "--against", "paper"], 2, "gives many scores of a"),
        (["run", "--tasks", "gqa", "--data", ".", "--against", "papr"], 2, "unknown published table 'papr'"),
        (["run", "--tasks", "gqa", "--data", ".", "--against", "paper:flan"], 2, "unknown row of the published table"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("qformer.evaluate.run.check", lambda *_: None)
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "x.json").write_text('{"task": "x"}')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *words]) == code
    said = capsys.readouterr().err
    assert message in said and said.startswith("qformer: ") and said.count("\n") == 1


@pytest.mark.parametrize("source", ["Salesforce/instructblip-vicuna-7b", "x.pth", "published"])
def test_scores_of_a_published_model_want_a_place_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """A folder of scores under a hub id would be taken for an adapter by the next call."""
    monkeypatch.setattr("qformer.evaluate.run.check", lambda *_: None)
    monkeypatch.setattr("qformer.loading.load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").touch()
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["eval", source, "--tasks", "gqa", "--data", "."]) == 2
    said = capsys.readouterr().err
    assert f"{source}: no adapter there" in said and "--output where the scores of a published model go" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_evaluation_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qformer.run.score", stopped)
    assert cli.main(["eval", "run", "--tasks", "gqa", "--data", "."]) == 130
    assert "the answers given so far are kept, the same command goes on from them" in capsys.readouterr().err
