"""The thirteen held-out sets from the command line to the page, over the official layouts, by both kinds of LLM.

No card is changed, and some sets have more records than a batch of 32.  How the same questions are answered in batches
of one, by two processes, after an interruption, is compared with that table; over held-in cards too, and under
torchrun, in tests/test_spread.py.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qformer import cards, cli, loading
from qformer.cards import TaskCard
from qformer.errors import DataError
from qformer.evaluate import metrics
from qformer.evaluate.metrics import METRICS
from qformer.evaluate.tables import in_words
from qformer.processes import Processes
from qformer.train import loop
from tests import fixtures, world
from tests.test_spread import predictions, scored, together

BASELINES = ("shuffled", "most_frequent", "chance")


@functools.cache
def chosen() -> dict[str, TaskCard]:
    return cards.load_all(["held_out"], "eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    made = fixtures.root(folder)
    fixtures.fill(made)
    world.write_pictures(made, count=6)
    return made


FAMILIES = pytest.mark.parametrize("run", ["llama", "t5"], indirect=True)


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, folder: Path, root: Path) -> Path:
    """A run of one step."""
    changes = ("train.steps=1", "train.warmup_steps=0")
    settings = world.settings(folder / "towers", root, folder / request.param, *changes, family=request.param)
    return loop.train(settings, quiet=True, say=lambda _: None)


@pytest.fixture(scope="module")
def said(run: Path, root: Path) -> str:
    """What the command prints."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "DRAWS", 100)  # of an interval, which others test
        patch.setattr(cli, "_say", lambda line: lines.append(str(line)))
        given = ["--tasks", "held_out", "--data", str(root), "--device", "cpu"]
        assert cli.main(["eval", str(run), *given]) == 0
    return "\n".join(lines)


def score_file(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / f"{name}.json").read_text(encoding="utf-8"))
    return found


@FAMILIES
def test_held_out_is_thirteen_rows_with_metric_baselines_interval_and_recipe(run: Path, said: str) -> None:
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == list(chosen()) and len(rows) == 13
    for name, metric, *shown in rows:
        card, result = chosen()[name].eval, score_file(run, name)
        assert card is not None and metric == card.metric == result["metric"]
        percent = METRICS[metric].percent
        values = [result, *(result[baseline] for baseline in BASELINES)]
        assert shown == [
            *(in_words(value, percent) for value in values), str(result["samples"]), result["recipe"],
        ]  # fmt: skip
        assert all(re.fullmatch(r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+\)", each) for each in shown[:3]), name
        assert (shown[3] == "–") == (card.answer == "generate") and len(shown[-1]) >= 12
        assert result["samples"] == result["of"] and not result["partial"]
    assert {row[0]: row[-2] for row in rows if int(row[-2]) > 32} == {"gqa": "33", "vsr": "33"}


@FAMILIES
def test_the_report_has_the_same_thirteen_rows(run: Path, said: str) -> None:
    assert f"report: {run / 'report.html'}" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    table = page.partition("<h2>Scores</h2>")[2].partition("</table>")[0]
    rows = [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)) for row in table.split("<tr>")[2:]]
    assert len(rows) == 13
    for name in fixtures.HELD_OUT:
        result = score_file(run, name)
        [row] = [row for row in rows if result["recipe"] in row]
        assert result["title"] in row and result["metric"] in row and result["split"] in row
        percent = METRICS[result["metric"]].percent
        for value in (result, *(result[baseline] for baseline in BASELINES if result[baseline])):
            score, _, interval = in_words(value, percent).partition(" (")
            assert score in row and interval.rstrip(")") in row, (name, row)


@pytest.mark.parametrize("run", ["llama", pytest.param("t5", marks=pytest.mark.slow)], indirect=True)
def test_batches_of_one_two_processes_and_an_interruption_change_nothing(
    run: Path, root: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's batches were of up to thirty-two, asked by one process at once."""
    monkeypatch.setattr(metrics, "DRAWS", 100)
    models = [loading.load(run, report=lambda _: None) for _ in range(2)]
    for model in models:
        for name in ("answer", "rank_samples"):
            _after(model, name, 9)
    where = f"{run.name}-again"

    def asked(processes: Processes) -> dict[str, Any]:
        given = {"cards": chosen(), "batch_size": 1, "shuffled": False}
        return scored(root, models[processes.index], where, processes=processes, **given)

    results, failed = together(2, asked), 0
    while any(isinstance(each, Exception) for each in results) and failed < 5:
        results, failed = together(2, asked), failed + 1
    assert failed >= 2
    assert results[0] == results[1] and set(results[0]) == set(chosen())
    mine, theirs = predictions(root / where), predictions(run / "eval")
    assert set(mine) == set(theirs) and len(mine) == 13
    for name, lines in mine.items():
        for one, other in zip(lines, theirs[name], strict=True):
            near = other.pop("candidates", {})
            assert one.pop("candidates", {}) == pytest.approx(near, rel=1e-4), name
            other.pop("shuffled_prediction")
            assert {**one, "score": 0} == {**other, "score": 0}, name
            assert one["score"] == pytest.approx(other["score"], abs=1e-9), name


def _after(model: Any, name: str, calls: int) -> None:
    """Have a method fail once, after so many calls."""
    method, left = getattr(model, name), [calls]

    def failing(*given: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise DataError("the power is gone")
        return method(*given)

    setattr(model, name, failing)
