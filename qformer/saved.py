"""A saved adapter as files: where it lies in a run, what describes it, and which things are adapters at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from qformer import config, resources, weights
from qformer.checkpoints import PICKLES, is_transformers, read_config
from qformer.config import InitSource
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormerSize
from qformer.text import Profile
from qformer.vlm import ADAPTER_FILE, CONFIG_FILE, FINGERPRINT

BEST = "best"
"""The checkpoint of a run that did best in validation, beside those of its last steps."""


def is_published(path: Path) -> bool:
    """Whether a directory holds a whole model of transformers, and not an adapter that was saved here."""
    if (path / ADAPTER_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return False
    return is_transformers(read_config(path, str(path)))


def adapter_directory(source: Path) -> Path:
    """Where the adapter's files are: the directory itself, or a run's best checkpoint, or its last where none is best.

    Raises:
        ConfigError: neither is there.
    """
    if (source / ADAPTER_FILE).is_file():
        return source
    best = source / "checkpoints" / BEST
    if (best / ADAPTER_FILE).is_file():
        return best
    steps = checkpoints(source)
    if steps:
        return steps[-1]
    raise ConfigError(
        f"{source}: no adapter there; give a directory written by save(), or a run directory with a checkpoint."
    )


def adapter_tensors(directory: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The connector's tensors in an adapter's directory, and the fingerprint of its LLM.

    Raises:
        ConfigError: the file is not there, not whole, or holds no fingerprint.
    """
    tensors = weights.load_tensors(directory / ADAPTER_FILE)
    if FINGERPRINT not in tensors:
        raise ConfigError(f"{directory / ADAPTER_FILE}: it lacks '{FINGERPRINT}'; give a directory written by save().")
    fingerprint = tensors.pop(FINGERPRINT)
    return tensors, fingerprint


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / ADAPTER_FILE).is_file()]
    return sorted((path for path in found if _step(path).isdecimal()), key=lambda path: int(_step(path)))


def last_checkpoint(source: str | Path) -> Path:
    """The checkpoint of a run's last step, whichever was the best.

    Raises:
        ConfigError: it is no run directory with a checkpoint.
    """
    steps = checkpoints(Path(source))
    if not steps:
        raise ConfigError(f"{source}: it is no run directory with a checkpoint, so there is no last one to take.")
    return steps[-1]


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("step-")


def describe(path: Path) -> tuple[dict[str, Any], QFormerSize, Profile]:
    """An adapter's description, and the connector's size and the LLM's profile in it.

    Raises:
        ConfigError: it is not there, not whole, or not of the form that save() gives it.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("vision", "language", "qformer", "max_pixels") if name not in description]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        for name, least in (("max_pixels", 1), ("norm_eps", 0)):
            value = description.get(name, 1)
            if not isinstance(value, int | float) or value < least:
                raise ValueError(f"{name} is {value!r}")
        return description, QFormerSize(**description["size"]), Profile.from_dict(description["profile"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: it does not describe an adapter ({said}); save the adapter again, or use another checkpoint."
        ) from None


def adapters_of(init: Any) -> tuple[InitSource, ...] | None:
    """`qformer.init` as a list of sources: one that is given, or the one adapter that is named; None for a BERT."""
    if isinstance(init, list | tuple):
        return config.init_sources(init)
    return (InitSource(init),) if isinstance(init, str) and _is_adapter(Path(resources.located(init))) else None


def _is_adapter(path: Path) -> bool:
    """Whether a path is of an adapter in any form: a run, a saved one, a whole model of transformers, LAVIS' file."""
    if path.suffix in PICKLES or (path / ADAPTER_FILE).is_file() or checkpoints(path):
        return True
    return path.is_dir() and is_published(path)
