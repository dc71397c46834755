"""Reading files of tensors: whole ones, and none that would run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qformer.errors import ConfigError, reason


def load_tensors(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or those of a wanted name.

    Raises:
        ConfigError: the file is not there, or is not whole.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; check its path.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error}); fetch or write it again.") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """What a .pth or .bin file holds by name; a pickle that would run code is refused.

    Raises:
        ConfigError: there is no such file, it is not whole or not safe to read, or it holds no names.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; check its path.")
    try:
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):
                raise ValueError("it is no file of torch's")
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{path}: no tensors can be read from it safely ({reason(error)}); fetch it again, or convert it to "
            f"safetensors."
        ) from None
    if not isinstance(held, Mapping):
        raise ConfigError(f"{path}: it holds a {type(held).__name__}, not tensors by name; convert it to safetensors.")
    return dict(held)
