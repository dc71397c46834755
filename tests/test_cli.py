"""The command line as a user types it: what works, and one sentence for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from qformer import cli
from tests import world


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def place(towers, tmp_path):
    """A folder with pictures, records, a card and a run's config in it."""
    world.write_pictures(tmp_path)
    world.settings(towers, tmp_path, tmp_path / "run")
    return tmp_path


@pytest.fixture
def type_in(capsys):
    """Runs a command line; exit code, output, and what was said on the error stream."""

    def type_in(*words):
        code = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_in


def mistake(type_in, *words, code):
    """The one sentence that a mistake is answered with."""
    found, _, said = type_in(*words)
    assert found == code, said
    assert "Traceback" not in said and said.startswith("qformer: ") and said.count("\n") == 1, said
    return said


def records(place, change):
    """Change the records of a folder: a function of the list of them."""
    file = place / "records.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -- what works -------------------------------------------------------------------------------------------------------


def test_train_eval_ask_render_and_report(place, type_in):
    code, out, _ = type_in(
        "train", place / "run.yaml", f"evaluate.tasks=[{place / 'colours.yaml'}]", "evaluate.limit=8"
    )
    assert code == 0 and "loaded" in out and "8 of 24, partial" in out
    run = place / "run"
    page = (run / "report.html").read_text()
    assert "colours" in page and ">partial<" in page and not re.search(r"(src|href)=.https?:", page)
    code, out, _ = type_in("eval", run, "--tasks", place / "colours.yaml", "--data", place, "--device", "cpu")
    assert ">partial<" not in (run / "report.html").read_text()
    assert code == 0 and json.loads((run / "eval" / "colours.json").read_text())["samples"] == 24
    code, out, _ = type_in("ask", run, place / "pictures" / "0.png", "what colour is it", "--max-new-tokens", 4)
    assert code == 0
    code, out, said = type_in("ask", run, place / "pictures" / "0.png", "what " * 300, "--max-new-tokens", 1)
    assert code == 0 and "the instruction was cut on the left to its limit" in said
    code, out, _ = type_in("render", place / "run.yaml", "-n", 2, "--ids")
    assert code == 0 and "⟨4 soft tokens of picture 1⟩" in out and "▸" in out
    assert re.search(r"Q-Former +\[CLS\]\[\d+\] what\[\d+\] ", out) and re.search(r"▸\S*\[\d+\] it\[\d+\] ", out)
    plain = type_in("render", place / "run.yaml", "-n", 2)[1]
    assert "[CLS] what" in plain and not re.search(r"\[\d+\]", plain)


def test_cards_are_listed(type_in):
    code, out, _ = type_in("tasks")
    assert code == 0 and "held-out" in out and "Question: {question} Short answer:" in out
    code, out, _ = type_in("tasks", "gqa")
    assert code == 0 and "testdev_balanced" in out and "short_answer (version 1" in out


def test_changes_may_stand_before_and_behind_options(place, type_in):
    code, out, _ = type_in("render", place / "run.yaml", "seed=3", "-n", 1, "qformer.queries=7", "--ids")
    assert code == 0 and "⟨7 soft tokens" in out
    code, _, said = type_in("render", place / "run.yaml", "-n", 1, "seed=3", "--idz")
    assert code == 2 and "unrecognized arguments: " in said and "--idz" in said
    assert type_in("tasks", "gqa", "vsr")[0] == 2


def test_words_are_printed_as_they_are(capsys):
    cli._say("a :dog: in [bold]brackets[/]")
    assert capsys.readouterr().out == "a :dog: in [bold]brackets[/]\n"


def test_version_and_wrong_usage(type_in):
    assert type_in("--version")[0] == 0
    assert type_in("--help")[0] == 0
    assert type_in("no_such_command")[0] == 2


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        (["train.stepz=3"], 2, r"unknown key 'train\.stepz'\. Did you mean 'steps'\?"),
        (["train.steps=many"], 2, r"train\.steps: Value 'many'"),
        (["name=no"], 2, r"name is the YAML boolean false where a word belongs"),
        (["data.root=/nowhere/at/all"], 1, r"data\.root is '/nowhere/at/all', and there is no such folder"),
        (["vision.name=resnet5O"], 2, r"vision\.name is 'resnet5O'.* Did you mean 'resnet50'\?"),
        (["language.name=/nowhere/llm"], 2, r"language\.name is '/nowhere/llm', and no LLM can be read"),
        (["language.dtype=float17"], 2, r"language\.dtype is 'float17'; it takes"),
        (["qformer.init=/nowhere/bert"], 2, r"/nowhere/bert"),
        (["data.tasks={colourz: 1.0}"], 2, r"unknown task card 'colourz'"),
        (["data.tasks.gqa=1.0"], 2, r"'gqa', which is held out.* never trained on"),
        (["evaluate.tasks=[nocapz]"], 2, r"unknown task card 'nocapz'\. Did you mean 'nocaps'\?"),
        (["evaluate.tasks=[vqg_vqav2]"], 2, r"'vqg_vqav2' has no 'eval' section"),
        (["qformer.heads=5", "qformer.hidden=30"], 2, r"qformer"),
        (["qformer.queries=0"], 2, r"qformer\.queries"),
        (["vision.block=9"], 2, r"vision\.block is 9; .* has 2 blocks"),
        (["train={"], 2, r"command line: 'train=\{' has no value that YAML can read"),
        (["data.tasks=[a, b]"], 2, r"data\.tasks is \['a', 'b'\]; it takes named values"),
        (["language.profile.end=[99999]"], 2, r"language\.profile\.end holds the id 99999, .* has the ids 0 to \d+;"),
        (["language.profile.opening=[-1]"], 2, r"language\.profile\.opening holds the id -1"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_writes_nothing(place, type_in, changes, code, sentence):
    said = mistake(type_in, "train", place / "run.yaml", *changes, code=code)
    assert re.search(sentence, said), said
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda lines: lines[3].pop("instruction"),
            r"records\.jsonl, line 4: there is no field 'instruction'; mend or remove the record\.",
        ),
        (lambda lines: lines[3].pop("image"), r"records\.jsonl, line 4: .*'image'"),
        (
            lambda lines: lines[3].update(target=""),
            r"records\.jsonl, line 4: 'target' is empty; fill it, or remove the record\.",
        ),
        (lambda lines: lines[3].update(target=True), r"records\.jsonl, line 4: .*'target'"),
        (
            lambda lines: lines[3].update(target="teal"),
            r"line 4: the target 'teal' is not among the candidates .*; add it to them, or mend it\.",
        ),
        (
            lambda lines: lines[3].update(id="r2"),
            r"line 4: the id 'r2' was given in line 3 already; give each line its own\.",
        ),
        (
            lambda lines: lines[3].update(image="pictures/none.png"),
            r"'r3'.*none\.png is missing|r3.*none\.png.* missing",
        ),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(place, type_in, change, sentence):
    records(place, change)
    said = mistake(type_in, "train", place / "run.yaml", code=1)
    assert re.search(sentence, said), said
    assert not list((place / "run" / "checkpoints").glob("*")) if (place / "run").exists() else True


def test_bad_json_names_its_line(place, type_in):
    with (place / "records.jsonl").open("a") as file:
        file.write("{'single': quotes}\n")
    assert "records.jsonl, line 25: not valid JSON" in mistake(type_in, "train", place / "run.yaml", code=1)


def test_a_missing_file_says_what_is_expected_where(place, type_in):
    (place / "records.jsonl").unlink()
    said = mistake(type_in, "train", place / "run.yaml", code=1)
    assert str(place / "records.jsonl") in said
    said = mistake(type_in, "train", place / "run.yaml", "data.tasks={vqav2: 1.0}", code=1)
    assert "v2_OpenEnded_mscoco_train2014_questions.json" in said and "visualqa.org" in said


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda file: file.write_bytes(b"no picture at all"),
            "is not a picture that can be read; fetch it again or save it as PNG.",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "); fetch it again."),
        (lambda file: Image.new("RGB", (300, 300)).save(file), "more than data.max_pixels"),
    ],
)
def test_a_broken_picture_is_named(place, type_in, spoil, sentence):
    spoil(place / "pictures" / "7.png")
    said = mistake(type_in, "train", place / "run.yaml", "data.max_pixels=10000", "train.steps=8", code=1)
    assert "7.png" in said and sentence in said, said


def test_a_card_with_an_unknown_reader_or_metric_is_refused(place, type_in):
    card = place / "colours.yaml"
    whole = card.read_text()
    card.write_text(whole.replace("reader: jsonl", "reader: jsonlines"))
    assert "unknown reader 'jsonlines'. Did you mean 'jsonl'?" in mistake(type_in, "train", place / "run.yaml", code=2)
    card.write_text(whole)
    assert type_in("train", place / "run.yaml")[0] == 0
    card.write_text(whole.replace("metric: accuracy", "metric: acuracy"))
    said = mistake(type_in, "eval", place / "run", "--tasks", card, "--data", place, code=2)
    assert "unknown metric" in said and "'acuracy'. Did you mean 'accuracy'?" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ask", "run", "picture.png", "what", "--beams", 0], "decoding.num_beams is 0; it must be at least 1."),
        (["ask", "run", "picture.png", "what", "--max-new-tokens", -3], "decoding.max_new_tokens is -3"),
        (["eval", "run", "--tasks", "gqa", "--data", ".", "--limit", 0], "evaluate.limit is 0; it must be at least 1."),
        (["eval", "run", "--tasks", "gqa", "--data", ".", "--batch-size", 0], "evaluate.batch_size is 0"),
        (["demo", "--limit", 0], "evaluate.limit is 0; it must be at least 1."),
        (["demo", "--steps", 0], "train.steps is 0; it must be at least 1."),
        (["demo", "--seed", -1], "seed is -1"),
        (["demo", "train.rat=1e-3"], "Did you mean 'rate'?"),
    ],
)
def test_numbers_on_the_command_line_are_held_to_the_same_bounds(tmp_path, monkeypatch, type_in, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in mistake(type_in, *words, code=2)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_scored_is_said_before_a_model_is_trained_or_loaded(place, type_in, monkeypatch):
    from qformer import loading

    for name in ("build", "load"):
        monkeypatch.setattr(loading, name, None)
    said = mistake(type_in, "train", place / "run.yaml", "evaluate.tasks=[gqa]", code=1)
    assert "testdev_balanced_questions.json" in said and "To download" in said
    assert not (place / "run").exists()
    said = mistake(type_in, "eval", place / "run", "--tasks", " gqa, vsr", "--data", place / "nowhere", code=1)
    assert f"data.root is '{place / 'nowhere'}', and there is no such folder; gqa is read from it" in said
    said = mistake(type_in, "eval", place / "run", "--tasks", ",", "--data", place, code=2)
    assert "no task to score" in said


def test_a_device_that_is_not_there_is_refused(place, type_in):
    for device in ("cudax", "xla:7"):
        said = mistake(type_in, "ask", place, place / "pictures/0.png", "what", "--device", device, code=2)
        assert f"device is '{device}', which cannot be had here" in said


def test_a_broken_record_is_rendered_as_such_where_it_is_skipped(place, type_in):
    records(place, lambda lines: lines[7].update(instruction=""))  # the first that this seed draws
    words = ("render", place / "run.yaml", "-n", 3)
    assert "line 8: 'instruction' is empty" in mistake(type_in, *words, code=1)
    code, out, _ = type_in(*words, "data.on_error=skip")
    assert code == 0 and out.startswith("broken: ") and "line 8: 'instruction' is empty" in out
    assert out.count("soft tokens") == 2


def test_rendering_nothing_is_refused(place, type_in):
    said = mistake(type_in, "render", place / "run.yaml", "-n", 0, code=2)
    assert "render.count is 0; it must be at least 1" in said


def test_a_source_without_an_adapter_is_refused(place, type_in):
    said = mistake(type_in, "ask", place, place / "pictures" / "0.png", "what is it", code=2)
    assert "no adapter there" in said


def test_ctrl_c_exits_with_130_and_keeps_the_last_checkpoint(place, type_in, monkeypatch):
    from qformer.train import checkpoint

    save = checkpoint.save

    def interrupted(run, step, *rest):
        save(run, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    code, _, said = type_in("train", place / "run.yaml", "train.checkpoint_every=2")
    assert code == 130 and "Traceback" not in said
    assert "the last checkpoint, if there is one yet, is whole: the same command goes on from it." in said
    monkeypatch.setattr(checkpoint, "save", save)
    assert type_in("train", place / "run.yaml", "train.checkpoint_every=2")[0] == 0
    assert [path.name for path in sorted((place / "run" / "checkpoints").iterdir())] == ["step-2", "step-4"]


def test_ctrl_c_that_a_library_hides_still_exits_with_130(type_in, monkeypatch):
    def hides(options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'Tensor'") from None

    before = signal.getsignal(signal.SIGINT)
    for command, words in (
        ("tasks", ()), ("train", ("demo",)), ("train", ("demo", "--dry-run")), ("eval", ("one", "other")),
    ):  # fmt: skip
        monkeypatch.setitem(cli.COMMANDS, command, hides)
        code, _, said = type_in(command, *words)
        assert code == 130 and said.startswith("qformer: interrupted") and said.count("\n") == 1
        assert ("if there is one yet, is whole: the same command goes on" in said) == (words == ("demo",))
        assert words == ("demo",) or said == "qformer: interrupted.\n"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setitem(cli.COMMANDS, "tasks", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["tasks"])


CTRL_C_AT_AN_IMPORT = """
import os, signal, sys
from qformer import cli

class CtrlC:
    def find_spec(self, name, *rest):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.exit(cli.main(["ask", "nowhere", "picture.png", "what is it"]))
"""


def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback():
    command = [sys.executable, "-c", CTRL_C_AT_AN_IMPORT, "torch.nn"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "qformer: interrupted.\n")


def test_loading_with_an_encoder_of_another_width_is_refused(place, type_in, tmp_path):
    from transformers import ViTConfig, ViTModel

    assert type_in("train", place / "run.yaml")[0] == 0
    wide = tmp_path / "wide"
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8), add_pooling_layer=False).save_pretrained(wide)  # fmt: skip
    said = mistake(type_in, "ask", place / "run", place / "pictures/0.png", "what is it", "--vision", wide, code=2)
    assert "of width 24" in said and "16 wide" in said
