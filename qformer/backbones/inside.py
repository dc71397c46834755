"""The towers inside a published vision-language model of transformers (InstructBLIP, BLIP-2), each on its own.

A directory or hub id of such a model names its image encoder in `vision.name` and its LLM in `language.name`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VISION_CLASSES = {"instructblip": "InstructBlipVisionModel", "blip-2": "Blip2VisionModel"}
"""Model types of whole models whose towers can be had, and the classes of their image encoders."""


@dataclass(frozen=True)
class Tower:
    """A tower's own config, and what `from_pretrained` is told so that it reads that tower's tensors alone."""

    config: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    kind: Any = None
    """The class of an image encoder; LLMs have an auto class."""


def vision(config: Any) -> Tower | None:
    """The image encoder inside a whole model of this config; None where the config is not of a whole model."""
    if config.model_type not in VISION_CLASSES:
        return None
    import transformers

    return _tower(config.vision_config, "vision_model", getattr(transformers, VISION_CLASSES[config.model_type]))


def language(config: Any) -> Tower | None:
    """The LLM inside a whole model of this config; None where the config is not of a whole model."""
    return _tower(config.text_config, "language_model") if config.model_type in VISION_CLASSES else None


def is_whole(name: str, revision: str | None = None) -> bool:
    """Whether a directory or hub id holds a whole model whose towers can be had."""
    from transformers import AutoConfig

    if "/" not in name and not Path(name).is_dir():  # timm's own names, which no hub is to be asked about
        return False
    try:
        return AutoConfig.from_pretrained(name, revision=revision).model_type in VISION_CLASSES
    except Exception:  # whatever is wrong with it is told where it is loaded
        return False


def writes_apart(directory: Path) -> bool:
    """Whether the LLM inside a whole model's directory is an encoder–decoder."""
    from transformers import AutoConfig

    tower = language(AutoConfig.from_pretrained(directory))
    return tower is not None and bool(tower.config.is_encoder_decoder)


def embedding_names(config: Any) -> set[str]:
    """Names of the input embeddings among the tensors of an LLM of this config, without making it."""
    import torch
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = auto.from_config(config)
    table = model.get_input_embeddings().weight
    return {name for name, each in model.named_parameters(remove_duplicate=False) if each is table}


@contextmanager
def unreported() -> Iterator[None]:
    """Without transformers' list of unexpected tensors: here these are the rest of the model."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _tower(config: Any, prefix: str, kind: Any = None) -> Tower:
    return Tower(config, {"config": config, "key_mapping": {rf"^(model\.)?{prefix}\.": ""}}, kind)
