"""Building a model from settings, and loading a saved one between its towers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qformer import config, resources, weights
from qformer.backbones import language as language_backbone
from qformer.backbones import vision as vision_backbone
from qformer.backbones.language import LanguageTower
from qformer.backbones.vision import FrozenTower, OwnTower
from qformer.config import LanguageConfig, QFormerConfig, RunConfig, VisionConfig
from qformer.errors import ConfigError
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.text import Profile
from qformer.vlm import ADAPTER_FILE, CONFIG_FILE, TOKENIZER_FOLDER, VLM

Tower = TypeVar("Tower", VisionConfig, LanguageConfig)


def build(
    settings: RunConfig, *, vision: Callable[[Tensor], Any] | None = None, report: Callable[[str], None] = print
) -> VLM:
    """Towers and a fresh connector as the settings say; reports what the Q-Former's start was made of.

    `vision` is an encoder of one's own in place of the settings', a callable with a `width` (see `OwnTower`).

    Raises:
        ConfigError: an unknown tower, sizes that do not fit; before any weight is read where that can be told.
    """
    if vision is None:
        vision_backbone.check_vision(located(settings.vision))
    encoder, settings = _encoder(settings, vision)
    language = language_backbone.load_language(located(settings.language))
    given = settings.qformer
    generator = torch.Generator().manual_seed(settings.seed)
    if given.init is not None:
        qformer, table = weights.start_from_bert(
            resources.located(given.init),
            vision_width=encoder.width,
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
            vision_width=encoder.width,
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
    return VLM(encoder, connector, language, tokenizer, settings)


def load(
    source: str | Path,
    vision: str | Callable[[Tensor], Any] | None = None,
    language: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
    *,
    strict: bool = True,
    report: Callable[[str], None] | None = None,
) -> VLM:
    """A saved adapter, or a run's last checkpoint, between its towers.

    Args:
        source: a directory written by `save`, or a run directory.
        vision: the encoder where it is now, if elsewhere than in training, or an encoder of one's own (`OwnTower`).
        language: the LLM, likewise.
        device: where to put it all.
        dtype: of the frozen LLM.
        quantization: of the frozen LLM, as `language.quantization` or one of transformers' configs; {} for none.
        strict: whether the encoder must be as wide as the one in training; otherwise what depends on its width (the
            norm behind it, the keys and values of the cross-attentions) is made anew, the rest kept.
        report: is given what was loaded from where, and what was made anew; by default it goes to standard error.

    Raises:
        ConfigError: nothing to load there, weights that do not fit, or another LLM than the adapter was trained with
            (use `qformer.plug` to carry an adapter to another LLM).
    """
    say = report or _to_stderr
    packed = None if quantization is None else language_backbone.quantization_values(quantization)
    directory = adapter_directory(Path(source))
    description = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    settings = config.structured(
        RunConfig,
        [(str(directory / CONFIG_FILE), {name: description[name] for name in ("vision", "language", "qformer")})],
    )
    seen, spoken = settings.vision, settings.language
    if isinstance(vision, str):
        seen = dataclasses.replace(seen, name=vision, checkpoint=None)
    if language:
        spoken = dataclasses.replace(spoken, name=language)
    if dtype:
        spoken = dataclasses.replace(spoken, dtype=str(dtype).removeprefix("torch."))
    if quantization is not None:
        spoken = dataclasses.replace(spoken, quantization=packed)
    limits = dataclasses.replace(settings.data, max_pixels=description["max_pixels"])
    settings = dataclasses.replace(settings, vision=seen, language=spoken, data=limits)
    tensors = weights.load_tensors(directory / ADAPTER_FILE)
    encoder, settings = _encoder(settings, None if isinstance(vision, str) else vision)
    towers = (encoder, language_backbone.load_language(located(settings.language)))
    _same_language(towers[1], tensors.pop("language.fingerprint"), description["language"]["name"], settings.language)
    towers[1].profile = Profile.from_dict(description["profile"])
    trained, size = description["vision"]["name"], QFormerSize(**description["size"])
    if size.vision_width == encoder.width:
        connector = QFormerConnector(QFormer(size), towers[1].width)
        weights.load_strict(connector, tensors, str(directory / ADAPTER_FILE))
        if trained != settings.vision.name:
            say(f"{directory}: the adapter was trained on '{trained}' and now reads '{settings.vision.name}'")
    else:
        connector = _swapped(directory, tensors, size, towers, (trained, settings.vision.name), strict, say)
    tokenizer = None
    if size.instruction:
        tokenizer = _tokenizer(directory / TOKENIZER_FOLDER)
    model = VLM(towers[0], connector, towers[1], tokenizer, settings)
    return model.to(device).eval() if device else model.eval()


def _swapped(
    directory: Path,
    tensors: dict[str, Tensor],
    size: QFormerSize,
    towers: tuple[FrozenTower | OwnTower, LanguageTower],
    names: tuple[str, str],
    strict: bool,
    say: Callable[[str], None],
) -> QFormerConnector:
    """A saved connector behind an encoder of another width: what fits of it, and a report of what was made anew."""
    encoder, language = towers
    told = f"was trained on '{names[0]}' of width {size.vision_width}, and '{names[1]}' is {encoder.width} wide"
    if strict:
        raise ConfigError(
            f"{directory}: the adapter {told}; name the encoder it was trained on, or keep what fits and make the rest "
            f"anew with strict=False."
        )
    saved = QFormerConnector(QFormer(size), language.width)
    weights.load_strict(saved, tensors, str(directory / ADAPTER_FILE))
    generator = torch.Generator().manual_seed(0)
    wanted = dataclasses.replace(size, vision_width=encoder.width)
    connector = QFormerConnector(QFormer(wanted, generator), language.width, generator)
    say(weights.fill(connector, saved.state_dict(), f"{directory}, which {told}").table())
    return connector


def _encoder(settings: RunConfig, own: Callable[[Tensor], Any] | None) -> tuple[FrozenTower | OwnTower, RunConfig]:
    """The encoder that the settings name, or one that was brought, under whose name the settings then go."""
    if own is None:
        return vision_backbone.load_vision(located(settings.vision)), settings
    tower = OwnTower(own)
    return tower, dataclasses.replace(settings, vision=VisionConfig(name=tower.name))


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


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


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run directory, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / ADAPTER_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


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
    except (OSError, ValueError) as error:
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
