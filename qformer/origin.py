"""What was scored: the adapter, its checkpoint and its towers, so that a number can be traced to its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qformer.errors import ConfigError
from qformer.saved import adapter_directory
from qformer.vlm import VLM

LENGTH = 16
"""Hex digits of a fingerprint."""
LOOKED_AT = 64
"""Values of each of a tower's tensors, evenly spaced: enough to tell towers apart, and read in seconds."""


def origin(model: VLM, source: str | Path | None = None, step: int | None = None) -> dict[str, Any]:
    """Checkpoint, step, settings and fingerprints of a model, as plain values for JSON.

    Two adapters have the same fingerprint where every number of theirs is the same.  A tower's depends on the precision
    it is held in, which stands beside it.

    Args:
        model: what is scored.
        source: what it was loaded from; none where it is in the midst of its training.
        step: of its training, where no checkpoint tells it.
    """
    settings = model.settings
    found: dict[str, Any] = {"source": None if source is None else str(source), "checkpoint": None, "step": step}
    if source is not None:
        with suppress(ConfigError):  # a published model has no checkpoint of ours
            directory = adapter_directory(Path(source))
            found |= {"checkpoint": str(directory), "step": step_of(directory)}
    found["adapter"] = _hash(model.connector.state_dict())
    found["vision"] = {**dataclasses.asdict(settings.vision), "fingerprint": _tower(model.vision)}
    language = dataclasses.asdict(settings.language)
    found["language"] = {**language, "fingerprint": _hash({"rows": model.language.fingerprint()})}
    found |= {"qformer": dataclasses.asdict(settings.qformer), "max_pixels": settings.data.max_pixels}
    return json.loads(json.dumps(found, default=str))


def step_of(checkpoint: Path) -> int | None:
    """The training step that a run's checkpoint was written at; None where it does not tell."""
    number = checkpoint.name.removeprefix("step-")
    if number.isdecimal():
        return int(number)
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((checkpoint / "validation.json").read_text(encoding="utf-8"))["step"])
    return None


def _tower(tower: nn.Module) -> str | None:
    """A fingerprint of a tower by some of its numbers; None where it has none that can be seen."""
    tensors = tower.state_dict()
    return _hash({name: _some(tensor) for name, tensor in tensors.items()}) if tensors else None


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // LOOKED_AT)][:LOOKED_AT]


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:LENGTH]
