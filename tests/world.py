"""A small whole world for tests: towers on disk, a folder of pictures with questions, and the settings of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from qformer import config
from qformer.config import RunConfig
from tests.tiny import tiny_bert, tiny_llm, tiny_vision

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@functools.cache
def towers(folder: Path, family: str) -> dict[str, str]:
    """Directories of a tiny encoder, BERT and LLM under `folder`, made once."""
    made = {}
    for name, make in (("vision", tiny_vision), ("bert", tiny_bert)):
        if not (folder / name).exists():
            make(folder / name)
        made[name] = str(folder / name)
    if not (folder / family).exists():
        tiny_llm(folder / family, family)
    return {**made, "language": str(folder / family)}


def write_pictures(folder: Path, count: int = 24, **changes: Any) -> Path:
    """`records.jsonl` with a question on each of `count` pictures of one colour in shades, and a card beside it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    lines = []
    for number in range(count):
        colour = names[number % len(names)]
        file = folder / "pictures" / f"{number}.png"
        shades = Image.linear_gradient("L").resize((40 + number % 3, 36)).rotate(20, fillcolor=90).convert("RGB")
        Image.blend(Image.new("RGB", shades.size, COLOURS[colour]), shades, 0.3).save(file)
        words = " please" * (number % 5)
        record = {
            "id": f"r{number}",
            "image": f"pictures/{number}.png",
            "instruction": f"what colour is it{words}",
            "target": f"it is {colour}{' indeed' * (number % 3)}",
        }
        record["candidates"] = [record["target"].replace(colour, each) for each in names]
        lines.append(json.dumps(record))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    card = folder / "colours.yaml"
    card.write_text(
        "name: colours\nversion: 1\n"
        "train: {reader: jsonl, files: {records: records.jsonl, images: .}, template: instruction}\n"
        "eval: {reader: jsonl, files: {records: records.jsonl, images: .}, split: all, template: instruction,\n"
        "  answer: rank, metric: accuracy}\n"
    )
    return card


def settings(
    towers_folder: Path, data: Path, output: Path, *changes: str, family: str = "llama", **more: Any
) -> RunConfig:
    """A run over `write_pictures`' records; `changes` are key=value overrides."""
    places = towers(towers_folder, family)
    file = output.parent / f"{output.name}.yaml"
    output.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_suffix(f".{os.getpid()}")  # processes under torchrun ask for the same run at the same time
    work.write_text(
        json.dumps(
            {
                "name": output.name,
                "output": str(output),
                "vision": {"name": places["vision"], "train_transform": {"mode": "random_crop", "flip": 0.5}},
                "language": {"name": places["language"]},
                "qformer": {"init": places["bert"], "queries": 4, "dropout": 0.0},
                "data": {"root": str(data), "tasks": {str(data / "colours.yaml"): 1.0}},
                "train": {
                    "steps": 4, "batch_size": 6, "rate": 1e-3, "warmup_steps": 2, "log_every": 1,
                    "monitor_every": 0, "checkpoint_every": 100,
                },
            }
        )
    )  # fmt: skip
    os.replace(work, file)
    loaded = config.load(file, changes)
    return dataclasses.replace(loaded, **more)
