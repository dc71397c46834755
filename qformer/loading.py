"""Building a model from settings, and loading a saved one between its towers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qformer import config, resources, weights
from qformer.backbones import language as language_backbone
from qformer.backbones import vision as vision_backbone
from qformer.backbones.language import LanguageTower
from qformer.config import LanguageConfig, QFormerConfig, RunConfig, VisionConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.text import Profile
from qformer.vlm import ADAPTER_FILE, CONFIG_FILE, FINGERPRINT, TOKENIZER_FOLDER, VLM

Tower = TypeVar("Tower", VisionConfig, LanguageConfig)


def build(settings: RunConfig, *, report: Callable[[str], None] = print) -> VLM:
    """Towers and a fresh connector as the settings say; reports what the Q-Former's start was made of.

    Raises:
        ConfigError: an unknown tower, sizes that do not fit; before any weight is read where that can be told.
    """
    vision_backbone.check_vision(located(settings.vision))
    vision = vision_backbone.load_vision(located(settings.vision))
    language = language_backbone.load_language(located(settings.language))
    given = settings.qformer
    generator = torch.Generator().manual_seed(settings.seed)
    if given.init is not None:
        qformer, table = weights.start_from_bert(
            resources.located(given.init),
            vision_width=vision.width,
            queries=given.queries,
            cross_attention_every=given.cross_attention_every,
            instruction=given.instruction,
            dropout=given.dropout,
            hidden=given.hidden,
            layers=given.layers,
            heads=given.heads,
            intermediate=given.intermediate,
            generator=generator,
        )
        report(table.table())
    else:
        qformer = None
    tokenizer = instruction_tokenizer(given)
    if qformer is None:
        size = QFormerSize(
            vision_width=vision.width,
            hidden=given.hidden or 768,
            layers=given.layers or 12,
            heads=given.heads or 12,
            intermediate=given.intermediate or 4 * (given.hidden or 768),
            vocabulary=len(tokenizer) if tokenizer is not None else 0,
            queries=given.queries,
            cross_attention_every=given.cross_attention_every,
            instruction=given.instruction,
            dropout=given.dropout,
        )
        qformer = QFormer(size, generator=generator)
    _check_reading(qformer.size, tokenizer, given)
    connector = QFormerConnector(qformer, language.width, generator=generator)
    if given.soft_scale == "embeddings":
        _scale_soft_tokens(connector, language.embedding_norm(), generator)
    return VLM(vision, connector, language, tokenizer, settings)


def load(
    source: str | Path,
    vision: str | None = None,
    language: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
) -> VLM:
    """A saved adapter, or a run's last checkpoint, between its towers.

    `vision` and `language` name the towers where they are now, if elsewhere than in training; `dtype` is that of the
    frozen LLM.

    Raises:
        ConfigError: nothing to load there, weights that do not fit, or another LLM than the adapter was trained with
            (use `qformer.plug` to carry an adapter to another LLM).
    """
    if quantization is not None:
        raise ConfigError("load: quantization of the LLM is not supported yet; leave it out.")
    directory = adapter_directory(Path(source))
    description, size, profile = _described(directory / CONFIG_FILE)
    settings = config.structured(
        RunConfig,
        [(str(directory / CONFIG_FILE), {name: description[name] for name in ("vision", "language", "qformer")})],
    )
    seen, spoken = settings.vision, settings.language
    if vision:
        seen = dataclasses.replace(seen, name=vision, checkpoint=None)
    if language:
        spoken = dataclasses.replace(spoken, name=language)
    if dtype:
        spoken = dataclasses.replace(spoken, dtype=str(dtype).removeprefix("torch."))
    limits = dataclasses.replace(settings.data, max_pixels=description["max_pixels"])
    settings = dataclasses.replace(settings, vision=seen, language=spoken, data=limits)
    tensors, fingerprint = adapter_tensors(directory)
    towers = (
        vision_backbone.load_vision(located(settings.vision)),
        language_backbone.load_language(located(settings.language)),
    )
    _same_language(towers[1], fingerprint, description["language"]["name"], settings.language)
    towers[1].profile = profile
    if size.vision_width != towers[0].width:
        raise ConfigError(
            f"{directory}: the adapter was trained on '{description['vision']['name']}' of width {size.vision_width}, "
            f"and '{settings.vision.name}' is {towers[0].width} wide; name the encoder it was trained on."
        )
    connector = QFormerConnector(QFormer(size), towers[1].width)
    weights.load_strict(connector, tensors, str(directory / ADAPTER_FILE))
    tokenizer = None
    if size.instruction:
        tokenizer = _tokenizer(directory / TOKENIZER_FOLDER)
    model = VLM(towers[0], connector, towers[1], tokenizer, settings)
    return model.to(device).eval() if device else model.eval()


def adapter_directory(source: Path) -> Path:
    """Where the adapter's files are: the directory itself, or a run's last checkpoint.

    Raises:
        ConfigError: neither is there.
    """
    if (source / ADAPTER_FILE).is_file():
        return source
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


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("step-")


def _described(path: Path) -> tuple[dict[str, Any], QFormerSize, Profile]:
    """An adapter's description, and the connector's size and the LLM's profile in it.

    Raises:
        ConfigError: it is not there, not whole, or not of the form that save() gives it.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("vision", "language", "qformer", "max_pixels") if name not in description]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return description, QFormerSize(**description["size"]), Profile.from_dict(description["profile"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path}: it does not describe an adapter ({reason}); save the adapter again, or use another checkpoint."
        ) from None


def _same_language(tower: LanguageTower, fingerprint: Tensor, trained: str, given: LanguageConfig) -> None:
    if not language_backbone.same_language(tower.fingerprint(), fingerprint):
        raise ConfigError(
            f"the adapter was trained with the LLM '{trained}', and '{given.name}' is another one (their embeddings "
            f"differ); name the right one, or carry the adapter over with qformer.plug."
        )


def located(tower: Tower) -> Tower:
    """A tower's settings with shipped names (`demo:…`) turned into directories."""
    return dataclasses.replace(tower, name=resources.located(tower.name))


def instruction_tokenizer(given: QFormerConfig) -> Any | None:
    """What the Q-Former reads with; None where it reads no instruction.

    Raises:
        ConfigError: it is to read, and no tokenizer is named or there.
    """
    if not given.instruction:
        return None
    source = given.tokenizer or given.init
    if source is None:
        raise ConfigError(
            "qformer.instruction is on and there is no tokenizer to read it with; set qformer.init to a BERT "
            "checkpoint, qformer.tokenizer to a BERT tokenizer, or qformer.instruction: false."
        )
    return _tokenizer(resources.located(source))


def _tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # a file that is not whole raises bare exceptions
        raise ConfigError(f"{source}: no tokenizer can be read from there: {str(error).splitlines()[0]}") from None


def _check_reading(size: QFormerSize, tokenizer: Any | None, given: QFormerConfig) -> None:
    if tokenizer is None:
        return
    if len(tokenizer) > size.vocabulary:
        raise ConfigError(
            f"qformer.tokenizer: '{given.tokenizer or given.init}' has {len(tokenizer)} words and the Q-Former "
            f"{size.vocabulary} word embeddings; use the tokenizer that belongs to qformer.init."
        )
    if given.instruction_limit > size.positions:
        raise ConfigError(
            f"qformer.instruction_limit is {given.instruction_limit} and the Q-Former has {size.positions} positions; "
            f"set it to at most {size.positions}."
        )


def _scale_soft_tokens(connector: QFormerConnector, norm: float, generator: torch.Generator) -> None:
    """Query outputs leave a LayerNorm with length √D, so this spread gives soft tokens of the wanted length."""
    weight = connector.projection.weight
    with torch.no_grad():
        weight.normal_(0.0, norm / math.sqrt(weight.shape[0] * weight.shape[1]), generator=generator)
