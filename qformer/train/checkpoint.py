"""Checkpoints that are whole or not there, and going on from the last one as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from qformer import config, weights
from qformer.config import RunConfig
from qformer.errors import ConfigError, TrainingError
from qformer.saved import BEST, adapter_tensors, checkpoints
from qformer.vlm import ADAPTER_FILE, VLM, whole_directory

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
BEST_FILE = "validation.json"

FREE = {
    "name", "output", "data.root", "data.index", "data.workers", "data.max_pixels", "data.on_error",
    "train.steps", "train.log_every", "train.monitor_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.log_with", "train.compile", "validation.batch_size", "evaluate", "vision.cache", "language.shard",
}  # fmt: skip
"""Settings that may change when a run goes on: how long, how it is reported, where things are, and by what code."""
PATHS = {"vision.name", "vision.checkpoint", "language.name", "qformer.init", "qformer.tokenizer"}
"""Settings that may name the same thing at another place: the last part of the path must stay."""


def save(run: Path, step: int, model: VLM, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write `checkpoints/step-N`: adapter, optimizer and step; it appears whole or not at all.

    Random states need no file: dropout is seeded anew by (seed, step, rank), data by draw number.

    Raises:
        TrainingError: it cannot be written (disk full); what was there before is left whole.
    """
    folder = run / "checkpoints"
    for stale in folder.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    target = folder / f"step-{step}"
    with whole_directory(target) as work:
        model.write(work)
        _write(optimizer.state_dict(), work / OPTIMIZER_FILE)
        (work / STATE_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def keep_best(run: Path, step: int, model: VLM, mean: float, scores: Mapping[str, float]) -> dict[str, Any]:
    """Write `checkpoints/best` if no earlier step was validated with as high a mean; which step is now the best.

    It holds the adapter alone, with its step and scores in `validation.json`; as a directory it appears whole.
    """
    target = run / "checkpoints" / BEST
    best = best_of(run)
    if best is not None and best["step"] != step and best["mean"] >= mean:
        return best
    best = {"step": step, "mean": mean, "scores": dict(scores)}
    with whole_directory(target) as work:
        model.write(work)
        (work / BEST_FILE).write_text(json.dumps(best, indent=2), encoding="utf-8")
    return best


def best_of(run: Path) -> dict[str, Any] | None:
    """Step, mean and scores of a run's best checkpoint; None where nothing was validated.

    Raises:
        TrainingError: its description is not whole.
    """
    file = run / "checkpoints" / BEST / BEST_FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"step": int(found["step"]), "mean": float(found["mean"]), "scores": dict(found["scores"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file}: it is not whole ({error}); remove {file.parent}, and the next validation writes a new one."
        ) from None


def _write(state: Any, file: Path) -> None:
    """What `torch.save` does, with the file system's own words where the disk is full, and not positions in a file."""
    try:
        with file.open("wb") as stream:
            torch.save(state, stream)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def restore(checkpoint: Path, model: VLM, optimizer: torch.optim.Optimizer) -> int:
    """Load adapter and optimizer; the step to go on with.

    Raises:
        ConfigError: the adapter does not fit, or was trained with another LLM.
        TrainingError: optimizer or step is missing, or not whole.
    """
    from qformer.backbones.language import same_language

    tensors, fingerprint = adapter_tensors(checkpoint)
    if not same_language(model.language.fingerprint(), fingerprint):
        raise ConfigError(
            f"{checkpoint}: it was trained with another LLM than '{model.settings.language.name}'; start a new run "
            f"(another output), or carry the adapter over with qformer.plug."
        )
    weights.load_strict(model.connector, tensors, str(checkpoint / ADAPTER_FILE))
    file = OPTIMIZER_FILE
    try:
        optimizer.load_state_dict(torch.load(checkpoint / file, map_location="cpu", weights_only=True))
        file = STATE_FILE
        return int(json.loads((checkpoint / file).read_text(encoding="utf-8"))["step"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"{checkpoint / file}: it is missing or not whole ({reason}); remove {checkpoint} and the run goes on from "
            f"the checkpoint before it, or starts again."
        ) from None


def enough_steps(checkpoint: Path, steps: int) -> None:
    """Refuse to go on to a step that the run has passed.

    Raises:
        ConfigError: `train.steps` is below the checkpoint's step.
    """
    done = int(checkpoint.name.removeprefix("step-"))
    if steps < done:
        raise ConfigError(
            f"train.steps is {steps}, and {checkpoint.parent.parent} has done {done}; set it to at least {done}, or "
            f"start a new run with another output."
        )


def same_run(saved: Path, settings: RunConfig) -> None:
    """Refuse to go on with a run whose data or model would change.

    Raises:
        ConfigError: names every such setting with its old and new value.
    """
    before = _flat(dataclasses.asdict(config.structured(RunConfig, [(str(saved), config.read_yaml(saved))])))
    now = _flat(dataclasses.asdict(settings))
    changed = [
        key for key in sorted(before | now) if before.get(key) != now.get(key) and not _may_change(key, before, now)
    ]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{saved}: this run cannot go on with other data or another model: {listed}. Put the old value back, or "
            f"start a new run with another output."
        )


def same_data(file: Path, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to go on where cards, templates or records are not those that the run began with.

    Raises:
        ConfigError: names what differs.
    """
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: it is not valid JSON ({error}); start a new run with another output.") from None
    for task, described in now.items():
        for what, value in described.items():
            old = before[task].get(what, value) if task in before else None  # older runs do not tell the content
            if old != value:
                raise ConfigError(
                    f"{file}: this run cannot go on with other data: {what} of '{task}' was {old} and is {value}. Put "
                    f"back what was there, or start a new run with another output."
                )


def cut_lines(file: Path, step: int) -> None:
    """Cut lines of later steps from a file of JSON lines, so that no step is told twice; a torn last line goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    work = file.with_suffix(".tmp")
    work.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(work, file)


def _may_change(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return True
    old, new = before.get(key), now.get(key)
    return key in PATHS and isinstance(old, str) and isinstance(new, str) and PurePath(old).name == PurePath(new).name


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "data.tasks":
            flat |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" == "data.tasks":
            flat[f"{prefix}{key}"] = {PurePath(name).name: weight for name, weight in value.items()}
        elif f"{prefix}{key}" == "qformer.init" and isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = [{**each, "from": PurePath(each["from"]).name} for each in value]
        else:
            flat[f"{prefix}{key}"] = value
    return flat
