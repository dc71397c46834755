"""The page about a run: complete, self-contained, and safe to show whatever a data set or a model says."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from qformer import charts, config, gallery
from qformer.config import DataConfig, LanguageConfig, QFormerConfig, RunConfig, TrainConfig, VisionConfig
from qformer.errors import DataError
from qformer.report import write_report

HOSTILE = """<script>alert("x")</script><img src=http://x.example/y.png>&'"""
VOID = {"meta", "img", "br", "link", "input", "hr"}
SETTINGS = RunConfig(
    name="small",
    seed=7,
    vision=VisionConfig(name="vit_tiny"),
    language=LanguageConfig(name="some/llm", revision="abc"),
    qformer=QFormerConfig(init="bert-tiny", queries=4),
    train=TrainConfig(steps=40, batch_size=8),
)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on a tag that is not closed in turn."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + " "


def score_file(task: str = "gqa", **changes: object) -> dict[str, object]:
    baseline = {"score": 0.4, "interval": [0.35, 0.45]}
    return {
        "task": task,
        "title": task.upper(),
        "metric": "exact_match",
        "split": "testdev",
        "score": 0.625,
        "interval": [0.57, 0.68],
        "shuffled": baseline,
        "most_frequent": {"score": 0.333, "interval": [0.3, 0.36]},
        "samples": 80,
        "of": 80,
        "chance": None,
        "broken": 0,
        "recipe": "r3c1pe",
        "by_type": {},
    } | changes


def prediction(number: int, **changes: object) -> dict[str, object]:
    return {
        "id": f"gqa:{number}",
        "images": [f"{number % 3}.png"],
        "instruction": f"What is number {number}?",
        "prediction": "red",
        "references": ["red" if number % 2 else "blue"],
        "score": float(number % 2),
    } | changes


def write_scores(run: Path, score: dict[str, object], predictions: list[dict[str, object]]) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{score['task']}.json").write_text(json.dumps(score), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in predictions)
    (run / "eval" / f"{score['task']}.predictions.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as training and evaluation leave it."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 20, 20)).save(data / f"{number}.png")
    run = tmp_path / "run"
    run.mkdir()
    tasks = {"vqav2": 1.0, "coco_caption": 0.5}
    config.save(dataclasses.replace(SETTINGS, data=DataConfig(root=str(data), tasks=tasks)), run / "config.yaml")
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(2, 41, 2):
            values = {"step": step, "loss": 3 / step, "gradient_norm": 1.0, "learning_rate": 1e-4}
            if step % 10 == 0:
                values |= {"gap": 0.01 * step, "cosine": 0.3, "entropy": 0.8}
            file.write(json.dumps(values) + "\n")
    mixture = {
        "vqav2": {"asked": 0.75, "drawn": 241, "records": 100, "passes": 2.41},
        "coco_caption": {"asked": 0.25, "drawn": 79, "records": 50, "passes": 1.58},
    }
    (run / "mixture.json").write_text(json.dumps(mixture), encoding="utf-8")
    write_scores(run, score_file(), [prediction(number) for number in range(80)])
    return run


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_says_what_was_run_and_what_came_out(run: Path) -> None:
    words = page(run).words
    for said in ("small", "vit_tiny", "some/llm, revision abc", "4 queries, started from bert-tiny", "vqav2"):
        assert said in words
    for said in ("62.5 %", "57.0 to 68.0 %", "40.0 %", "33.3 %", "75.00 %", "241 samples", "2.41", "r3c1pe"):
        assert said in words
    for title in ("What was run", "Scores", "Curves", "Image-shuffle gap", "Query cosine", "Mixture", "Answers"):
        assert title in words
    assert "40 right · 40 wrong" in words
    assert "partial" not in words


def test_the_gallery_shows_right_and_wrong_answers_with_their_pictures(run: Path) -> None:
    seen = page(run)
    figures = [attributes["class"] for tag, attributes in seen.tags if tag == "figure"]
    assert figures.count("right") == figures.count("wrong") == gallery.EXAMPLES
    pictures = [attributes["src"] or "" for tag, attributes in seen.tags if tag == "img"]
    assert len(pictures) == 2 * gallery.EXAMPLES
    assert all(source.startswith("data:image/png;base64,") for source in pictures)


def test_no_request_leaves_the_page(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    seen = Page(source)
    assert not {tag for tag, _ in seen.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for _, attributes in seen.tags:
        for name in ("src", "href", "srcset", "data", "action", "xlink:href", "style"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in source
    assert "@import" not in source
    assert "http-equiv" in source
    assert "default-src 'none'" in source


def test_nothing_that_data_or_model_say_becomes_markup(run: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, name=HOSTILE, language=LanguageConfig(name=HOSTILE), data=DataConfig(tasks={HOSTILE: 1.0})
    )
    config.save(settings, run / "config.yaml")
    entry = {"asked": 1.0, "drawn": 1, "records": 1, "passes": 1.0}
    (run / "mixture.json").write_text(json.dumps({HOSTILE: entry}), encoding="utf-8")
    hostile = {"instruction": HOSTILE, "prediction": HOSTILE, "references": [HOSTILE], "images": [HOSTILE]}
    score = score_file(title=HOSTILE, metric=HOSTILE, split=HOSTILE, recipe=HOSTILE)
    write_scores(run, score, [prediction(number, **hostile) for number in range(4)])
    seen = page(run)
    assert seen.words.count("<script>") >= 10
    assert not {tag for tag, _ in seen.tags} & {"script"}
    assert not [attributes for tag, attributes in seen.tags if tag == "img"]


def test_a_score_on_a_part_of_a_set_is_marked(run: Path) -> None:
    write_scores(run, score_file("vsr", samples=40, of=600), [])
    words = page(run).words
    assert "partial" in words
    assert "of 600" in words
    assert "1 of 2 here" in words


def test_parts_stand_apart_from_whole_sets(run: Path) -> None:
    write_scores(run, score_file("vsr", samples=40, of=600, title="A part"), [])
    source = write_report(run).read_text(encoding="utf-8")
    whole, parts = source.split("<h2>Scores on parts of sets</h2>")
    assert "A part" in parts.split("<h2>")[0] and "A part" not in whole.split("<h2>Scores</h2>")[1]


def test_held_in_sets_stand_apart_from_zero_shot_scores(run: Path) -> None:
    write_scores(run, score_file("vqav2", role="held_in", title="Known"), [])
    write_scores(run, score_file("okvqa", role="held_in", title="Known in part", samples=40, of=600), [])
    sections = dict(part.split("</h2>", 1) for part in write_report(run).read_text().split("<h2>")[1:])
    whole, known, parts = (f"Scores on {kind} sets" for kind in ("held-out", "held-in", "parts of held-in"))
    assert [title for title in sections if title.startswith("Scores")] == [whole, known, parts]
    assert "GQA" in sections[whole] and "zero-shot." in sections[whole] and "Known" not in sections[whole]
    assert "Known" in sections[known] and "not zero-shot" in sections[known] and "GQA" not in sections[known]
    assert "Known in part" in sections[parts]


def test_a_held_out_set_that_was_tuned_on_is_no_zero_shot(run: Path) -> None:
    write_scores(run, score_file("scienceqa:no_context", role="held_out", title="Tuned on"), [])
    mixture = json.loads((run / "mixture.json").read_text())
    entry = next(iter(mixture.values()))
    (run / "mixture.json").write_text(json.dumps({**mixture, "scienceqa": entry}))
    known = write_report(run).read_text().split("<h2>Scores on held-in sets</h2>")[1].split("<h2>")[0]
    assert "Tuned on" in known and "GQA" not in known


def test_a_set_that_a_server_scores_has_a_row_and_its_file_is_no_score(run: Path) -> None:
    score = score_file("vizwiz", metric="submission", score=None, interval=[None, None], shuffled=None,
                       most_frequent=None, title="Served")  # fmt: skip
    write_scores(run, score, [prediction(number, score=None) for number in range(3)])
    (run / "eval" / "vizwiz.submission.json").write_text("[]")
    assert "Served" in page(run).words


def test_further_numbers_and_the_step_stand_beside_a_score(run: Path) -> None:
    beside = {"BLEU-4": 0.251, "mean rank": 15.5, "accuracy of no": None}
    write_scores(run, score_file("nocaps", metric="cider", beside=beside, model={"step": 1200}), [])
    words = page(run).words
    assert "Further numbers" in words and "25.1" in words and "15.50" in words and "step 1,200" in words


def test_truths_that_no_candidate_is_are_told(run: Path) -> None:
    write_scores(run, score_file("msvd_qa", metric="accuracy", unreachable=0.0625), [])
    assert "6.2 % of truths no candidate" in page(run).words
    write_scores(run, score_file("msvd_qa", metric="accuracy", unreachable=0.0), [])
    assert "of truths no candidate" not in page(run).words


def test_captions_are_shown_as_best_and_worst(run: Path) -> None:
    score = score_file("nocaps", metric="cider", score=1.3, interval=[1.2, 1.4], shuffled=None, most_frequent=None)
    write_scores(run, score, [prediction(number, score=number / 20) for number in range(40)])
    words = page(run).words
    assert "1.300" in words
    assert "1.200 to 1.400" in words
    assert "✓ best tenth" in words
    assert "✗ worst tenth" in words


def test_scores_by_question_type_are_listed(run: Path) -> None:
    types = {"colour": {"score": 0.75, "shuffled": 0.312, "samples": 60}, HOSTILE: {"score": None, "samples": 20}}
    write_scores(run, score_file(by_type=types), [])
    words = page(run).words
    assert "By question type" in words
    assert "75.0 %" in words and "31.2 %" in words
    assert HOSTILE in words


def test_pictures_are_looked_for_where_the_set_was_scored(run: Path) -> None:
    (run / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(run / "elsewhere" / "other.png")
    lines = [prediction(1, images=["other.png"])]
    write_scores(run, score_file(root=str(run / "elsewhere")), lines)
    assert gallery.NO_PICTURE not in write_report(run).read_text(encoding="utf-8")
    write_scores(run, score_file(), lines)  # of an older version, which did not say where
    assert gallery.NO_PICTURE in write_report(run).read_text(encoding="utf-8")


def test_a_picture_that_is_gone_leaves_a_note(run: Path) -> None:
    write_scores(run, score_file(), [prediction(1, images=["gone.png"])])
    assert gallery.NO_PICTURE in write_report(run).read_text(encoding="utf-8")


def test_a_run_that_was_not_scored_has_a_report_too(run: Path) -> None:
    for file in (run / "eval").iterdir():
        file.unlink()
    (run / "mixture.json").unlink()
    words = page(run).words
    assert "Curves" in words
    for title in ("Scores", "Mixture", "Answers"):
        assert title not in words


def test_scores_without_a_run_have_a_report_too(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "mixture.json"):
        (run / name).unlink()
    words = page(run).words
    assert "Scores" in words
    assert "What was run" not in words


def test_writing_leaves_nothing_else_behind(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    assert write_report(run) == run / "report.html"
    write_report(run)
    assert {path.name for path in run.iterdir()} - before == {"report.html"}


def test_a_line_cut_off_by_a_kill_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 42, "lo')
    assert "40" in page(run).words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1\n{"step": 2}\n', r"metrics\.jsonl:1: not a JSON object"),
        ("mixture.json", "{", r"mixture\.json: cannot be read as JSON"),
        ("eval/gqa.json", "[]", r"eval/gqa\.json: holds a list"),
    ],
)
def test_a_broken_file_is_named(run: Path, name: str, content: str, message: str) -> None:
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_score_file_of_another_kind_is_named(run: Path) -> None:
    (run / "eval" / "gqa.json").write_text('{"title": "GQA", "metric": "accuracy"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"gqa\.json: has no 'chance'; score the set again"):
        write_report(run)


def test_a_full_disk_is_told_and_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(run.iterdir())
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"report\.html: the report cannot be written .*No space left"):
        write_report(run)
    assert set(run.iterdir()) == before


def test_an_empty_directory_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no config\.yaml, metrics\.jsonl or eval"):
        write_report(tmp_path)


def test_large_pictures_become_small_jpegs() -> None:
    uri = gallery.data_uri(Image.effect_noise((2000, 1500), 60).convert("RGB"))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 60_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (1.2, 3.7), (0, 0.03), (1, 2000), (-3, 5), (0.93, 1.01)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low <= found[0]
    assert found[-1] <= high
    assert all(len(f"{tick:.10g}".strip("-0.").replace(".", "").rstrip("0")) <= 3 for tick in found)


def test_a_running_mean_of_a_constant_is_that_constant() -> None:
    assert [value for _, value in charts.smooth([(step, 2.0) for step in range(9)])] == pytest.approx([2.0] * 9)


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = charts.line_chart("x", [("main", [(1, 1.0), (2, float("nan")), (3, 2.0)])])
    assert "nan" not in drawn
    assert charts.line_chart("x", [("main", [(1, float("inf"))])]) == ""


def test_a_chart_of_one_value_or_a_level_line_is_drawn() -> None:
    assert "<circle" in charts.line_chart("x", [("main", [(5, 0.0)])])
    assert "<polyline" in charts.line_chart("x", [("main", [(1, 3.0), (2, 3.0)])], limit=3.0)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (1234.5, "1,234"), (0.625, "0.625"), (5e-5, "5.0e-5"), (float("inf"), "–")]
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert charts.number(value) == shown
