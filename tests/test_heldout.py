"""The held-out sets over their fixtures: what is scored and how, what is written for a server, and bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qformer import cards, cli, config
from qformer.cards import Decoding, EvalCard, TaskCard, load
from qformer.data.readers import READERS, open_records
from qformer.data.records import Records
from qformer.data.videoqa import read_vocabulary
from qformer.errors import ConfigError, DataError
from qformer.evaluate import run, submission
from qformer.evaluate.metrics import METRICS, Answer, auroc
from qformer.results import Score
from qformer.sample import Sample, Video
from qformer.text import Profile, Rendered, Truncations
from qformer.videos import frames
from tests import fixtures
from tests.films import film

REGISTERED = [name for name in fixtures.HELD_OUT if load(name).eval.metric in METRICS]  # type: ignore[union-attr]
UNSCORED = ["vqav2:test_dev", "vqav2:test", "vizwiz:test_dev", "textvqa:test", "aokvqa:test"]


def section(name: str) -> EvalCard:
    found = load(name).eval
    assert found is not None
    return found


def read(root: Path, name: str) -> list[Sample]:
    return list(open_records(section(name), root, load(name)))


class Knower:
    """Says the reference that most people gave, or a word of its own, and ranks in that sense."""

    def __init__(self, word: str | None = None) -> None:
        self.language = SimpleNamespace(
            profile=Profile("plain", opening=(), end=(2,), pad=0), truncations=Truncations()
        )
        self.word = word

    def said(self, sample: Sample) -> str:
        return self.word or max(sample.references, key=sample.references.count)

    def answer(self, samples: Sequence[Sample], _: Sequence[Rendered], decoding: Decoding) -> list[str]:
        return [self.said(sample) for sample in samples]

    def rank_samples(
        self, samples: Sequence[Sample], _: Any, candidates: Sequence[Sequence[str]], normalize: str, end: bool
    ) -> list[list[float]]:
        return [
            [-1.0 if word == self.said(sample) else -2.0 - place for place, word in enumerate(words)]
            for sample, words in zip(samples, candidates, strict=True)
        ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.root(tmp_path_factory.mktemp("heldout"))


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A data root that may be changed."""
    return Path(shutil.copytree(root, tmp_path / "data"))


def scored(root: Path, folder: Path, name: str, word: str | None = None, card: TaskCard | None = None) -> Any:
    """The result and what was said."""
    lines: list[str] = []
    found = run.score(
        Knower(word), {name: card or load(name)}, root, directory=folder, shuffled=False, quiet=True, say=lines.append
    )
    return found[name], "\n".join(lines)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REGISTERED if section(name).metric not in ("cider", "auroc")])
def test_who_knows_the_answers_gets_all_that_can_be_got(root: Path, tmp_path: Path, name: str) -> None:
    result, _ = scored(root, tmp_path, name)
    samples = read(root, name)
    if section(name).metric == "vqa_accuracy":
        assert 0.9 <= result["score"] <= 1
    else:
        assert result["score"] == pytest.approx(1 - (result["unreachable"] or 0))
    assert result["samples"] == len(samples) and not result["partial"] and result["role"] == "held_out"
    assert (result["unreachable"] is None) == (section(name).answer == "generate")
    assert (tmp_path / f"{name}.submission.json").exists() == (section(name).submission is not None)


@pytest.mark.parametrize(
    ("name", "share"),
    [("msvd_qa", 1 / 3), ("msrvtt_qa", 1 / 3), ("msvd_qa:lavis", 0), ("iconqa", 0), ("vsr", 0)],
)
def test_truths_that_a_vocabulary_lacks_count_as_wrong_and_are_told(
    root: Path, tmp_path: Path, name: str, share: float
) -> None:
    result, said = scored(root, tmp_path, name)
    assert result["unreachable"] == pytest.approx(share)
    assert result["score"] == pytest.approx(1 - share)
    assert ("33.3 % of 3 truths are not among the candidates, and count as wrong." in said) == bool(share)


def test_the_variants_of_hateful_memes_score_in_different_ways(root: Path, tmp_path: Path) -> None:
    """By sums yes and true outweigh a single no; by the best word no wins."""
    samples = read(root, "hatefulmemes")
    words = tuple(section("hatefulmemes").candidates)
    likelihoods = [(-1.2, -1.2, -1.0, -9.0), (-5.0, -5.0, -1.0, -1.0), (-1.0, -9.0, -1.3, -1.3)]
    answers = [Answer(words[0], words, each) for each in likelihoods]

    def hits(name: str) -> list[float]:
        card = section(name)
        options = {"pool": "sum", **card.metric_options}
        return auroc(answers, samples, options).scores

    assert [sample.references for sample in samples] == [("yes",), ("no",), ("no",)]
    assert hits("hatefulmemes") == [1, 1, 1]
    assert hits("hatefulmemes:best") == [0, 1, 0]
    assert hits("hatefulmemes:yes_no") == [0, 1, 0]
    assert section("hatefulmemes:yes_no").candidates == ["yes", "no"]
    assert not section("hatefulmemes:no_end").end
    result, _ = scored(root, tmp_path, "hatefulmemes:choice", "true")
    assert (result["metric"], result["score"]) == ("accuracy", pytest.approx(1 / 3))
    assert [sample.references for sample in read(root, "hatefulmemes:dev_unseen")] == [("yes",), ("no",)]


def test_vsr_is_read_by_both_words_of_a_class_when_it_is_generated(root: Path, tmp_path: Path) -> None:
    assert scored(root, tmp_path, "vsr:generated", "Yes, it is.")[0]["score"] == 0.5
    assert scored(root, tmp_path, "vsr:generated", "false")[0]["score"] == 0.5


# -- test servers -----------------------------------------------------------------------------------------------------

NIGHT = "night time"
SUBMITTED: dict[str, Any] = {
    "vqav2:test_dev": [{"question_id": number, "answer": "a"} for number in (400000, 400001)],
    "vqav2:test": [{"question_id": number, "answer": "a"} for number in (401000, 400000, 400001)],
    "vizwiz": [{"image": f"VizWiz_val_{number:08d}.jpg", "answer": "a"} for number in range(3)],
    "vizwiz:test_dev": [{"image": f"VizWiz_test_{number:08d}.jpg", "answer": "a"} for number in range(2)],
    "textvqa": [{"question_id": number, "answer": "a"} for number in (34602, 34603)],
    "textvqa:test": [{"question_id": number, "answer": "a"} for number in (39602, 39603)],
    "ocrvqa": [
        {"image_id": "2222222222", "question": "Who wrote this book?", "answer": "a"},
        {"image_id": "2222222222", "question": "Is this a pharmaceutical book?", "answer": "a"},
        {"image_id": "3333333333", "question": "What is the title of this book?", "answer": "a"},
    ],
    "aokvqa": {key: {"direct_answer": "a"} for key in ("55valVAL0123456789ijkl", "77valVAL0123456789qrst")},
    "aokvqa:test": {key: {"direct_answer": "a"} for key in ("88testTEST0123456789uv", "99testTEST0123456789wx")},
    "aokvqa:test_multiple_choice": {
        "88testTEST0123456789uv": {"multiple_choice": "bread"},
        "99testTEST0123456789wx": {"multiple_choice": "baker"},
    },
}


@pytest.mark.parametrize("name", SUBMITTED)
def test_the_file_for_a_server_has_its_form(root: Path, tmp_path: Path, name: str) -> None:
    scored(root, tmp_path, name, "a")
    file = tmp_path / f"{name.replace(':', '.')}.submission.json"
    assert json.loads(file.read_text(encoding="utf-8")) == SUBMITTED[name]


def test_every_form_is_some_cards() -> None:
    assert set(submission.FORMS) == {section(name).submission for name in SUBMITTED}


@pytest.mark.parametrize("name", UNSCORED)
def test_a_set_whose_answers_are_the_servers_has_no_score(root: Path, tmp_path: Path, name: str) -> None:
    result, said = scored(root, tmp_path, name, "a")
    file = tmp_path / f"{name.replace(':', '.')}.json"
    assert json.loads(file.read_text())["score"] is None
    assert result["interval"] == [None, None]
    assert result["most_frequent"] is result["shuffled"] is result["chance"] is None
    assert (
        "not scored, since only the server has its answers" in said
        and str(file.with_suffix(".submission.json")) in said
    )
    shown = next(line for line in said.splitlines() if line.startswith("│"))
    assert "│ submission │     – │" in shown
    lines = file.with_name(f"{file.stem}.predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["score"] for line in lines} == {None}
    assert Score.read(file).score is None and not Score.read(file).baselines


def test_an_unscored_set_is_not_asked_again_about_shuffled_pictures(root: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    model = Knower("a")
    told: Callable[..., list[str]] = model.answer
    model.answer = lambda samples, *rest: asked.append(len(samples)) or told(samples, *rest)  # type: ignore
    run.score(model, {"vizwiz:test_dev": load("vizwiz:test_dev")}, root, directory=tmp_path, quiet=True, say=str)
    assert asked == [2]


def test_a_submission_that_lacks_answers_says_so(root: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    key = "vizwiz:test_dev"
    run.score(Knower("a"), {key: load(key)}, root, directory=tmp_path, limit=1, quiet=True, say=lines.append)
    file = tmp_path / "vizwiz.test_dev.partial.submission.json"
    assert f"{file}: 1 question(s) have no answer in it, and the server wants all." in lines
    assert len(json.loads(file.read_text())) == 1


def test_a_server_that_wants_numbers_is_given_no_words(root: Path, tmp_path: Path) -> None:
    card = load("vizwiz")
    changed = dataclasses.replace(card, eval=dataclasses.replace(section("vizwiz"), submission="vqa"))
    with pytest.raises(
        DataError, match=r"takes whole numbers as question_id, and its id is 'VizWiz_val_00000000\.jpg'"
    ):
        scored(root, tmp_path, "vizwiz", card=changed)
    assert not list(tmp_path.iterdir())


def test_ids_that_a_mirror_holds_as_words_become_numbers() -> None:
    sample = Sample("t/1", "t", (), {"image_id": "VizWiz_val_00000001"})
    assert json.loads(submission.written("vqa", ["17"], [sample], [Answer("ü")])) == [
        {"question_id": 17, "answer": "ü"}
    ]
    assert json.loads(submission.written("vizwiz", ["x"], [sample], [Answer("a")])) == [
        {"image": "VizWiz_val_00000001.jpg", "answer": "a"}
    ]


def test_an_unknown_form_is_met_with_a_guess(root: Path) -> None:
    card = load("vizwiz")
    changed = dataclasses.replace(card, eval=dataclasses.replace(section("vizwiz"), submission="vizwizz"))
    with pytest.raises(
        ConfigError, match=r"unknown form of a submission \(eval\.submission of the card 'vizwiz'\).*vizwiz"
    ):
        run.check({"vizwiz": changed}, root)


def test_no_checkpoint_is_chosen_by_a_set_without_a_score() -> None:
    settings = config.RunConfig(validation=config.ValidationConfig(tasks=["vqav2:test_dev"]))
    with pytest.raises(ConfigError, match=r"'vqav2:test_dev', whose answers only a test server has.*another split"):
        cards.validated(settings)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fixtures.HELD_OUT)
def test_a_missing_file_is_named_with_what_to_download_and_where_it_goes(copy: Path, name: str) -> None:
    card = load(name)
    files = section(name).files
    for role, path in files.items():
        if any(Path(other).is_relative_to(path) for other in files.values() if other != path):
            continue  # the folder of memes holds the file too
        gone = copy / path
        gone.rename(copy / "gone")
        with pytest.raises(DataError) as caught:
            open_records(section(name), copy, card)
        message = str(caught.value)
        assert f"there is no '{gone}' (files.{role} of the card, under data.root)" in message
        assert f"To download: {card.source}" in message
        assert any(
            Path(each.into).is_relative_to(path) or Path(path).is_relative_to(each.into) for each in card.downloads
        )
        (copy / "gone").rename(gone)


def test_data_check_looks_through_all_held_out_sets(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "check", "--data", str(copy), "--tasks", "held_out", "--all"]
    assert cli.main(arguments) == 0
    assert "All files of 13 cards are there." in capsys.readouterr().out
    shutil.rmtree(copy / "msvd_qa" / "YouTubeClips" / "klteYv1Uv9A_27_33")
    (copy / "visdial" / "visdial_1.0_val.json").unlink()
    arguments[arguments.index("held_out")] = "msvd_qa,visdial"
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert f"visdial_1.0_val.zip, from visualdial.org/data: into {copy}/visdial/visdial_1.0_val.json (0.07 GB)" in out
    assert "record 30934: there is no video 'klteYv1Uv9A_27_33' or 'vid1302' in" in out
    assert "neither as a file (with an ending like .mp4 or .avi) nor as a folder of frames." in out


@pytest.mark.parametrize(
    ("name", "role", "other", "message"),
    [
        ("vqav2", "annotations", "train2014", "it has no answer to any question of"),
        ("okvqa", "annotations", "train2014", "it has no answer to any question of"),
        ("textvqa", "ocr", "train", "none of its pictures is among those of"),
        ("textcaps", "ocr", "train", "none of its pictures is among those of"),
    ],
)
def test_a_file_of_another_split_is_told(root: Path, name: str, role: str, other: str, message: str) -> None:
    files = dict(section(name).files)
    wrong = files[role].replace("val2014", other).replace("_val.", f"_{other}.")
    changed = dataclasses.replace(section(name), files={**files, role: wrong})
    with pytest.raises(DataError, match=message) as caught:
        open_records(changed, root, load(name))
    assert str(caught.value).startswith(str(root / wrong)) and "another split?" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "role", "gone", "remedy"),
    [
        ("hatefulmemes", "records", ("label",), "score dev_seen or dev_unseen"),
        ("vsr", "statements", ("label",), "score a split that has them"),
        ("gqa", "questions", ("answer", "fullAnswer", "types"), "score testdev, or another split that has them"),
        ("vizwiz", "questions", ("answers", "answer_type"), "score val, or write the server's file with "
         "vizwiz:test_dev"),
        ("textvqa", "records", ("answers",), "score val, or write the server's file with textvqa:test"),
        ("aokvqa", "questions", ("correct_choice_idx", "direct_answers"), "score val, or write the server's file with "
         "aokvqa:test or aokvqa:test_multiple_choice"),
    ],
)  # fmt: skip
def test_a_file_without_answers_is_told_as_one(
    copy: Path, tmp_path: Path, name: str, role: str, gone: tuple[str, ...], remedy: str
) -> None:
    """Of a test split; where a single record lacks its answer, that record is to be mended."""
    file = copy / section(name).files[role]
    whole = file.read_text(encoding="utf-8")

    def without(most: int | None) -> None:
        left = [most]

        def strip(row: Any) -> Any:
            if gone[-1] in row and left[0] != 0:
                left[0] = None if left[0] is None else left[0] - 1
                return {key: value for key, value in row.items() if key not in gone}
            return row

        if file.suffix == ".jsonl":
            lines = [json.dumps(strip(json.loads(line))) for line in whole.splitlines() if line.strip()]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            file.write_text(json.dumps(json.loads(whole, object_hook=strip)), encoding="utf-8")

    without(None)
    told = f"there is no field '{gone[0]}' in any record, as where the answers are a server's; {remedy}."
    with pytest.raises(DataError, match=re.escape(told)):
        scored(copy, tmp_path, name)
    for variant in re.findall(r"\w+:\w+", remedy):
        assert section(variant).submission and section(variant).metric == "submission"
    without(1)
    with pytest.raises(DataError, match=rf"there is no field '{gone[0]}'; mend or remove the record"):
        scored(copy, tmp_path, name)


def test_relevances_of_another_split_are_told(copy: Path) -> None:
    file = copy / "visdial" / "visdial_1.0_val_dense_annotations.json"
    file.write_text(json.dumps([{"image_id": 7, "round_id": 1, "relevance": [0.0]}]))
    with pytest.raises(DataError, match=r"none of its rounds is in .*is it the file of another split"):
        read(copy, "visdial:dense")
    file.write_text(json.dumps([{"image_id": 284024, "round_id": 1, "gt_relevance": [0.5]}]))
    with pytest.raises(DataError, match="record 284024/1: it has 100 candidates and 1 relevances"):
        read(copy, "visdial:dense")
    for wrong in ("high", True, 2, -0.1):
        file.write_text(json.dumps([{"image_id": 284024, "round_id": 1, "gt_relevance": [wrong] * 100}]))
        with pytest.raises(DataError, match=r"one of its relevances is .+; it must be a number from 0 to 1"):
            read(copy, "visdial:dense")


def test_rounds_that_people_judged_have_ndcg_beside_their_ranks(root: Path, tmp_path: Path) -> None:
    """Who knows the truth ranks the others as the file does, and finds what people found as fitting or does not."""
    result, said = scored(root, tmp_path, "visdial:dense")
    expected = []
    for sample in read(root, "visdial:dense"):
        relevance = sample.fields["relevance"]
        truth = sample.candidates.index(sample.references[0])
        order = [truth, *(place for place in range(100) if place != truth)]
        most = sum(value > 0 for value in relevance)
        gained = sum(relevance[place] / math.log2(rank + 2) for rank, place in enumerate(order[:most]))
        best = sum(each / math.log2(rank + 2) for rank, each in enumerate(sorted(relevance, reverse=True)[:most]))
        expected.append(gained / best)
    assert result["beside"]["NDCG"] == pytest.approx(sum(expected) / len(expected)) and result["score"] == 1.0
    assert f"NDCG {100 * result['beside']['NDCG']:.1f}" in said
    assert "NDCG" not in scored(root, tmp_path, "visdial")[0]["beside"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["yes", " "], r"eval\.candidates holds ' ' which has no words; each candidate is a text of its own"),
        (["yes", "no", "yes"], r"eval\.candidates holds 'yes' twice"),
    ],
)
def test_a_cards_candidates_are_words_of_their_own(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(section("vsr"), candidates=given)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("iconqa", "iconqa_data/problems.json", lambda c: c["12"]["choices"].append(" "), "one of 'choices' is empty"),
        ("scienceqa", "scienceqa/problems.json", lambda c: c["9"].update(choices=[""]), "one of 'choices' is empty"),
        (
            "visdial", "visdial/visdial_1.0_val.json",
            lambda c: c["data"]["answers"].__setitem__(6, ""), "one of 'answer_options' is empty",
        ),
        (
            "visdial", "visdial/visdial_1.0_val.json",
            lambda c: c["data"]["dialogs"][0]["dialog"][0]["answer_options"].__setitem__(3, 999),
            "one of 'answer_options' is null where text belongs",
        ),
        (
            "visdial", "visdial/visdial_1.0_val.json",
            lambda c: c["data"]["dialogs"][0]["dialog"][0].pop("gt_index"),
            "there is no field 'gt_index': the answers of test are the server's, so score val",
        ),
        ("msvd_qa", "msvd_qa/test_qa.json", lambda c: c[0].update(video_id="x"), "'video_id' is \"x\" where a whole"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_ranked_is_listed(
    copy: Path, name: str, file: str, change: Callable[[Any], Any], message: str
) -> None:
    content = json.loads((copy / file).read_text(encoding="utf-8"))
    change(content)
    (copy / file).write_text(json.dumps(content))
    records = open_records(section(name), copy, load(name))
    with pytest.raises(DataError, match=message):
        list(records)


# -- readers ----------------------------------------------------------------------------------------------------------


def opened(folder: Path, reader: str, options: dict[str, Any], **contents: Any) -> Records:
    files: dict[str, Path | Sequence[Path]] = {"videos": folder / "videos"}
    for role, content in contents.items():
        files[role] = folder / f"{role}.{'csv' if isinstance(content, str) and ',' in content else 'json'}"
        files[role].write_text(content if isinstance(content, str) else json.dumps(content))  # type: ignore[union-attr]
    return READERS[reader](files, options, "set", "test")


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".webm", ".mkv", ".mov", ""])
def test_a_video_is_found_under_its_clips_name_or_its_number(tmp_path: Path, ending: str) -> None:
    rows = [{"id": n, "video_id": n, "question": "Who runs?", "answer": "man"} for n in (1, 2)]
    (tmp_path / "videos").mkdir()
    for name in ("abc_1_5", "vid2"):
        (tmp_path / "videos" / (name + ending)).mkdir()
    records = opened(tmp_path, "video_qa", {"video": "vid%d"}, questions=rows, mapping="abc_1_5 vid1\n\n")
    assert [sample.images for sample in records] == [
        (Video(tmp_path / "videos" / f"{name}{ending}"),) for name in ("abc_1_5", "vid2")
    ]
    assert records[0].fields == {"question": "Who runs?", "image_id": "abc_1_5", "kind": "who"}
    assert records[0].references == ("man",) and records[0].candidates == ()


def test_videos_may_stay_in_an_archive(copy: Path) -> None:
    folder = copy / "ivqa" / "videos"
    shutil.rmtree(folder)
    film(copy / "film.mp4", 6)
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as packed:
        for name in ("abcDEF12345_12_20.mp4", "zyxWVU98765.mp4"):
            packed.write(copy / "film.mp4", f"videos/{name}")
    samples = read(copy, "ivqa")
    assert [run.picture_name(sample.images[0], copy) for sample in samples] == [
        f"ivqa/videos.zip/videos/{name}" for name in ("abcDEF12345_12_20.mp4", "zyxWVU98765.mp4")
    ]
    assert len(list(frames(samples[0].images[0], 100_000, "here"))) == 4  # type: ignore[arg-type]


def test_lists_of_lavis_name_videos_with_an_ending(tmp_path: Path) -> None:
    (tmp_path / "videos" / "video7").mkdir(parents=True)
    (tmp_path / "videos" / "video8.mp4").touch()
    rows = [{"video": f"video{n}.mp4", "question": "What?", "answer": "a", "question_id": n} for n in (7, 8, 9)]
    records = opened(tmp_path, "video_qa", {}, questions=rows)
    assert [records[place].images[0].path.name for place in (0, 1)] == ["video7", "video8.mp4"]  # type: ignore[union-attr]
    assert records[1].id == "set/test/8"
    with pytest.raises(DataError, match=r"record 9: there is no video 'video9\.mp4' or 'video9' in .*videos, neither"):
        records[2]
    rows[0]["video"] = "../video8.mp4"
    with pytest.raises(DataError, match=r"leads out of"):
        opened(tmp_path, "video_qa", {}, questions=rows)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": "clip"}, r"options\.video is 'clip'; it takes a name with a place for a number, as 'video%d'"),
        ({"video": 7}, r"options\.video is 7; it takes a name"),
        ({"frames": 0}, r"options\.frames is 0; it takes a whole number from 1 to 1024"),
        ({"most": 0}, r"options\.most is 0; it takes a whole number from 1"),
        ({"least": True}, r"options\.least is true; it takes a whole number from 1"),
    ],
)
def test_options_of_videos_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, "video_qa", options, questions=[{"video": "a", "question": "Q", "answer": "a"}])


def test_a_mapping_of_another_form_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mapping\.json, line 2: it must be a clip and its number, as 'CLIP vid7'"):
        opened(tmp_path, "video_qa", {}, questions=[], mapping="a vid1\nb vid2 x\n")


ANSWERS = [{"answer": word} for word in ("b", "a", "c", "a", "b", "a", " a  a ", "")]


@pytest.mark.parametrize(
    ("name", "content", "most", "least", "expected"),
    [
        ("train_qa.json", json.dumps(ANSWERS), None, 1, ("a", "b", "c", "a a")),
        ("train_qa.json", json.dumps(ANSWERS), 2, 1, ("a", "b")),
        ("train_qa.json", json.dumps(ANSWERS), None, 2, ("a", "b")),
        ("train_ans2label.json", '{"man": 0, "dog": 1}', None, 1, ("man", "dog")),
        ("train.csv", "answer1,answer2,answer3\nx,y,y\nz,,y\n", None, 2, ("y",)),
        ("train.csv", "answer1,answer2\nx,y\ny,z\n", None, 1, ("y", "x", "z")),
    ],
)
def test_a_vocabulary_is_the_training_answers_most_frequent_first(
    tmp_path: Path, name: str, content: str, most: int | None, least: int, expected: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content)
    assert read_vocabulary(tmp_path / name, most, least) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.json", '[{"ansewr": "a"}]', r"neither a list of questions with an 'answer', .*\(KeyError: 'answer'\)"),
        ("v.json", '[{"answer": 7}]', r"neither a list of questions"),
        ("v.json", "[7]", "neither a list of questions"),
        ("v.json", "7", "neither a list of questions"),
        ("v.json", "[", "not valid JSON"),
        ("v.json", "[]", r"no answer stands in it 2 time\(s\) or more, so there is nothing to choose from"),
        ("v.csv", "question,answer\nq,a\n", r"neither a list of questions.*\(KeyError: 'answer1'\)"),
        ("v.csv", 'answer1\n"a', r"it cannot be read as a table \(unexpected end of data\)"),
    ],
)
def test_a_vocabulary_of_another_form_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_vocabulary(tmp_path / name, None, 2)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_ivqa_keeps_five_answers_and_finds_a_clip_by_either_name(tmp_path: Path) -> None:
    for name in ("abc", "def_3_17.webm"):
        (tmp_path / "videos" / name).mkdir(parents=True)
    table = "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5\n"
    rows = 'abc,1,2,Why?,a,a,b,,c\ndef,3,17,"What, and why?",x,x,x,x,x\nghi,1,2,Who?,,,,,\njkl,1,2\n'
    records = opened(tmp_path, "ivqa", {}, questions=table + rows)
    assert [records[place].images[0].path.name for place in (0, 1)] == ["abc", "def_3_17.webm"]  # type: ignore[union-attr]
    assert records[0].references == ("a", "a", "b", "c")
    assert records[1].fields["question"] == "What, and why?"
    with pytest.raises(DataError, match=r"record 2: answer1 to answer5 is \[\]; it must be a list of at least one"):
        records[2]
    with pytest.raises(DataError, match="record 3: 'question' is null where text belongs"):
        records[3]


def test_of_a_video_with_several_clips_none_is_shown_for_another(tmp_path: Path) -> None:
    """The whole video lies there too; two questions about one clip may have it, two clips may not."""
    for name in ("abc.mp4", "abc_12_20.mp4", "def.mp4"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / name).touch()
    table = "video_id,start,end,question,answer1\n"
    rows = "abc,12,20,Why?,a\nabc,30,40,Why?,a\ndef,1,2,Why?,a\ndef,1,2,Who?,a\n"
    records = opened(tmp_path, "ivqa", {}, questions=table + rows)
    found = [records[place].images[0].path.name for place in (0, 2, 3)]  # type: ignore[union-attr]
    assert found == ["abc_12_20.mp4", "def.mp4", "def.mp4"]
    assert [records[place].fields["image_id"] for place in (0, 3)] == ["abc_12_20", "def_1_2"]
    with pytest.raises(DataError, match=r"record 1: there is no video 'abc_30_40' in .*videos, neither as a file"):
        records[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video_id,start\nabc,1\n", "record 0: there is no field 'question'"),
        ("video,question\nabc,1\n", "record 0: there is no field 'video_id'"),
        ("video_id,question\n", "holds no record"),
        ('video_id,question\nabc,"what', r"it cannot be read as a table \(unexpected end of data\)"),
        ("video_id,question\nabc," + "x" * 200_000, r"it cannot be read as a table \(field larger than field limit"),
        ("video_id,question\n\udcff,x", "it cannot be read as a table"),
    ],
)
def test_a_table_that_is_broken_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "test.csv"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        list(READERS["ivqa"]({"questions": file, "videos": tmp_path}, {}, "set"))
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": None}, r"options\.exchange is None; it takes a text in quotes"),
        ({"exchange": "{question} {}"}, r"options\.exchange: '\{question\} \{\}' cannot be filled by name"),
        ({"exchange": "{question} {caption}"}, "it may name question and answer alone"),
        ({"between": 1}, r"options\.between is 1; it takes a text in quotes"),
        ({"rounds": "first"}, r"options\.rounds is 'first'; it takes all or last or dense"),
        ({"rounds": "dense"}, r"options\.rounds is 'dense', and there is no files\.dense to say which"),
    ],
)
def test_options_of_dialogues_are_checked(root: Path, options: dict[str, Any], message: str) -> None:
    changed = dataclasses.replace(section("visdial"), options={**section("visdial").options, **options})
    with pytest.raises(ConfigError, match=message):
        open_records(changed, root, load("visdial"))


def test_dialogues_bring_history_candidates_and_relevances(root: Path) -> None:
    first, second, third, *_ = read(root, "visdial")
    assert first.fields["history"] == "" and first.candidates[0] == "yes" == first.references[0]
    assert second.fields["history"] == "Question: is it sunny? Answer: yes."
    assert third.candidates.index(third.references[0]) == 99 and len(third.candidates) == 100
    assert [sample.fields["round"] for sample in read(root, "visdial:last_round")] == ["3", "2"]
    assert all("relevance" not in sample.fields for sample in read(root, "visdial"))
    judged = read(root, "visdial:dense")
    assert [sample.fields["round"] for sample in judged] == ["2", "1"]
    assert [place for place, value in enumerate(judged[0].fields["relevance"]) if value] == [2, 52]


@pytest.mark.parametrize("name", ["vsr", "hatefulmemes"])
def test_a_mirror_that_holds_the_official_files_is_read_as_they_are(copy: Path, name: str) -> None:
    official = read(copy, name)
    if name == "vsr":
        shutil.copytree(copy / "vsr" / "splits" / "zeroshot", copy / "hub" / "vsr_zeroshot")
    else:
        shutil.copytree(copy / "hatefulmemes", copy / "hub" / "hateful_memes")
    mirrored = read(copy, f"{name}:hub")
    assert [sample.fields for sample in mirrored] == [sample.fields for sample in official]
    assert [sample.references for sample in mirrored] == [sample.references for sample in official]


def test_letters_stand_for_choices_and_the_prompt_shows_both(root: Path) -> None:
    (plain, _), (letters, _), (both, _) = (read(root, name) for name in ("iconqa", "iconqa:letters", "iconqa:lettered"))
    assert (plain.candidates, plain.references) == (("3", "5", "7"), ("5",))
    assert (letters.candidates, letters.references) == (("(a)", "(b)", "(c)"), ("(b)",))
    assert (both.candidates, both.references) == (("(a) 3", "(b) 5", "(c) 7"), ("(b) 5",))
    assert letters.fields["options"] == both.fields["options"] == "(a) 3 (b) 5 (c) 7"
    changed = dataclasses.replace(section("iconqa"), options={"split": "choose_txt_test", "rank": "words"})
    with pytest.raises(ConfigError, match=r"options\.rank is 'words'; it takes texts or letters or lettered"):
        open_records(changed, root, load("iconqa"))
