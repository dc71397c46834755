"""The whole pipeline on the embedded default: scenes in the official formats, tuning, zero-shot scores, a report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from qformer import config
from qformer.config import RunConfig
from qformer.demo import formats
from qformer.demo import full as all_sets
from qformer.errors import ConfigError

PICTURES_TRAIN = 6000
PICTURES_TEST = 300


def demo(
    output: str | Path | None = None,
    *,
    full: bool = False,
    seed: int = 0,
    steps: int | None = None,
    limit: int | None = None,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Write scenes, tune on the held-in sets, score the held-out ones, write the report; the run directory.

    There are five held-in sets and four held-out ones, or with `full` thirteen of each, and then the splits of the
    held-in sets that are scored are scored too (`qformer demo --full`).  A demo that was interrupted goes on where it
    stopped.
    """
    from qformer import run as pipeline

    began = time.perf_counter()
    name = "demo_full" if full else "demo"
    output = Path("runs", name) if output is None else Path(output)
    settings = demo_settings(output, seed, steps, limit, overrides, name=name)
    data = Path(settings.data.root)
    write_scenes(data, settings.seed, PICTURES_TRAIN, PICTURES_TEST, full=full, say=say)
    directory = pipeline.fit(settings, say=say)
    say(f"demo done in {(time.perf_counter() - began) / 60:.1f} minutes; open {directory / 'report.html'}")
    return directory


def write_scenes(
    data: Path, seed: int, train: int, test: int, *, full: bool = False, say: Callable[[str], None] = print
) -> None:
    """Nine sets of scenes under `data`, or with `full` all 26, unless just these are there already.

    Raises:
        ConfigError: scenes of another seed, number or kind are there.
        DataError: they cannot be written.
    """
    from rich.progress import Progress

    done = data / formats.DONE
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found != formats.contents(seed, train, test, full=full):
            raise ConfigError(
                f"{data} holds the scenes of another demo ({found}); give another --output, or remove it."
            )
        return
    writer = all_sets if full else formats
    say(f"writing scenes in the official file formats of {'26' if full else 'nine'} sets to {data}")
    with Progress(transient=True) as progress:
        bar = progress.add_task("scenes", total=writer.picture_count(train, test))
        writer.write(
            data,
            seed,
            pictures_train=train,
            pictures_test=test,
            advance=lambda count: progress.advance(bar, count),
        )


def demo_settings(
    output: Path,
    seed: int,
    steps: int | None = None,
    limit: int | None = None,
    overrides: tuple[str, ...] = (),
    *,
    name: str = "demo",
) -> RunConfig:
    """A shipped config of the demo, put into a run directory whose `data` folder holds the scenes."""
    changes = [f"output={output}", f"data.root={output / 'data'}", f"seed={seed}", *overrides]
    settings = config.load(name, changes)
    if steps is not None:
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=steps))
    if limit is not None:
        settings = dataclasses.replace(settings, evaluate=dataclasses.replace(settings.evaluate, limit=limit))
    return settings
