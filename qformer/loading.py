"""Building a model from settings, and loading a saved one between its towers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer import config, devices, resources, starting, weights
from qformer.backbones import inside, language_loading
from qformer.backbones import language as language_backbone
from qformer.backbones import vision as vision_backbone
from qformer.backbones.language import LanguageTower
from qformer.backbones.vision import FrozenTower, OwnTower
from qformer.checkpoints import (
    PICKLES,
    is_transformers,
    lavis_projection,
    own_names,
    place,
    published_size,
    read_config,
    read_embeddings,
    read_lavis,
    read_transformers,
)
from qformer.config import InitSource, LanguageConfig, RunConfig, VisionConfig
from qformer.errors import ConfigError
from qformer.instruction import check_reading, instruction_tokenizer, published_tokenizer, saved_tokenizer
from qformer.named import Named, load_encoder, load_towers, located
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.processes import ALONE, Processes
from qformer.published_models import load_published, published_settings
from qformer.saved import adapter_directory, adapter_tensors, adapters_of, describe, is_published
from qformer.starting import Source
from qformer.vlm import ADAPTER_FILE, CONFIG_FILE, VLM, to_stderr
from qformer.weights import LoadReport


def build(
    settings: RunConfig, *, vision: Callable[[Tensor], Any] | None = None, report: Callable[[str], None] = print
) -> VLM:
    """Towers and a fresh connector as the settings say; reports what the Q-Former's start was made of.

    `vision` is an encoder of one's own in place of the settings', a callable with a `width` (see `OwnTower`).

    Raises:
        ConfigError: an unknown tower, sizes that do not fit; before any weight is read where that can be told.
    """
    (encoder, language), settings = load_towers(settings, vision)
    given = settings.qformer
    generator = torch.Generator().manual_seed(settings.seed)
    if (sources := adapters_of(given.init)) is not None:
        return _build_from_sources(settings, sources, encoder, language, generator, report)
    if given.init is not None:
        qformer, table = weights.start_from_bert(
            resources.located(given.init),
            vision_width=encoder.width,
            queries=given.queries,
            cross_attention_every=given.cross_attention_every,
            instruction=given.instruction,
            dropout=given.dropout,
            frames=given.frames or 0,
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
            frames=given.frames or 0,
        )
        qformer = QFormer(size, generator=generator)
    check_reading(qformer.size, tokenizer, given)
    connector = QFormerConnector(qformer, language.width, generator, given.norm_eps)
    if given.soft_scale == "embeddings":
        scale_soft_tokens(connector, language.embedding_norm(), generator)
    return VLM(encoder, connector, language, tokenizer, settings)


def _build_from_sources(
    settings: RunConfig,
    chosen: tuple[InitSource, ...],
    vision: FrozenTower | OwnTower,
    language: LanguageTower,
    generator: torch.Generator,
    report: Callable[[str], None],
) -> VLM:
    given = settings.qformer
    files = {each.source for each in chosen} - {starting.NEW, starting.COPIED}
    sources = {name: _read_source(name) for name in files}
    connector, table = starting.start(chosen, sources, given, vision.width, language, generator)
    report(table.table())
    if given.soft_scale == "embeddings" and "projection.weight" in table.made:
        scale_soft_tokens(connector, language.embedding_norm(), generator)
    tokenizer = instruction_tokenizer(given)
    check_reading(connector.size, tokenizer, given)
    return VLM(vision, connector, language, tokenizer, settings)


def _read_source(name: str) -> Source:
    """A source of `qformer.init`: an adapter in any form, or a BERT checkpoint."""
    found = resources.located(name)
    if not Path(found).exists() and "/" not in found and Path(found).suffix not in PICKLES:
        return starting.from_bert(name)  # a hub id without an owner, as old models have (bert-base-uncased)
    path = place(found)
    if (
        path.is_dir()
        and not (path / ADAPTER_FILE).is_file()
        and (path / CONFIG_FILE).is_file()
        and not is_published(path)
    ):
        return starting.from_bert(name)
    if path.is_file() or is_published(path):
        published = read_lavis(path) if path.is_file() else read_transformers(path, name)
        inner = read_embeddings(published)
        return Source(
            name,
            published.tensors,
            dataclasses.asdict(published.size),
            published.unused,
            norm_eps=published.norm_eps,
            fingerprint=None if inner is None else language_backbone.fingerprint(inner),
            encoder_decoder=published.leads_to_encoder_decoder,
        )
    directory = adapter_directory(path)
    tensors, size, _, eps = read_adapter(directory)
    fingerprint = adapter_tensors(directory)[1]
    return Source(name, tensors, dataclasses.asdict(size), norm_eps=eps, fingerprint=fingerprint)


def load(
    source: str | Path,
    vision: str | VisionConfig | Callable[[Tensor], Any] | None = None,
    language: str | LanguageConfig | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Any | None = None,
    *,
    instruction_tokenizer: str | Path | None = None,
    revision: str | None = None,
    strict: bool = True,
    report: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> VLM:
    """A saved adapter, a run's best or last checkpoint, or a published model or adapter, between its towers.

    Args:
        source: a directory written by `save`; a run directory, whose best checkpoint is taken where it was validated
            and else its last (`last_checkpoint` gives the last in any case); a directory or hub id of a transformers
            InstructBLIP or BLIP-2; a .pth file of LAVIS, which needs both towers named.
        vision: where the encoder is, if elsewhere than in training or in the source: a name, a file of LAVIS'
            EVA-CLIP-g (eva_vit_g.pth), settings, or an encoder of one's own (`OwnTower`).
        language: where the LLM is, likewise.
        device: where to put it all; on a GPU this process then has no attention of cuDNN (`qformer.devices`).
        dtype: of the frozen LLM.
        quantization: of the frozen LLM, as `language.quantization` or one of transformers' configs; {} for none.
        instruction_tokenizer: what the Q-Former reads with, where the source does not bring it.
        revision: of a hub id.
        strict: whether every tensor of the adapter must be in the source, and the encoder as wide as in training;
            otherwise what is missing or depends on its width (the norm behind it, the keys and values of the
            cross-attentions) is made anew, the rest kept.
        report: is given what was loaded from where, and what was made anew; by default it goes to standard error.
        processes: those that load it together, each a part of the LLM's blocks where `language.shard` is set; alone, a
            process holds all of it.

    Raises:
        ConfigError: nothing to load there, files that are broken, weights that do not fit, no such device, or another
            LLM than the adapter was trained with (use `qformer.plug` to carry an adapter to another LLM).
    """
    _check_device(device)
    say = report or to_stderr
    spoken: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
    if quantization is not None:
        spoken["quantization"] = language_loading.quantization_values(quantization)
    named = Named(vision, language, spoken, revision)
    path = place(source, revision)
    if path.is_file():
        published = read_lavis(path)
    elif is_published(path):
        published = read_transformers(path, str(source))
    else:
        return _settled(_load_saved(path, named, instruction_tokenizer, strict, say), device, processes)
    return _settled(load_published(published, named, instruction_tokenizer, strict, say), device, processes)


def _settled(model: VLM, device: str | torch.device | None, processes: Processes) -> VLM:
    if processes.count > 1:
        model.settle(torch.device(device or "cpu"), processes)
    elif device:
        devices.choose_attention(torch.device(device))
        model.to(device)
    return model.eval()


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"device is '{device}', which cannot be had here ({reason}); give cpu, or an accelerator of this machine "
            f"such as cuda:0."
        ) from None


def _load_saved(path: Path, named: Named, words: str | Path | None, strict: bool, say: Callable[[str], None]) -> VLM:
    directory = adapter_directory(path)
    description, size, profile = describe(directory / CONFIG_FILE)
    settings = _saved_settings(directory, description, named)
    tensors, fingerprint = adapter_tensors(directory)
    towers, settings = load_towers(settings, named.encoder)
    encoder, language = towers
    _same_language(language, fingerprint, description["language"]["name"], settings.language)
    language.profile, trained = profile, description["vision"]["name"]
    connector = QFormerConnector(QFormer(size), language.width, norm_eps=description.get("norm_eps", 1e-5))
    weights.load_strict(connector, tensors, str(directory / ADAPTER_FILE))
    if size.vision_width != encoder.width:
        connector = _swapped(directory, connector, encoder.width, (trained, settings.vision.name), strict, say)
    else:
        if trained != settings.vision.name:
            say(f"{directory}: the adapter was trained on '{trained}' and now reads '{settings.vision.name}'")
        say(LoadReport(str(directory), tuple(tensors), (), (), ()).line())
    settings, tokenizer = saved_tokenizer(directory, size, words, settings)
    model = VLM(towers[0], connector, towers[1], tokenizer, settings)
    model.recipe = description.get("recipe", {})
    model.lavis_projection = description.get("lavis_projection")
    if directory.parent.name == "checkpoints":
        model.run = directory.parent.parent
    return model


def saved_settings(directory: Path) -> RunConfig:
    """What an adapter's directory says of its towers and its Q-Former.

    Raises:
        ConfigError: it does not describe an adapter.
    """
    return _saved_settings(directory, describe(directory / CONFIG_FILE)[0], Named(None, None, {}, None))


def _saved_settings(directory: Path, description: dict[str, Any], named: Named) -> RunConfig:
    """What a saved adapter's description says of towers and Q-Former, with what the caller says in its place."""
    settings = config.structured(
        RunConfig,
        [(str(directory / CONFIG_FILE), {name: description[name] for name in ("vision", "language", "qformer")})],
    )
    limits = dataclasses.replace(settings.data, max_pixels=description["max_pixels"])
    return dataclasses.replace(
        settings, vision=named.seen(settings.vision), language=named.spoken(settings.language), data=limits
    )


@dataclass(frozen=True)
class Unplugged:
    """An adapter of any form behind its encoder and without its LLM: what is put in front of another one."""

    source: str
    encoder: FrozenTower | OwnTower
    tensors: Mapping[str, Tensor]
    size: QFormerSize
    norm_eps: float
    settings: RunConfig
    """Towers and Q-Former as the source has them; `language` is the LLM it was trained with, as far as it is known."""
    tokenizer: Any | None
    """What the Q-Former reads with."""
    fingerprint: Tensor | None
    """Of its own LLM, where the source tells it."""
    recipe: dict[str, Any] = field(default_factory=dict)


def unplug(
    source: str | Path,
    *,
    vision: str | VisionConfig | Callable[[Tensor], Any] | None = None,
    language: str | LanguageConfig | None = None,
    instruction_tokenizer: str | Path | None = None,
    revision: str | None = None,
) -> Unplugged:
    """An adapter in any form that `load` takes, without its LLM; the arguments are those of `load`.

    Raises:
        ConfigError: nothing to load there, files that are broken, an adapter that is not whole, or an encoder of
            another width.
    """
    named = Named(vision, language, {}, revision)
    path = place(source, revision)
    if path.is_file() or is_published(path):
        published = read_lavis(path) if path.is_file() else read_transformers(path, str(source))
        if published.directory is None and vision is None:
            raise ConfigError(
                f"{source}: a file of LAVIS holds the adapter alone; name its image encoder, as in "
                f"vision='eva_vit_g.pth'."
            )
        settings, size = published_settings(published, named, instruction_tokenizer), published.size
        tensors, eps = dict(published.tensors), published.norm_eps
        tokenizer = None
        if size.instruction:
            tokenizer = published_tokenizer(published, instruction_tokenizer, settings.qformer, revision)
        inner = read_embeddings(published)
        fingerprint, recipe = None if inner is None else language_backbone.fingerprint(inner), {}
        if published.directory is None and language is None:
            settings = dataclasses.replace(settings, language=dataclasses.replace(settings.language, name=""))
    else:
        directory = adapter_directory(path)
        description, size, _ = describe(directory / CONFIG_FILE)
        settings = _saved_settings(directory, description, named)
        tensors, fingerprint = adapter_tensors(directory)
        eps, recipe = description.get("norm_eps", 1e-5), description.get("recipe", {})
        settings, tokenizer = saved_tokenizer(directory, size, instruction_tokenizer, settings)
    lacking = [name for name in own_names(size) if name not in tensors and not name.startswith("projection.")]
    if lacking:
        raise ConfigError(f"{source}: the adapter is not whole; missing: {weights.shortened(lacking)}.")
    if named.encoder is None:
        vision_backbone.check_vision(located(settings.vision))
    encoder, settings = load_encoder(settings, named.encoder)
    if encoder.width != size.vision_width:
        raise ConfigError(
            f"{source}: its adapter reads an encoder of width {size.vision_width}, and '{settings.vision.name}' is "
            f"{encoder.width} wide; name the encoder it was trained on."
        )
    return Unplugged(str(source), encoder, tensors, size, eps, settings, tokenizer, fingerprint, recipe)


def read_adapter(source: str | Path) -> tuple[dict[str, Tensor], QFormerSize, str, float]:
    """An adapter without its towers: tensors, size, LAVIS' name of its projection, epsilon of its norm.

    Raises:
        ConfigError: nothing to load there, or it is broken or has no projection.
    """
    path = place(source)
    if path.is_file() or is_published(path):
        published = read_lavis(path) if path.is_file() else read_transformers(path, str(source))
        tensors, size, eps = dict(published.tensors), published.size, published.norm_eps
        writes = published.directory is not None and inside.writes_apart(published.directory)
        projection = published.projection_in_lavis(encoder_decoder=writes)
    else:
        directory = adapter_directory(path)
        description, size, profile = describe(directory / CONFIG_FILE)
        tensors, _ = adapter_tensors(directory)
        eps = description.get("norm_eps", 1e-5)
        projection = description.get("lavis_projection") or lavis_projection(encoder_decoder=profile.encoder_decoder)
    lacking = [name for name in own_names(size) if name not in tensors]
    if lacking:
        raise ConfigError(f"{source}: the adapter is not whole; missing: {weights.shortened(lacking)}.")
    return tensors, size, projection, eps


def _swapped(
    directory: Path,
    saved: QFormerConnector,
    width: int,
    names: tuple[str, str],
    strict: bool,
    say: Callable[[str], None],
) -> QFormerConnector:
    """A saved connector behind an encoder of another width: what fits of it, and a report of what was made anew."""
    size = saved.size
    told = f"was trained on '{names[0]}' of width {size.vision_width}, and '{names[1]}' is {width} wide"
    if strict:
        raise ConfigError(
            f"{directory}: the adapter {told}; name the encoder it was trained on, or keep what fits and make the rest "
            f"anew with strict=False."
        )
    generator = torch.Generator().manual_seed(0)
    wanted = dataclasses.replace(size, vision_width=width)
    connector = QFormerConnector(QFormer(wanted, generator), saved.language_width, generator, saved.norm.eps)
    say(weights.fill(connector, saved.state_dict(), f"{directory}, which {told}").table())
    return connector


def described_size(name: str) -> dict[str, Any] | None:
    """The fields of `QFormerSize` that the config of a source of `qformer.init` tells, without its weights.

    None where it has none at hand: a file of LAVIS, or a hub id that cannot be reached.
    """
    path = Path(resources.located(name))
    if not path.is_dir():
        return None if path.suffix in PICKLES else weights.bert_shape(name)
    with suppress(ConfigError):
        return dataclasses.asdict(describe(adapter_directory(path) / CONFIG_FILE)[1])
    described = read_config(path, name)
    return published_size(described) if is_transformers(described) else weights.bert_shape(str(path))


def _same_language(tower: LanguageTower, fingerprint: Tensor, trained: str, given: LanguageConfig) -> None:
    if not language_backbone.same_language(tower.fingerprint(), fingerprint):
        raise ConfigError(
            f"the adapter was trained with the LLM '{trained}', and '{given.name}' is another one (their embeddings "
            f"differ); name the right one, or carry the adapter over with qformer.plug."
        )


def scale_soft_tokens(connector: QFormerConnector, norm: float, generator: torch.Generator) -> None:
    """Query outputs leave a LayerNorm with length √D, so this spread gives soft tokens of the wanted length."""
    weight = connector.projection.weight
    with torch.no_grad():
        weight.normal_(0.0, norm / math.sqrt(weight.shape[0] * weight.shape[1]), generator=generator)
