"""Building a model from settings, and loading a saved one between its towers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qformer import config, presets, resources, starting, weights
from qformer.backbones import inside, language_loading
from qformer.backbones import language as language_backbone
from qformer.backbones import vision as vision_backbone
from qformer.backbones.language import LanguageTower
from qformer.backbones.vision import FrozenTower, OwnTower
from qformer.checkpoints import (
    PICKLES,
    Published,
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
from qformer.config import InitSource, LanguageConfig, QFormerConfig, RunConfig, VisionConfig
from qformer.errors import ConfigError, reason
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.processes import ALONE, Processes
from qformer.starting import Source
from qformer.text import Profile
from qformer.untokenized import MissingTokenizer
from qformer.vlm import ADAPTER_FILE, CONFIG_FILE, FINGERPRINT, TOKENIZER_FOLDER, VLM, to_stderr
from qformer.weights import LoadReport

EVA_CLIP_G = "eva_giant_patch14_clip_224"
"""timm's name of the encoder whose weights LAVIS calls eva_vit_g.pth."""

BEST = "best"
"""The checkpoint of a run that did best in validation, beside those of its last steps."""

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
    language = language_loading.load_language(located(settings.language))
    given = settings.qformer
    generator = torch.Generator().manual_seed(settings.seed)
    if (sources := _adapters(given.init)) is not None:
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
    _check_reading(qformer.size, tokenizer, given)
    connector = QFormerConnector(qformer, language.width, generator, given.norm_eps)
    if given.soft_scale == "embeddings":
        scale_soft_tokens(connector, language.embedding_norm(), generator)
    return VLM(encoder, connector, language, tokenizer, settings)


def _adapters(init: Any) -> tuple[InitSource, ...] | None:
    """`qformer.init` as a list of sources: one that is given, or the one adapter that is named; None for a BERT."""
    if isinstance(init, list | tuple):
        return config.init_sources(init)
    return (InitSource(init),) if isinstance(init, str) and _is_adapter(Path(resources.located(init))) else None


def _is_adapter(path: Path) -> bool:
    """Whether a path is of an adapter in any form: a run, a saved one, a whole model of transformers, LAVIS' file."""
    if path.suffix in PICKLES or (path / ADAPTER_FILE).is_file() or checkpoints(path):
        return True
    return path.is_dir() and _is_published(path)


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
    _check_reading(connector.size, tokenizer, given)
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
        and not _is_published(path)
    ):
        return starting.from_bert(name)
    if path.is_file() or _is_published(path):
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
        device: where to put it all.
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
    elif _is_published(path):
        published = read_transformers(path, str(source))
    else:
        return _settled(_load_saved(path, named, instruction_tokenizer, strict, say), device, processes)
    return _settled(_load_published(published, named, instruction_tokenizer, strict, say), device, processes)


def _settled(model: VLM, device: str | torch.device | None, processes: Processes) -> VLM:
    if processes.count > 1:
        model.settle(torch.device(device or "cpu"), processes)
    elif device:
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


@dataclass(frozen=True)
class Named:
    """What the caller of `load` says about the towers."""

    vision: str | VisionConfig | Callable[[Tensor], Any] | None
    language: str | LanguageConfig | None
    changes: dict[str, Any]
    """Of the LLM's settings."""
    revision: str | None

    @property
    def encoder(self) -> Callable[[Tensor], Any] | None:
        """An encoder of the caller's own."""
        return None if isinstance(self.vision, str | VisionConfig | None) else self.vision

    def seen(self, own: VisionConfig) -> VisionConfig:
        """The encoder's settings: the caller's own, or those around the adapter under the caller's name."""
        if isinstance(self.vision, VisionConfig):
            return self.vision
        if not isinstance(self.vision, str):
            return own
        if Path(self.vision).suffix in PICKLES:
            return dataclasses.replace(own, name=EVA_CLIP_G, checkpoint=self.vision, revision=None)
        return dataclasses.replace(own, name=self.vision, checkpoint=None, revision=None)

    def spoken(self, own: LanguageConfig) -> LanguageConfig:
        """The LLM's settings, likewise."""
        chosen = self.language
        if not isinstance(chosen, LanguageConfig):
            chosen = own if chosen is None else dataclasses.replace(own, name=chosen, revision=None)
        return dataclasses.replace(chosen, **self.changes)


def _load_saved(path: Path, named: Named, words: str | Path | None, strict: bool, say: Callable[[str], None]) -> VLM:
    directory = adapter_directory(path)
    description, size, profile = _described(directory / CONFIG_FILE)
    settings = _saved_settings(directory, description, named)
    tensors, fingerprint = adapter_tensors(directory)
    towers, settings = _towers(settings, named.encoder)
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
    settings, tokenizer = _own_tokenizer(directory, size, words, settings)
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
    return _saved_settings(directory, _described(directory / CONFIG_FILE)[0], Named(None, None, {}, None))


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
    if path.is_file() or _is_published(path):
        published = read_lavis(path) if path.is_file() else read_transformers(path, str(source))
        if published.directory is None and vision is None:
            raise ConfigError(
                f"{source}: a file of LAVIS holds the adapter alone; name its image encoder, as in "
                f"vision='eva_vit_g.pth'."
            )
        settings, size = _published_settings(published, named, instruction_tokenizer), published.size
        tensors, eps = dict(published.tensors), published.norm_eps
        tokenizer = None
        if size.instruction:
            tokenizer = _published_tokenizer(published, instruction_tokenizer, settings.qformer, revision)
        inner = read_embeddings(published)
        fingerprint, recipe = None if inner is None else language_backbone.fingerprint(inner), {}
        if published.directory is None and language is None:
            settings = dataclasses.replace(settings, language=dataclasses.replace(settings.language, name=""))
    else:
        directory = adapter_directory(path)
        description, size, _ = _described(directory / CONFIG_FILE)
        settings = _saved_settings(directory, description, named)
        tensors, fingerprint = adapter_tensors(directory)
        eps, recipe = description.get("norm_eps", 1e-5), description.get("recipe", {})
        settings, tokenizer = _own_tokenizer(directory, size, instruction_tokenizer, settings)
    lacking = [name for name in own_names(size) if name not in tensors and not name.startswith("projection.")]
    if lacking:
        raise ConfigError(f"{source}: the adapter is not whole; missing: {weights.shortened(lacking)}.")
    if named.encoder is None:
        vision_backbone.check_vision(located(settings.vision))
    encoder, settings = _encoder(settings, named.encoder)
    if encoder.width != size.vision_width:
        raise ConfigError(
            f"{source}: its adapter reads an encoder of width {size.vision_width}, and '{settings.vision.name}' is "
            f"{encoder.width} wide; name the encoder it was trained on."
        )
    return Unplugged(str(source), encoder, tensors, size, eps, settings, tokenizer, fingerprint, recipe)


def _own_tokenizer(
    directory: Path, size: QFormerSize, named: str | Path | None, settings: RunConfig
) -> tuple[RunConfig, Any | None]:
    """What a saved adapter's Q-Former reads with, the one named or its own, and the settings that say so."""
    if not size.instruction:
        return settings, None
    if named is not None:
        settings = dataclasses.replace(settings, qformer=dataclasses.replace(settings.qformer, tokenizer=str(named)))
        tokenizer = _tokenizer(resources.located(str(named)))
        _check_reading(size, tokenizer, settings.qformer)
        return settings, tokenizer
    if (directory / TOKENIZER_FOLDER).is_dir():
        return settings, _tokenizer(directory / TOKENIZER_FOLDER)
    missing = (
        f"{directory} was saved without the Q-Former's tokenizer (name one, such as "
        f"instruction_tokenizer='bert-base-uncased')"
    )
    return settings, MissingTokenizer(missing, pad=0)


def _load_published(
    published: Published, named: Named, tokenizer: str | Path | None, strict: bool, say: Callable[[str], None]
) -> VLM:
    size, directory = published.size, published.directory
    if directory is None and not (named.vision is not None and named.language):
        raise ConfigError(
            f"{published.source}: a file of LAVIS holds the adapter alone; name both towers, as in "
            f"load(..., vision='eva_vit_g.pth', language='google/flan-t5-xl')."
        )
    settings = _published_settings(published, named, tokenizer)
    spoken, read, seen = settings.language, settings.qformer, settings.vision
    _same_kind(published, spoken)
    towers, settings = _towers(settings, named.encoder)
    if strict:
        _same_width(towers[0].width, published.source, size, settings.vision.name)
    _fits_language(published, towers[1], spoken)
    generator = torch.Generator().manual_seed(settings.seed)
    size = dataclasses.replace(size, vision_width=towers[0].width)
    connector = QFormerConnector(QFormer(size, generator), towers[1].width, generator, published.norm_eps)
    table = weights.fill(connector, published.tensors, published.source, published.unused)
    lacking = [*table.made, *table.reshaped]
    if lacking and strict:
        raise ConfigError(
            f"{published.source}: the weights do not fit. missing or of another shape: {weights.shortened(lacking)}. "
            f"With strict=False these are made anew."
        )
    say(table.table())
    if published.encoder and (seen.checkpoint is None or Path(seen.checkpoint) != Path(published.source)):
        say(
            f"{published.source}: it holds an encoder that was tuned with the adapter, which is left unused; name the "
            f"file itself as vision to read it."
        )
    words = None
    if size.instruction:
        words = _published_tokenizer(published, tokenizer, read, named.revision)
        if not isinstance(words, MissingTokenizer):
            _check_reading(size, words, read)
    model = VLM(towers[0], connector, towers[1], words, settings)
    model.lavis_projection = published.projection_in_lavis(encoder_decoder=model.language.is_encoder_decoder)
    return model


def _published_settings(published: Published, named: Named, tokenizer: str | Path | None) -> RunConfig:
    """The preset of a published form, with what the source and the caller say."""
    size, directory = published.size, published.directory
    preset = presets.load(published.preset)
    seen = named.seen(dataclasses.replace(preset.vision, name=published.source, revision=named.revision))
    if (
        named.encoder is None
        and not isinstance(named.vision, VisionConfig)
        and inside.is_whole(seen.name, seen.revision)
    ):
        seen = dataclasses.replace(seen, block=None)
    spoken = named.spoken(dataclasses.replace(preset.language, name=published.source, revision=named.revision))
    if directory is not None and not isinstance(named.language, LanguageConfig):
        spoken = _ended_as_published(spoken, published)
    read = dataclasses.replace(
        preset.qformer,
        tokenizer=str(tokenizer) if tokenizer else preset.qformer.tokenizer,
        queries=size.queries,
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        intermediate=size.intermediate,
        cross_attention_every=size.cross_attention_every,
        instruction=size.instruction,
        dropout=size.dropout,
        norm_eps=published.norm_eps,
        instruction_limit=min(preset.qformer.instruction_limit, size.positions),
    )
    return RunConfig(vision=seen, language=spoken, qformer=read)


def _ended_as_published(spoken: LanguageConfig, published: Published) -> LanguageConfig:
    """The id that ends an answer is what the whole model's config says (a line break in BLIP-2's OPT)."""
    end = ((published.config or {}).get("text_config") or {}).get("eos_token_id")
    if spoken.profile.end is not None or not isinstance(end, int):
        return spoken
    return dataclasses.replace(spoken, profile=dataclasses.replace(spoken.profile, end=[end]))


def _same_kind(published: Published, spoken: LanguageConfig) -> None:
    """Refuse an LLM of the other kind than LAVIS' name of the projection tells, before its weights are read: widths
    alone tell no Vicuna-7B from a FlanT5-XXL.
    """
    wanted = published.leads_to_encoder_decoder
    if wanted is None:
        return
    config = language_loading.read_architecture(located(spoken))
    inner = inside.language(config)
    found = bool((config if inner is None else inner.config).is_encoder_decoder)
    if found != wanted:
        kinds = {True: "an encoder–decoder", False: "a decoder-only LLM"}
        raise ConfigError(
            f"{published.source}: its projection ({published.projection}) leads to {kinds[wanted]}, and "
            f"'{spoken.name}' is {kinds[found]}; name the LLM it was trained with, or carry it over with qformer.plug."
        )


def _fits_language(published: Published, tower: LanguageTower, spoken: LanguageConfig) -> None:
    """Refuse an LLM of another width, and another one than stands inside a published model."""
    width = published.language_width
    if width is not None and width != tower.width:
        raise ConfigError(
            f"{published.source}: it projects to an LLM of width {width}, and '{spoken.name}' is {tower.width} wide; "
            f"name the LLM it was trained with, or carry it over with qformer.plug."
        )
    if published.directory is None or spoken.name == published.source:
        return
    inner = read_embeddings(published)
    if inner is not None and not language_backbone.same_language(
        tower.fingerprint(), language_backbone.fingerprint(inner)
    ):
        raise ConfigError(
            f"{published.source}: its adapter was trained with the LLM inside it, and '{spoken.name}' is another one "
            f"(their embeddings differ); leave language out, or carry the adapter over with qformer.plug."
        )


def _same_width(found: int, source: str, size: QFormerSize, given: str) -> None:
    if size.vision_width != found:
        raise ConfigError(
            f"{source}: its adapter reads an encoder of width {size.vision_width}, and '{given}' is {found} wide; name "
            f"the encoder it was trained on, or keep what fits and make the rest anew with strict=False."
        )


def _published_tokenizer(
    published: Published, named: str | Path | None, read: QFormerConfig, revision: str | None
) -> Any:
    """What the Q-Former reads with: the one named, or the source's own; a stand-in where neither is at hand."""
    if named is not None:
        return _tokenizer(resources.located(str(named)))
    if published.directory is not None and (published.directory / "qformer_tokenizer").is_dir():
        return _tokenizer(published.directory / "qformer_tokenizer")
    if published.directory is None and read.tokenizer is not None:
        with suppress(ConfigError):
            return _tokenizer(resources.located(read.tokenizer))
    return MissingTokenizer(
        f"'{published.source}' came without the Q-Former's tokenizer (name one, such as "
        f"instruction_tokenizer='bert-base-uncased')",
        pad=0,
    )


def _towers(
    settings: RunConfig, own: Callable[[Tensor], Any] | None = None
) -> tuple[tuple[FrozenTower | OwnTower, LanguageTower], RunConfig]:
    """Both towers, and the settings with the name of an encoder that was brought."""
    if own is None:
        vision_backbone.check_vision(located(settings.vision))
    encoder, settings = _encoder(settings, own)
    return (encoder, language_loading.load_language(located(settings.language))), settings


def _is_published(path: Path) -> bool:
    if (path / ADAPTER_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return False
    return is_transformers(read_config(path, str(path)))


def read_adapter(source: str | Path) -> tuple[dict[str, Tensor], QFormerSize, str, float]:
    """An adapter without its towers: tensors, size, LAVIS' name of its projection, epsilon of its norm.

    Raises:
        ConfigError: nothing to load there, or it is broken or has no projection.
    """
    path = place(source)
    if path.is_file() or _is_published(path):
        published = read_lavis(path) if path.is_file() else read_transformers(path, str(source))
        tensors, size, eps = dict(published.tensors), published.size, published.norm_eps
        writes = published.directory is not None and inside.writes_apart(published.directory)
        projection = published.projection_in_lavis(encoder_decoder=writes)
    else:
        directory = adapter_directory(path)
        description, size, profile = _described(directory / CONFIG_FILE)
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


def _encoder(settings: RunConfig, own: Callable[[Tensor], Any] | None) -> tuple[FrozenTower | OwnTower, RunConfig]:
    """The encoder that the settings name, or one that was brought, under whose name the settings then go."""
    if own is None:
        return vision_backbone.load_vision(located(settings.vision)), settings
    tower = OwnTower(own)
    return tower, dataclasses.replace(settings, vision=VisionConfig(name=tower.name))


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


def described_size(name: str) -> dict[str, Any] | None:
    """The fields of `QFormerSize` that the config of a source of `qformer.init` tells, without its weights.

    None where it has none at hand: a file of LAVIS, or a hub id that cannot be reached.
    """
    path = Path(resources.located(name))
    if not path.is_dir():
        return None if path.suffix in PICKLES else weights.bert_shape(name)
    with suppress(ConfigError):
        return dataclasses.asdict(_described(adapter_directory(path) / CONFIG_FILE)[1])
    described = read_config(path, name)
    return published_size(described) if is_transformers(described) else weights.bert_shape(str(path))


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
    source = given.tokenizer or _words_of(given.init)
    if source is None:
        raise ConfigError(
            "qformer.instruction is on and there is no tokenizer to read it with; set qformer.init to a BERT "
            "checkpoint, qformer.tokenizer to a BERT tokenizer, or qformer.instruction: false."
        )
    return _tokenizer(resources.located(str(source)))


def _words_of(init: Any) -> str | Path | None:
    """Where the tokenizer is that comes with the start: a BERT's own, or that of the first adapter which brings one."""
    sources = _adapters(init)
    if sources is None:
        return init if isinstance(init, str) else None
    for each in sources:
        path = Path(resources.located(each.source))
        places = [path / "qformer_tokenizer"]
        with suppress(ConfigError):
            places.append(adapter_directory(path) / TOKENIZER_FOLDER)
        for folder in places:
            if folder.is_dir():
                return folder
    return None


def _tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # a file that is not whole raises bare exceptions
        raise ConfigError(f"{source}: no tokenizer can be read from there: {reason(error)}") from None


def _check_reading(size: QFormerSize, tokenizer: Any | None, given: QFormerConfig) -> None:
    if tokenizer is None:
        return
    if not language_loading.LEAST_SHARE * size.vocabulary <= len(tokenizer) <= size.vocabulary:
        raise ConfigError(
            f"qformer.tokenizer: '{given.tokenizer or given.init}' has {len(tokenizer)} words and the Q-Former "
            f"{size.vocabulary} word embeddings; use the tokenizer that belongs to qformer.init."
        )
    if given.instruction_limit > size.positions:
        raise ConfigError(
            f"qformer.instruction_limit is {given.instruction_limit} and the Q-Former has {size.positions} positions; "
            f"set it to at most {size.positions}."
        )


def scale_soft_tokens(connector: QFormerConnector, norm: float, generator: torch.Generator) -> None:
    """Query outputs leave a LayerNorm with length √D, so this spread gives soft tokens of the wanted length."""
    weight = connector.projection.weight
    with torch.no_grad():
        weight.normal_(0.0, norm / math.sqrt(weight.shape[0] * weight.shape[1]), generator=generator)
