"""The whole pipeline on the embedded default: scenes in the official formats, tuning, zero-shot scores, a report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from qformer import config
from qformer.config import RunConfig
from qformer.demo import formats

PICTURES_TRAIN = 6000
PICTURES_TEST = 300


def demo(
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    steps: int | None = None,
    limit: int | None = None,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Write scenes, tune on the five held-in sets, score the four held-out ones, write the report; the run directory.

    A demo that was interrupted goes on where it stopped.
    """
    from qformer import run as pipeline

    began = time.perf_counter()
    output = Path(output)
    settings = demo_settings(output, seed, steps, limit, overrides)
    data = Path(settings.data.root)
    if not (data / formats.DONE).exists():
        say(f"writing scenes in the official file formats of nine sets to {data} …")
        formats.write(data, seed, pictures_train=PICTURES_TRAIN, pictures_test=PICTURES_TEST)
    directory = pipeline.fit(settings, say=say)
    say(f"demo done in {(time.perf_counter() - began) / 60:.1f} minutes; open {directory / 'report.html'}")
    return directory


def demo_settings(
    output: Path, seed: int, steps: int | None = None, limit: int | None = None, overrides: tuple[str, ...] = ()
) -> RunConfig:
    """The shipped `demo` config, put into a run directory whose `data` folder holds the scenes."""
    changes = [f"output={output}", f"data.root={output / 'data'}", f"seed={seed}", *overrides]
    settings = config.load("demo", changes)
    if steps is not None:
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=steps))
    if limit is not None:
        settings = dataclasses.replace(settings, evaluate=dataclasses.replace(settings.evaluate, limit=limit))
    return settings
