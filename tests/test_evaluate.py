"""Scoring from cards to files, with a model that looks at the pictures' names."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qformer import cards
from qformer.cards import Decoding, TaskCard
from qformer.data import records
from qformer.errors import ConfigError, DataError
from qformer.evaluate import run
from qformer.evaluate.outcome import Answer
from qformer.evaluate.predict import Question, predict, question
from qformer.evaluate.run import score
from qformer.evaluate.tables import as_text, table
from qformer.sample import Sample, Video
from qformer.text import Profile, Rendered, Templates, Truncations
from qformer.videos import frames
from tests.films import film

COLOURS = ("red", "green", "blue")
RANK = "answer: rank, metric: accuracy, question_type: kind"
AUROC = (
    'answer: rank, metric: auroc, candidates: ["red", "green", "blue"], '
    'metric_options: {positive: ["red"], negative: ["green", "blue"]}'
)


class Namer:
    """Reads the colour off a picture's file name; says nothing about pictures named `broken`."""

    def __init__(self, layout: Any = "plain") -> None:
        self.language = SimpleNamespace(profile=Profile(layout, opening=(), end=(2,), pad=0), truncations=Truncations())
        self.batches: list[int] = []
        self.decoding: Decoding | None = None

    def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
        self.batches.append(len(samples))
        for sample, rendered in zip(samples, instructions, strict=True):
            assert isinstance(sample.images[0], Path)
            if sample.images[0].stem.startswith("broken"):
                raise DataError(f"{sample.id}: '{sample.images[0]}' is truncated.")
            assert rendered.instruction.startswith("what colour")
        return [sample.images[0].stem.partition("-")[0] for sample in samples]

    def answer(self, samples: Sequence[Sample], instructions: Sequence[Rendered], decoding: Decoding) -> list[str]:
        self.decoding = decoding
        return self.look(samples, instructions)

    def rank_samples(
        self,
        samples: Sequence[Sample],
        instructions: Sequence[Rendered],
        candidates: Sequence[Sequence[str]],
        normalize: str,
        end: bool,
    ) -> list[list[float]]:
        seen = self.look(samples, instructions)
        return [[-1.0 if word == colour else -2.0 for word in words] for colour, words in zip(seen, candidates)]


def world(root: Path, section: str = RANK, count: int = 60, **changes: dict[str, Any]) -> dict[str, TaskCard]:
    """`count` records, two a picture, and the card that scores them; `changes` by record number, as `_3={...}`."""
    lines = []
    for number in range(count):
        colour = COLOURS[number // 2 % 3]
        record = {
            "id": f"r{number}",
            "image": f"pictures/{colour}-{number // 2}.png",
            "instruction": f"what colour is number {number}",
            "target": colour,
            "candidates": list(COLOURS),
            "kind": "even" if number % 2 == 0 else "odd",
        }
        lines.append(json.dumps(record | changes.get(f"_{number}", {})))
    (root / "records.jsonl").write_text("\n".join(lines) + "\n")
    (root / "colours.yaml").write_text(
        "name: colours\nversion: 1\ntitle: Colours\n"
        "eval: {reader: jsonl, files: {records: records.jsonl, images: .}, split: test, template: instruction,\n"
        f"  {section}}}\n"
    )
    return cards.load_all([str(root / "colours.yaml")], "eval")


def scores(root: Path, model: Any = None, section: str = RANK, **options: Any) -> dict[str, Any]:
    chosen = options.pop("cards", None) or world(root, section)
    given = {"directory": root / "eval", "quiet": True, "say": lambda line: None, **options}
    return score(model or Namer(), chosen, root, **given)["colours"]


def predictions(root: Path, name: str = "colours") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "eval" / f"{name}.predictions.jsonl").read_text().splitlines()]


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [RANK, "answer: generate, metric: exact_match, question_type: kind"])
def test_a_model_that_looks_is_right_and_falls_with_shuffled_pictures(tmp_path: Path, section: str) -> None:
    result = scores(tmp_path, section=section)
    assert (result["score"], result["interval"]) == (1.0, [1.0, 1.0])
    assert result["shuffled"]["score"] < 0.6
    assert result["most_frequent"]["score"] == pytest.approx(1 / 3)
    low, high = result["most_frequent"]["interval"]
    assert low < 1 / 3 < high < 0.6
    types = result["by_type"]
    assert list(types) == ["even", "odd"] and all(
        each["score"] == 1 and each["samples"] == 30 for each in types.values()
    )
    assert sum(each["shuffled"] for each in types.values()) / 2 == pytest.approx(result["shuffled"]["score"])
    assert (result["samples"], result["of"], result["pictures"], result["partial"]) == (60, 60, 30, False)
    assert {"qformer", "torch", "transformers", "numpy", "python"} <= set(result["libraries"])
    assert result["root"] == str(tmp_path)


def test_the_score_file_holds_what_is_returned(tmp_path: Path) -> None:
    result = scores(tmp_path)
    assert json.loads((tmp_path / "eval" / "colours.json").read_text()) == result
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["colours.json", "colours.predictions.jsonl"]


def test_predictions_say_what_was_asked_and_answered(tmp_path: Path) -> None:
    scores(tmp_path)
    lines = predictions(tmp_path)
    assert [line["id"] for line in lines] == [f"r{number}" for number in range(60)]
    shuffled = lines[5].pop("shuffled_prediction")
    assert shuffled in COLOURS
    assert lines[5] == {
        "id": "r5",
        "record": 5,
        "images": ["pictures/blue-2.png"],
        "instruction": "what colour is number 5",
        "prediction": "blue",
        "references": ["blue"],
        "score": 1.0,
        "type": "odd",
        "candidates": {"red": -2.0, "green": -2.0, "blue": -1.0},
    }


def test_chance_is_that_of_choosing_blindly(tmp_path: Path) -> None:
    assert scores(tmp_path)["chance"]["score"] == pytest.approx(1 / 3)
    assert scores(tmp_path, section="answer: generate, metric: exact_match")["chance"] is None
    labelled = "answer: rank, metric: accuracy, metric_options: {labels: {green: red}}"
    assert scores(tmp_path, section=labelled)["chance"]["score"] == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 1 / 3)


def test_candidates_of_the_card_are_the_same_for_all(tmp_path: Path) -> None:
    scores(tmp_path, section='answer: rank, metric: accuracy, candidates: ["blue", "red"]')
    lines = predictions(tmp_path)
    assert all(list(line["candidates"]) == ["blue", "red"] for line in lines)
    assert {line["prediction"] for line in lines if line["references"] == ["green"]} == {"blue"}  # the first of equals


def test_a_vocabulary_that_questions_share_is_looked_through_once() -> None:
    looked: list[str] = []

    class Word(str):
        def strip(self, *given: Any) -> str:
            looked.append(f"strip {self}")
            return super().strip(*given)

        def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
            looked.append(f"encode {self}")
            return super().encode(encoding, errors)

    given = cards.EvalCard("jsonl", {}, "instruction", "test", "rank", "accuracy")
    words = (Word("shared one"), Word("shared two"))
    for number in range(3):
        sample = Sample(str(number), "set", (), {"instruction": "q"}, references=("a",), candidates=words)
        assert records._encodable(sample) is sample
        question(given, Templates("t", 1, "", ["{instruction}"]), sample)
    assert sorted(looked) == [f"{what} {word}" for what in ("encode", "strip") for word in words]


def test_of_many_candidates_the_likeliest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores(tmp_path)
    monkeypatch.setattr("qformer.evaluate.predict.KEPT", 2)
    assert scores(tmp_path) == whole
    line = predictions(tmp_path)[5]
    assert (line["candidates"], line["ranked"]) == ({"red": -2.0, "blue": -1.0}, 3)
    scores(tmp_path, section=AUROC)  # needs them all
    assert len(predictions(tmp_path)[5]["candidates"]) == 3


def test_a_candidate_that_is_offered_twice_is_named_once_and_told() -> None:
    choices, sample = ("a", "a", "b"), Sample("s", "t", (Path("a.png"),), references=("b",))
    asked = run.Answered([0], [Question(sample, Rendered("q"), choices)], [Answer("a", choices, (-1.0, -1.0, -2.0))])
    [line] = run._lines(asked, [0.0], Path())
    assert (line["candidates"], line["ranked"]) == ({"a": -1.0, "b": -2.0}, 3)


def test_auroc_is_scored_beside_its_baselines(tmp_path: Path) -> None:
    result = scores(tmp_path, section=AUROC)
    assert (result["score"], result["most_frequent"]["score"], result["chance"]["score"]) == (1.0, 0.5, 0.5)
    assert result["beside"] == {"accuracy": 1.0, "accuracy of green": 1.0, "accuracy of red": 1.0}
    assert result["shuffled"]["score"] < 0.8


def test_decoding_comes_from_the_card(tmp_path: Path) -> None:
    model = Namer()
    scores(tmp_path, model, "answer: generate, metric: exact_match, decoding: {num_beams: 5}")
    assert model.decoding == Decoding(num_beams=5)


def test_batch_size_and_model_change_neither_result_nor_recipe(tmp_path: Path) -> None:
    one, other = Namer(), Namer()
    results = [scores(tmp_path, one, batch_size=7), scores(tmp_path, other, batch_size=60)]
    assert results[0] == results[1]
    assert one.batches == [7] * 8 + [4] + [7] * 8 + [4]
    assert other.batches == [60, 60]


def test_the_kind_of_profile_changes_the_recipe(tmp_path: Path) -> None:
    assert scores(tmp_path)["recipe"] != scores(tmp_path, Namer("chat"))["recipe"]


def test_without_the_shuffled_baseline_each_sample_is_asked_once(tmp_path: Path) -> None:
    model = Namer()
    result = scores(tmp_path, model, shuffled=False)
    assert result["shuffled"] is None
    assert all("shuffled" not in each for each in result["by_type"].values())
    assert sum(model.batches) == 60
    assert "shuffled_prediction" not in predictions(tmp_path)[0]


def test_a_variant_has_a_file_of_its_own(tmp_path: Path) -> None:
    world(tmp_path)
    card = tmp_path / "colours.yaml"
    card.write_text(card.read_text() + "variants: {strict: {eval: {answer: generate, metric: exact_match}}}\n")
    chosen = cards.load_all([f"{card}:strict"], "eval")
    given = score(Namer(), chosen, tmp_path, directory=tmp_path / "eval", quiet=True, say=lambda line: None)
    assert given["colours:strict"]["metric"] == "exact_match"
    assert (tmp_path / "eval" / "colours.strict.json").exists()


# -- a part of a set --------------------------------------------------------------------------------------------------


def test_a_part_is_marked_as_such(tmp_path: Path) -> None:
    result = scores(tmp_path, limit=10)
    assert (result["samples"], result["of"], result["partial"]) == (10, 60, True)
    assert result["recipe"] != scores(tmp_path)["recipe"]
    assert "10 of 60, partial" in as_text(table({"colours": result}))
    assert scores(tmp_path, limit=60)["partial"] is False


def test_a_part_never_takes_the_place_of_the_whole(tmp_path: Path) -> None:
    scores(tmp_path, limit=10)
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == [
        "colours.partial.json",
        "colours.partial.predictions.jsonl",
    ]
    whole = scores(tmp_path)
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == ["colours.json", "colours.predictions.jsonl"]
    scores(tmp_path, limit=10)
    assert json.loads((tmp_path / "eval" / "colours.json").read_text()) == whole


def test_what_was_cut_is_in_the_score_file_and_said(tmp_path: Path) -> None:
    class Cutting(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            self.language.truncations.instructions += 1
            return super().look(samples, instructions)

    said: list[str] = []
    assert scores(tmp_path, Cutting(), batch_size=20, say=said.append)["truncations"] == 3
    assert "colours: 3 text(s) were cut to their limits" in said[0]
    assert scores(tmp_path)["truncations"] == 0


@pytest.mark.parametrize("batch_size", [1, 4, 60])
def test_what_was_cut_is_counted_once_where_a_batch_is_asked_again(tmp_path: Path, batch_size: int) -> None:
    """A broken picture makes its batch fail after texts were cut, and be asked one by one."""

    class Cutting(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            self.language.truncations.instructions += sum(each.id in ("r1", "r4", "r9") for each in samples)
            return super().look(samples, instructions)

    chosen = world(tmp_path, count=12, _6={"image": "broken.png"}, _9={"image": "broken.png"})
    given = {"cards": chosen, "on_error": "skip", "batch_size": batch_size, "shuffled": False}
    assert scores(tmp_path, Cutting(), **given)["truncations"] == 2


def test_files_of_another_size_than_the_published_split_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    assert scores(tmp_path, section=f"{RANK}, size: 1222", say=said.append)["published_size"] == 1222
    told = "not of the published split's size, so to be put beside nothing published: colours (60 for 1,222)."
    assert told in said
    said.clear()
    scores(tmp_path, section=f"{RANK}, size: 60", say=said.append)
    assert not [line for line in said if "published" in line]


def test_a_part_is_a_function_of_seed_and_card() -> None:
    assert run.subset(100, 10, 0, "a") == run.subset(100, 10, 0, "a")
    assert run.subset(100, 10, 0, "a") != run.subset(100, 10, 1, "a") != run.subset(100, 10, 1, "b")
    assert set(run.subset(100, 10, 0, "a")) < set(run.subset(100, 20, 0, "a"))
    assert run.subset(5, None, 0, "a") == run.subset(5, 9, 0, "a") == list(range(5))


@pytest.mark.parametrize("option", ["limit", "batch_size"])
def test_a_part_of_nothing_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation: {option} is 0; it must be at least 1"):
        scores(tmp_path, **{option: 0})


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_shows_scores_beside_baselines(tmp_path: Path) -> None:
    said: list[str] = []
    result = scores(tmp_path, say=said.append)
    shown = said[-1]
    for words in ("colours", "100.0 (100.0 to 100.0)", "33.3 (", "chance", result["recipe"], "60"):
        assert words in shown
    lean = result | {"metric": "cider", "score": 0.9, "interval": [None, None], "chance": None, "shuffled": None}
    stream = io.StringIO()
    Console(file=stream, width=160).print(table({"captions": lean}))
    assert "0.900" in stream.getvalue()
    assert "–" in stream.getvalue()
    assert "chance" not in stream.getvalue()


def test_progress_is_shown_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores(tmp_path, quiet=False)
    assert "colours, pictures shuffled" in capsys.readouterr().out
    scores(tmp_path)
    assert capsys.readouterr().out == ""


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_broken_picture_ends_the_scoring(tmp_path: Path) -> None:
    chosen = world(tmp_path, _3={"image": "broken.png"})
    with pytest.raises(DataError, match=r"r3: '.*broken\.png' is truncated"):
        scores(tmp_path, cards=chosen)
    assert not (tmp_path / "eval").exists()


def test_broken_records_can_be_left_out(tmp_path: Path) -> None:
    chosen = world(tmp_path, _3={"image": "broken.png"}, _8={"target": ""}, _9={"candidates": []})
    said: list[str] = []
    result = scores(tmp_path, cards=chosen, on_error="skip", say=said.append)
    assert (result["score"], result["samples"], result["broken"], result["partial"]) == (1.0, 57, 3, True)
    lines = (tmp_path / "eval" / "colours.partial.broken.jsonl").read_text().splitlines()
    broken = [json.loads(line) for line in lines]
    assert [(each["record"], each["id"]) for each in broken] == [(4, "r3"), (9, None), (10, None)]
    assert "line 9: 'target' is empty" in broken[1]["error"]
    assert "neither the record nor the card gives candidates" in broken[2]["error"]
    assert "colours: 3 broken records left out (numbers 4, 9, 10);" in said[0]
    assert [line["record"] for line in predictions(tmp_path, "colours.partial")] == [
        n for n in range(60) if n not in (3, 8, 9)
    ]
    scores(tmp_path)  # none are left out this time
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == ["colours.json", "colours.predictions.jsonl"]


def test_what_broken_records_left_takes_the_place_of_no_whole_score(tmp_path: Path) -> None:
    whole = scores(tmp_path)
    chosen = world(tmp_path, _3={"image": "broken.png"})
    scores(tmp_path, cards=chosen, on_error="skip", origin={"adapter": "a"})
    assert json.loads((tmp_path / "eval" / "colours.json").read_text()) == whole
    assert json.loads((tmp_path / "eval" / "colours.partial.json").read_text())["samples"] == 59
    assert len(predictions(tmp_path)) == 60 and len(predictions(tmp_path, "colours.partial")) == 59
    assert not (tmp_path / "eval" / ".unfinished").exists()


def test_a_long_list_of_broken_records_is_cut(tmp_path: Path) -> None:
    chosen = world(tmp_path, **{f"_{number}": {"target": ""} for number in range(12)})
    said: list[str] = []
    scores(tmp_path, cards=chosen, on_error="skip", say=said.append)
    assert "numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …" in said[0]


def test_a_set_of_broken_records_cannot_be_scored(tmp_path: Path) -> None:
    chosen = world(tmp_path, count=2, _0={"target": ""}, _1={"target": ""})
    with pytest.raises(DataError, match=r"colours: all of the 2 records asked for are broken\..*'target' is empty"):
        scores(tmp_path, cards=chosen, on_error="skip")


def test_a_set_that_broken_records_leave_without_a_score_is_written_and_told(tmp_path: Path) -> None:
    """The only red picture is broken, and of the others AUROC has one class."""
    section = (
        'answer: rank, metric: auroc, candidates: ["red", "green", "blue"], '
        'metric_options: {positive: ["red"], negative: ["green", "blue"]}'
    )
    chosen = world(tmp_path, section, count=6, _0={"image": "broken.png"}, _1={"image": "broken.png"})
    said: list[str] = []
    result = scores(tmp_path, cards=chosen, on_error="skip", say=said.append)
    assert (result["score"], result["interval"], result["samples"]) == (None, [None, None], 4)
    assert "colours: the 4 samples that are left have no auroc; mend the broken records." in said
    assert len(predictions(tmp_path, "colours.partial")) == 4


def test_one_picture_that_is_left_has_no_shuffled_baseline(tmp_path: Path) -> None:
    chosen = world(tmp_path, count=4, _0={"image": "broken.png"}, _1={"image": "broken.png"})
    said: list[str] = []
    result = scores(tmp_path, cards=chosen, on_error="skip", say=said.append)
    assert (result["score"], result["samples"], result["shuffled"]) == (1.0, 2, None)
    assert "colours: all samples that are left are about one picture, so there is none to shuffle." in said


def test_a_picture_that_breaks_between_the_passes_ends_the_scoring(tmp_path: Path) -> None:
    class Forgetful(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            if sum(self.batches) >= 60:
                raise DataError("the picture is gone.")
            return super().look(samples, instructions)

    with pytest.raises(DataError, match="the picture is gone"):
        scores(tmp_path, Forgetful(), on_error="skip")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("answer: generate, metric: exact", r"unknown metric .* 'exact'\. Did you mean 'exact_match'\?"),
        ("answer: generate, metric: auroc", "needs the likelihoods of candidates"),
        ("answer: generate, metric: exact_match, decoding: {do_sample: true}", "do_sample is true, and a score of ans"),
        ("answer: generate, metric: exact_match, metric_options: {normalise: vqa}", "has no option 'normalise'"),
    ],
)
def test_a_card_that_cannot_be_scored_fails_before_anything_is_asked(
    tmp_path: Path, section: str, message: str
) -> None:
    model = Namer()
    with pytest.raises(ConfigError, match=message):
        scores(tmp_path, model, section)
    assert model.batches == []
    assert not (tmp_path / "eval").exists()


def test_a_subset_that_cannot_be_shuffled_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    model = Namer()
    with pytest.raises(DataError, match="all samples to score are about one picture"):
        scores(tmp_path, model, limit=1)
    assert model.batches == []
    assert scores(tmp_path, model, limit=1, shuffled=False)["samples"] == 1


@pytest.mark.parametrize(
    ("section", "target", "message"),
    [
        (
            AUROC,
            "red",
            r"colours: all 60 samples are of one class \(red\), and AUROC needs both; score more samples",
        ),
        (
            "answer: generate, metric: cider",
            " ?! ",
            r"colours, sample 'r0': none of its 1 reference captions holds a word, so there is nothing to compare",
        ),
    ],
)
def test_what_could_not_be_scored_is_refused_before_anything_is_asked(
    tmp_path: Path, section: str, target: str, message: str
) -> None:
    model = Namer()
    changes = {"target": target, "candidates": [target, "green"]}
    chosen = world(tmp_path, section, **{f"_{number}": changes for number in range(60)})
    with pytest.raises(DataError, match=message):
        scores(tmp_path, model, cards=chosen)
    assert model.batches == [] and not (tmp_path / "eval").exists()


def test_a_video_that_cannot_be_decoded_is_listed_beside_the_score(tmp_path: Path) -> None:
    """One of three is cut in the middle; the model looks at them as tuned ones do."""

    class Watcher(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            self.batches.append(len(samples))
            videos = [video for sample in samples for video in sample.images if isinstance(video, Video)]
            assert all(len(list(frames(each, 10**6, "colours"))) == 4 for each in videos)
            return ["red"] * len(videos)

    for number in range(3):
        film(tmp_path / "films" / f"{number}.mp4", 12)
    damaged = tmp_path / "films" / "1.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    changes = {f"_{number}": {"image": f"films/{number}.mp4", "target": "red"} for number in range(3)}
    chosen = world(tmp_path, count=3, **changes)
    with pytest.raises(DataError, match=r"the video .*1\.mp4"):
        scores(tmp_path, Watcher(), cards=chosen)
    result = scores(tmp_path, Watcher(), cards=chosen, on_error="skip")
    assert (result["samples"], result["broken"], result["partial"], result["score"]) == (2, 1, True, 1.0)
    [listed] = (tmp_path / "eval" / "colours.partial.broken.jsonl").read_text().splitlines()
    told = json.loads(listed)
    assert (told["record"], told["id"]) == (2, "r1")
    assert told["error"].startswith("colours: the video ") and "1.mp4" in told["error"]
    assert [line["id"] for line in predictions(tmp_path, "colours.partial")] == ["r0", "r2"]


def test_a_question_type_that_records_lack_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'r0': no field 'kinds' \(eval\.question_type of the card\)\. Did you mean"):
        scores(tmp_path, section="answer: generate, metric: exact_match, question_type: kinds")


def test_a_record_without_an_answer_cannot_be_scored() -> None:
    given = cards.EvalCard("jsonl", {}, "instruction", "test", "generate", "exact_match")
    with pytest.raises(DataError, match="set, sample '7': it has no answer to score against"):
        question(given, Templates("t", 1, "", ["{instruction}"]), Sample("7", "set", ()))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_likelihood_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    class Overflowing(Namer):
        def rank_samples(self, samples: Sequence[Sample], *given: Any) -> list[list[float]]:
            return [[-1.0, value, -1.0]] * len(samples)

    with pytest.raises(DataError, match=r"sample 'r0': the likelihood of 'green' is (nan|-inf); the model's weights"):
        scores(tmp_path, Overflowing())


def test_an_interruption_leaves_earlier_scores_whole(tmp_path: Path) -> None:
    before = scores(tmp_path)

    class Interrupted(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(tmp_path, Interrupted())
    assert json.loads((tmp_path / "eval" / "colours.json").read_text()) == before
    assert len(list((tmp_path / "eval").iterdir())) == 2


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scores(tmp_path)
    write = Path.write_text

    def full(path: Path, content: str, **options: Any) -> int:
        if path.parent.name == "eval" and path.name.startswith(".colours.partial.json"):
            write(path, content[:10], **options)
            raise OSError(28, "No space left on device")
        return write(path, content, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"eval: scores cannot be written \(.*No space left on device\); make room"):
        scores(tmp_path, limit=10)
    assert json.loads((tmp_path / "eval" / "colours.json").read_text()) == before
    assert len(predictions(tmp_path)) == 60
    assert len(list((tmp_path / "eval").iterdir())) == 2


# -- small parts ------------------------------------------------------------------------------------------------------


def test_pictures_are_named_from_the_data_root() -> None:
    root = Path("/data")
    assert run.picture_name(root / "a" / "b.png", root) == "a/b.png"
    assert run.picture_name(Path("/other/b.png"), root) == "/other/b.png"
    assert run.picture_name(Video(root / "c.mp4", (0, 1)), root) == "c.mp4"
    assert run.picture_name(b"bytes", root).startswith("sha256:")


def test_a_broken_question_costs_its_batch_no_other_answer(tmp_path: Path) -> None:
    chosen = world(tmp_path, count=6, _2={"image": "broken.png"})
    card = chosen["colours"].eval
    assert card is not None
    opened = run.open_records(card, tmp_path, chosen["colours"])
    questions = [question(card, run.load_templates("instruction"), opened[place]) for place in range(6)]
    done: list[int] = []
    answers = predict(Namer(), card, questions, batch_size=4, on_error="skip", advance=done.append)
    assert [isinstance(answer, DataError) for answer in answers] == [place == 2 for place in range(6)]
    assert done == [4, 2]


def test_a_library_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LIBRARIES", ("no-such-library", "numpy"))
    assert set(run._libraries()) == {"qformer", "python", "numpy"}


def test_what_decodes_videos_and_reads_mirrors_is_among_the_libraries() -> None:
    assert {"av", "datasets"} <= set(run.LIBRARIES)


# -- with what stands around it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [RANK, "answer: generate, metric: exact_match"])
def test_the_report_reads_what_scoring_writes(tmp_path: Path, section: str) -> None:
    from qformer.report import write_report

    result = scores(tmp_path, section=section, limit=10, shuffled=section == RANK)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Colours" in page
    assert result["recipe"] in page


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_whole_model_is_scored_alike_in_any_batch(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, family: str
) -> None:
    from qformer import loading
    from tests import world as whole

    card = whole.write_pictures(tmp_path / "data", count=12)
    chosen = cards.load_all([str(card)], "eval")
    towers = tmp_path_factory.getbasetemp() / "towers"
    model = loading.build(whole.settings(towers, tmp_path / "data", tmp_path / "run", family=family), report=str)
    found = []
    for size in (1, 5):
        directory = tmp_path / str(size)
        result = score(
            model, chosen, tmp_path / "data", directory=directory, batch_size=size, quiet=True, say=lambda line: None
        )
        lines = (directory / "colours.predictions.jsonl").read_text().splitlines()
        found.append((result["colours"]["recipe"], [json.loads(line) for line in lines]))
    (recipe, one), (again, other) = found
    assert recipe == again
    for mine, theirs in zip(one, other, strict=True):
        assert mine["prediction"] == theirs["prediction"]
        assert mine["candidates"] == pytest.approx(theirs["candidates"], rel=1e-4)
