"""Towers made of their configs alone: on torch's `meta` device, where tensors hold nothing and can be counted, or on
another, where their weights are random.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qformer import config as settings_files
from qformer import resources
from qformer.backbones import fused, inside
from qformer.backbones.language_loading import DTYPES, read_architecture, rebuild
from qformer.backbones.vision import FrozenTower, load_vision
from qformer.config import LanguageConfig, VisionConfig
from qformer.errors import ConfigError

ARCHITECTURES = "configs/architectures"
"""Where the sizes of the paper's LLMs are shipped."""


@dataclass(frozen=True)
class Blueprint:
    """A tower's size: its parameters, the width of its tokens or embeddings, and where that is known from."""

    parameters: int
    width: int
    known_from: str


def vision(settings: VisionConfig) -> Blueprint:
    """What of an encoder is held in memory: blocks behind the one that is read, and heads, are not.

    Raises:
        ConfigError: no model can be made of the name; a hub id whose config is neither there nor to be had.
    """
    tower = blank_vision(settings)
    return Blueprint(count(tower), tower.width, "its architecture")


def blank_vision(settings: VisionConfig, device: str | torch.device = "meta") -> FrozenTower:
    """An encoder made on a device; on any but the meta device with random weights.

    Raises:
        ConfigError: as `vision`.
    """
    with torch.device(device):
        return load_vision(dataclasses.replace(settings, pretrained=False, checkpoint=None))


def language(settings: LanguageConfig) -> Blueprint:
    """An LLM by its config.json; for the paper's own, where none is to be had, by the sizes shipped here.

    Raises:
        ConfigError: its config.json is neither there nor to be had, and its sizes are not shipped.
    """
    model, known_from = blank_language(settings)
    return Blueprint(language_parameters(model), int(model.get_input_embeddings().weight.shape[1]), known_from)


def blank_language(settings: LanguageConfig, device: str | torch.device = "meta") -> tuple[Any, str]:
    """An LLM made on a device, likewise, and where its sizes are known from.

    Raises:
        ConfigError: as `language`, or an unknown dtype.
    """
    import transformers

    if settings.dtype not in DTYPES:
        raise ConfigError(f"language.dtype is '{settings.dtype}'; it takes {', '.join(DTYPES)}.")
    known_from = "its config.json"
    try:
        config = read_architecture(settings)
    except ConfigError:
        shipped = settings_files.read_yaml(resources.find(ARCHITECTURES, "llms", "list of architectures"))
        if settings.name not in shipped:
            raise
        config = transformers.AutoConfig.for_model(**shipped[settings.name])
        known_from = f"the sizes shipped in {ARCHITECTURES} (its config.json is not to be had here)"
    tower = inside.language(config)
    config = config if tower is None else tower.config
    rebuild(config, settings)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=DTYPES[settings.dtype])
    fused.fuse(model)  # as the tower does that a run makes of it, which drops nothing out either
    return model.eval(), known_from


def language_parameters(model: Any) -> int:
    """Parameters of an LLM on the meta device, once its weights are read."""
    total, table = count(model), model.get_input_embeddings().weight
    if getattr(model.config, "scale_decoder_outputs", None) is False and model.lm_head.weight is table:
        total += table.numel()  # a Flan-T5's own output head, which transformers ties until it reads the weights
    return total


def count(module: nn.Module) -> int:
    """All parameters, those that are shared once."""
    return sum(parameter.numel() for parameter in module.parameters())
