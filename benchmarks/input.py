"""How fast pictures come in, and how long a step waits for them: `python benchmarks/input.py`.

First table, what one data worker does at the paper's sizes: it reads records, opens their pictures and makes tensors of
224 pixels a side, or, with a feature cache, hashes the pictures' files and reads features of 257 × 1,408 numbers in
float16.  The goal of 340 samples a second then says how many workers are needed.

Second table, real runs on the same pictures, by default of the demo's towers: the time of a step, and the share of it
that was spent waiting for data (`waited` in metrics.jsonl).  With a cache, all features are there already.

Scenes are like the demo's, small and of few colours; photos are JPEGs of 640 × 480 with detail at every scale.  Medians
over repeats with their range.  Other work on the machine makes all of it slower: `--clock cpu` counts, in the first
table, the seconds that the processor spent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import PIL
import torch
from PIL import Image, ImageDraw

from qformer import cards, config, loading
from qformer.config import RunConfig, TransformConfig
from qformer.data.batch import StepMaker, mixture_of, open_sources
from qformer.features import Cache
from qformer.images import ImageTransform
from qformer.train import loop

GOAL = 340
"""Samples a second on one H200, for FlanT5-XL."""
SIZE, TOKENS, WIDTH = 224, 257, 1408
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CARD = """name: {kind}
version: 1
train: {{reader: jsonl, files: {{records: {kind}.jsonl, images: .}}, template: instruction}}
"""


def scene(dice: numpy.random.Generator) -> Image.Image:
    """A few shapes of one colour each, 96 pixels a side."""
    picture = Image.new("RGB", (96, 96), tuple(dice.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, side = dice.integers(0, 70, 3).tolist()
        draw.ellipse((x, y, x + side // 2 + 8, y + side // 2 + 8), fill=tuple(dice.integers(0, 255, 3).tolist()))
    return picture


def photo(dice: numpy.random.Generator) -> Image.Image:
    """Noise at every scale, as the spectrum of photographs has it, 640 × 480."""
    whole = numpy.zeros((480, 640, 3), numpy.float32)
    for octave in range(3, 11):
        coarse = dice.normal(0, 700 / octave**2, (max(1, 480 >> (10 - octave)), max(1, 640 >> (10 - octave)), 3))
        layers = [Image.fromarray(coarse[..., c].astype(numpy.float32)).resize((640, 480), 3) for c in range(3)]
        whole += numpy.stack([numpy.asarray(layer) for layer in layers], -1)
    return Image.fromarray((whole + 128).clip(0, 255).astype(numpy.uint8))


KINDS = {"scenes": (scene, ".png", {}), "photos": (photo, ".jpg", {"quality": 90})}


def write(folder: Path, kind: str, count: int) -> None:
    """Pictures of a kind, a question on each, and a card."""
    make, ending, options = KINDS[kind]
    (folder / kind).mkdir(parents=True)
    dice = numpy.random.default_rng(0)
    lines = []
    for number in range(count):
        name = f"{kind}/{number}{ending}"
        make(dice).save(folder / name, **options)
        record = {"id": str(number), "image": name, "instruction": "what is on the left", "target": "a red ball"}
        lines.append(json.dumps(record) + "\n")
    (folder / f"{kind}.jsonl").write_text("".join(lines))
    (folder / f"{kind}.yaml").write_text(CARD.format(kind=kind))


def settings_of(source: str, folder: Path, kind: str, output: str, changes: Sequence[str] = ()) -> RunConfig:
    """A config's settings over pictures of a kind, without chance in their transform."""
    given = [
        f"output={folder / output}", f"data.root={folder}", "evaluate.tasks=[]", "validation.tasks=[]",
        "train.log_every=1", "train.monitor_every=0", "train.checkpoint_every=100000",
        "vision.train_transform.mode=squash", "vision.train_transform.flip=0",
    ]  # fmt: skip
    whole = config.load(source, [*given, *changes])
    return dataclasses.replace(whole, data=dataclasses.replace(whole.data, tasks={str(folder / f"{kind}.yaml"): 1.0}))


def worker(folder: Path, kind: str, cached: bool, options: argparse.Namespace) -> list[float]:
    """Pictures a second of one worker, once per repeat."""
    settings = settings_of(options.config, folder, kind, "none")
    assembler = loading.build(settings, report=lambda _: None).assembler(training=True)
    assembler.transform = ImageTransform(TransformConfig(), SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic")
    sources = open_sources(cards.load_all(settings.data.tasks, "train"), folder)
    mixture = mixture_of(sources, settings.data, {}, 0)
    steps = math.ceil(options.pictures / options.batch)
    maker = StepMaker(mixture, sources, assembler, batch_size=options.batch, steps=steps, soft_tokens=12)
    if cached:
        assembler.cache = Cache(folder / f"features of {kind}")
        assembler.cache.folder.mkdir()
        features = torch.randn(TOKENS, WIDTH).half()
        for step in range(steps):
            for key in {key for batch in maker[step].batches for key in batch.keys}:
                assembler.cache.write(key, features)
    maker[0]
    clock, found = CLOCKS[options.clock], []
    for _ in range(options.repeats):
        began = clock()
        pictures = sum(batch.pictures for step in range(steps) for batch in maker[step].batches)
        found.append(pictures / (clock() - began))
    if cached:
        shutil.rmtree(folder / f"features of {kind}")
    return found


def training(folder: Path, kind: str, cached: bool, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of a step and the share of it spent waiting, each once per repeat; the first steps are left out."""
    changes = [
        f"train.steps={options.steps}", f"train.batch_size={options.batch}", f"data.workers={options.workers}",
    ]  # fmt: skip
    if cached:
        changes.append(f"vision.cache={folder / 'kept'}")
        fill = settings_of(options.config, folder, kind, f"{kind} fill", changes)
        loop.train(fill, say=lambda _: None, quiet=True)
    times, shares = [], []
    for repeat in range(options.repeats):
        run = settings_of(options.config, folder, kind, f"{kind} {cached} {repeat}", changes)
        lines = (loop.train(run, say=lambda _: None, quiet=True) / "metrics.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines][options.steps // 4 :]  # workers start, memory is had
        seconds = [options.batch / line["samples_per_second"] for line in told]
        times.append(statistics.median(seconds))
        waited = sum(line["waited"] * each for line, each in zip(told, seconds, strict=True))
        shares.append(100 * waited / sum(seconds))
    return times, shares


def middle(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="whose towers are run in the second table")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, threads: "
        f"{torch.get_num_threads()}, Python {sys.version.split()[0]}, torch {torch.__version__}, Pillow "
        f"{PIL.__version__}; {options.pictures} pictures, {options.repeats} repeats\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"| pictures | cache | pictures/s a worker ({options.clock} seconds) | workers for {GOAL}/s |")
        print("|---|---|---|---|")
        for kind in options.kinds:
            write(folder, kind, options.pictures)
            for cached in (False, True):
                speeds = worker(folder, kind, cached, options)
                needed = math.ceil(GOAL / statistics.median(speeds))
                print(f"| {kind} | {'read' if cached else '–'} | {middle(speeds, '.0f')} | {needed} |", flush=True)
        print(f"\n| pictures | cache | step of {options.batch} (s), {options.workers} worker(s) | waited (%) |")
        print("|---|---|---|---|")
        for kind in options.kinds:
            for cached in (False, True):
                times, shares = training(folder, kind, cached, options)
                told = f"{middle(times, '.3f')} | {middle(shares, '.1f')}"
                print(f"| {kind} | {'read' if cached else '–'} | {told} |", flush=True)


if __name__ == "__main__":
    main()
