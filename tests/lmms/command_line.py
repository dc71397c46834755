"""lmms-eval's own command line over local tasks of every kind, against what the model says by itself.

Run by `make test-lmms`, in the environment that has lmms-eval; its name keeps it out of the ordinary suite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qformer import loading
from qformer.harness import stopped
from qformer.vlm import VLM
from tests import world

TASKS = Path(__file__).parent / "tasks"
KINDS = ("write", "compare", "choose", "judge")
DOCUMENTS = [
    {"pictures": ["pictures/0.png", "pictures/1.png"], "question": "what colour is it"},
    {"pictures": ["pictures/2.png", "pictures/3.png", "pictures/5.png"], "question": "is it red indeed please"},
]
CHOICES = ["it is red", "it is blue indeed indeed", "two cats", "yes"]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of redrawn weights, pictures, and two documents whose gold is the likeliest choice."""
    folder = tmp_path_factory.mktemp("place")
    world.write_pictures(folder, 6)
    built = loading.build(world.settings(folder / "towers", folder, folder / "run"), report=str)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.connector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    built.save(folder / "adapter")
    lines = []
    for document, scores in zip(DOCUMENTS, scored(built, folder), strict=True):
        gold = max(range(len(CHOICES)), key=scores.__getitem__)
        lines.append(json.dumps({**document, "choices": CHOICES, "gold": gold}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def vlm(place: Path) -> VLM:
    return loading.load(place / "adapter", report=str)


def seen(folder: Path) -> list[list[str]]:
    return [[str(folder / name) for name in document["pictures"]] for document in DOCUMENTS]


def scored(vlm: VLM, folder: Path, *, pictures: int | None = None, normalize: str = "mean") -> list[list[float]]:
    images = [each[:pictures] for each in seen(folder)]
    return vlm.rank(images, [document["question"] for document in DOCUMENTS], CHOICES, normalize=normalize)


def environment(folder: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    return {**os.environ, **offline, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def evaluate(
    folder: Path, *options: str, kinds: Sequence[str] = KINDS, launcher: Sequence[str] = (), arguments: str = ""
) -> str:
    """What lmms-eval's command line prints; it runs in the folder of the documents."""
    command = [
        sys.executable, *launcher, "-m", "lmms_eval", "--model", "qformer",
        "--model_args", f"pretrained=adapter,device=cpu{arguments}", "--include_path", str(TASKS),
        "--tasks", ",".join(f"qformer_{kind}" for kind in kinds), "--verbosity", "DEBUG", *options,
    ]  # fmt: skip
    ran = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=540
    )
    return f"{ran.stdout}\n{ran.stderr}"


def results(folder: Path, printed: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Scores by task, and by task the responses to each document."""
    found = sorted(folder.rglob("*_results.json"))
    assert len(found) == 1, printed[-6000:]
    scores = json.loads(found[0].read_text())["results"]
    responses = {}
    for file in folder.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines.sort(key=lambda line: line["doc_id"])
        responses[file.stem.partition("_samples_qformer_")[2]] = [line["filtered_resps"] for line in lines]
    return scores, responses


def expected(vlm: VLM, folder: Path) -> dict[str, list[Any]]:
    questions = [document["question"] for document in DOCUMENTS]
    marks = [" and ".join(["<image>"] * len(document["pictures"])) for document in DOCUMENTS]
    about_all = [f"{mark} {question}" for mark, question in zip(marks, questions, strict=True)]
    first = [each[:1] for each in seen(folder)]
    return {
        "write": vlm.generate(first, questions, max_new_tokens=6),
        "compare": [
            stopped(answer, ["e"]) for answer in vlm.generate(seen(folder), about_all, max_new_tokens=5, num_beams=2)
        ],
        "choose": scored(vlm, folder),
        "judge": scored(vlm, folder, pictures=1),
    }


def check(vlm: VLM, folder: Path, output: str, printed: str, kinds: Sequence[str] = KINDS) -> None:
    """Every response and score is what the model gives by itself."""
    scores, responses = results(folder / output, printed)
    wanted = expected(vlm, folder)
    assert set(responses) == set(kinds), printed[-6000:]
    for kind in ("write", "compare"):
        assert responses[kind] == wanted[kind]
        assert len(set(wanted[kind])) == 2
    if kinds is not KINDS:
        return
    for said, likely in zip(responses["choose"], wanted["choose"], strict=True):
        assert [float(loss) for loss, _ in said] == pytest.approx([-value for value in likely], abs=2e-4)
    assert scores["qformer_choose"]["acc,none"] == 1  # the likeliest is chosen: it has the least loss
    gold = [max(range(len(CHOICES)), key=likely.__getitem__) for likely in wanted["choose"]]
    losses = [-likely[number] for likely, number in zip(wanted["judge"], gold, strict=True)]
    assert [float(loss) for loss, _ in responses["judge"]] == pytest.approx(losses, abs=2e-4)
    assert scores["qformer_judge"]["loss,none"] == pytest.approx(sum(losses) / 2, abs=2e-4)


def test_every_kind_of_task_gives_what_the_model_gives(vlm: VLM, place: Path) -> None:
    printed = evaluate(place, "--batch_size", "2", "--log_samples", "--output_path", "every")
    check(vlm, place, "every", printed)
    assert printed.count("generation_kwargs.image_aspect_ratio means nothing to qformer and is left out.") == 1


def test_answers_come_out_of_the_cache_as_they_went_in(vlm: VLM, place: Path) -> None:
    kinds = ("write", "compare")
    for output in ("first", "second"):
        printed = evaluate(
            place, "--log_samples", "--output_path", output, "--use_cache", str(place / "cache"), kinds=kinds
        )
        check(vlm, place, output, printed, kinds)
    assert "all 4 requests served from cache" in printed


def test_two_processes_share_the_work(vlm: VLM, place: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    printed = evaluate(place, "--log_samples", "--output_path", "shared", launcher=launcher)
    check(vlm, place, "shared", printed)


def test_a_wrong_argument_is_told_in_one_sentence(place: Path) -> None:
    printed = evaluate(place, arguments=",visoin=x")
    assert "--model_args: unknown argument 'visoin'. Did you mean 'vision'?" in printed
