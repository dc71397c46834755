"""A published model or adapter (transformers' and LAVIS') between its towers: its preset, and what must fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from qformer import presets, weights
from qformer.backbones import inside, language_loading
from qformer.backbones import language as language_backbone
from qformer.backbones.language import LanguageTower
from qformer.checkpoints import Published, read_embeddings
from qformer.config import LanguageConfig, RunConfig, VisionConfig
from qformer.errors import ConfigError
from qformer.instruction import check_reading, published_tokenizer
from qformer.named import Named, load_towers, located
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.untokenized import MissingTokenizer
from qformer.vlm import VLM


def load_published(
    published: Published, named: Named, tokenizer: str | Path | None, strict: bool, say: Callable[[str], None]
) -> VLM:
    """What was published as `loading.load` gives it, with a table of where every tensor went.

    Raises:
        ConfigError: a tower that is not named, of another width or kind, or weights that do not fit.
    """
    size, directory = published.size, published.directory
    if directory is None and not (named.vision is not None and named.language):
        raise ConfigError(
            f"{published.source}: a file of LAVIS holds the adapter alone; name both towers, as in "
            f"load(..., vision='eva_vit_g.pth', language='google/flan-t5-xl')."
        )
    settings = published_settings(published, named, tokenizer)
    spoken, read, seen = settings.language, settings.qformer, settings.vision
    _same_kind(published, spoken)
    if directory is not None and published.source in (seen.name, spoken.name):  # its own towers are read from there
        weights.weight_files(directory, published.source)
    towers, settings = load_towers(settings, named.encoder)
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
        words = published_tokenizer(published, tokenizer, read, named.revision)
        if not isinstance(words, MissingTokenizer):
            check_reading(size, words, read)
    model = VLM(towers[0], connector, towers[1], words, settings)
    model.lavis_projection = published.projection_in_lavis(encoder_decoder=model.language.is_encoder_decoder)
    return model


def published_settings(published: Published, named: Named, tokenizer: str | Path | None) -> RunConfig:
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
