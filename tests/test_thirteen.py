"""All thirteen held-in sets at once: a training run on a CPU over files in the official layouts."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from qformer import cards
from qformer.config import RunConfig
from qformer.train import loop
from tests import fixtures, world

TASKS = "data.tasks={" + ", ".join(f"{name}: 1.0" for name in fixtures.HELD_IN) + "}"


def settings(folder: Path, towers: Path, root: Path, *changes: str) -> RunConfig:
    return world.settings(towers, root, folder, TASKS, "train.steps=3", "train.batch_size=40", *changes)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("thirteen")


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    return fixtures.root(folder)


@pytest.fixture(scope="module")
def run(folder: Path, root: Path) -> Path:
    return loop.train(settings(folder / "run", folder / "towers", root), quiet=True, say=lambda _: None)


def test_one_run_trains_on_all_thirteen_sets(run: Path) -> None:
    mixture = json.loads((run / "mixture.json").read_text())
    assert set(mixture) == set(fixtures.HELD_IN)
    assert sum(each["drawn"] for each in mixture.values()) == 3 * 40
    assert min(each["drawn"] for each in mixture.values()) >= 1
    assert len(losses(run)) == 3 and all(0 < loss < 100 for loss in losses(run))
    shares = {name: each["asked"] for name, each in mixture.items()}
    sizes = {name: cards.load(name).train.size for name in fixtures.HELD_IN}  # type: ignore[union-attr]
    assert shares == pytest.approx(cards.probabilities(sizes, {}), abs=1e-9)  # type: ignore[arg-type]


def test_archives_in_the_place_of_folders_and_worker_processes_change_nothing(
    folder: Path, root: Path, run: Path
) -> None:
    packed = folder / "packed"
    shutil.copytree(root, packed / "data", symlinks=True)
    for images in ("coco/train2014", "coco/val2014", "coco/train2017", "textvqa/train_images", "ocrvqa/images"):
        place = packed / "data" / images
        with zipfile.ZipFile(place.with_name(f"{place.name}.zip"), "w") as archive:
            for file in sorted(place.iterdir()):
                archive.write(file, f"{place.name}/{file.name}")
        shutil.rmtree(place)
    again = settings(packed / "run", folder / "towers", packed / "data", "data.workers=2", *PLAIN)
    before = settings(folder / "unpacked", folder / "towers", root, *PLAIN)
    trained = [loop.train(each, quiet=True, say=lambda _: None) for each in (before, again)]
    assert losses(trained[0]) == losses(trained[1])


PLAIN = ("vision.train_transform.mode=squash", "vision.train_transform.flip=0", "train.steps=2")
"""A crop is drawn by the picture's path, which is another in an archive."""
