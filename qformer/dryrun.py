"""What a run would do, told without reading a weight: settings, parameters, mixture, samples, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text

from qformer import cards, config, hub, instruction, loading, named, starting
from qformer.backbones import blueprints
from qformer.backbones.blueprints import Blueprint
from qformer.cards import TaskCard
from qformer.config import RunConfig
from qformer.data.batch import Source, groups_of, items_of, open_sources
from qformer.data.index import Index
from qformer.data.mixture import Mixture
from qformer.errors import ConfigError, DataError
from qformer.evaluate.run import check
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize
from qformer.render import block, joiner_of, words_of

SAMPLES = 10
"""How many are shown of each set."""
STEPS = 20
"""How many are looked at to say how many distinct pictures one has."""
SIZES = ("hidden", "layers", "heads", "intermediate", "queries", "cross_attention_every", "frames")
"""Fields of a Q-Former's size that the settings may fix."""
OF_ENCODER_WIDTH = r"norm\.|qformer\.blocks\.\d+\.cross_attention\.(key|value)\.weight"
OF_LANGUAGE_WIDTH = r"projection\."


def dry_run(settings: RunConfig, samples: int = SAMPLES) -> Iterator[Text | Table]:
    """Blocks of text and tables, in the order in which they are to be read.

    Data that are not there are listed, for training, validation and scores alike, and the mixture is then reckoned with
    the published sizes; towers whose configs cannot be had are named.

    Raises:
        ConfigError: whatever of cards and settings a run would refuse.
        DataError: a set without a published size is not there.
    """
    with hub.asked_if_there():
        yield from _told(settings, samples)


def _told(settings: RunConfig, samples: int) -> Iterator[Text | Table]:
    chosen, multipliers = cards.mixture(settings.data)
    scored = {**cards.validated(settings), **cards.load_all(settings.evaluate.tasks, "eval")}
    yield _settings(settings)
    yield _parameters(settings)
    yield _start(settings)
    sources, missing = opened(chosen, settings)
    sizes = {key: size_of(card, sources, missing) for key, card in chosen.items()}
    shares = cards.probabilities(sizes, multipliers, settings.data.sampling)
    here = {key: len(source.records) for key, source in sources.items()}
    groups = groups_of(sources, settings.data.per_picture)
    mixture = Mixture(shares, {**sizes, **here}, settings.seed, groups)
    yield _mixture(mixture, sizes, multipliers, here, settings)
    if settings.data.per_picture is not None:
        yield _pictures(mixture, here, settings)
    yield from _samples(mixture, sources, settings, samples)
    yield _end(missing, _unscorable(scored, Path(settings.data.root)), settings)


def _settings(settings: RunConfig) -> Text:
    lines = OmegaConf.to_yaml(OmegaConf.structured(settings)).splitlines()
    return Text.assemble(("settings\n", "bold"), *(f"  {line}\n" for line in lines))


# -- parameters -------------------------------------------------------------------------------------------------------


def _parameters(settings: RunConfig) -> Table:
    shown = Table(title="parameters", title_justify="left")
    for column in ("part", "name", "trained", "frozen", "counted from"):
        shown.add_column(column, justify="right" if column in ("trained", "frozen") else "left")
    towers: list[Blueprint | None] = []
    for part, name, read in (
        ("image encoder", settings.vision.name, lambda: blueprints.vision(named.located(settings.vision))),
        ("LLM", settings.language.name, lambda: blueprints.language(named.located(settings.language))),
    ):
        try:
            found = read()
            shown.add_row(part, name, "0", f"{found.parameters:,}", found.known_from)
            towers.append(found)
        except ConfigError as error:
            shown.add_row(part, name, "0", "not known", f"nothing: {error}")
            towers.append(None)
    seen, spoken = towers
    size, known_from = adapter_size(settings)
    widths = seen.width if seen else None, spoken.width if spoken else None
    trained, frozen = adapter_parameters(size, *widths, settings.train.only)
    least = "" if seen and spoken else "at least "
    if least:
        known_from += "; less what is as wide as a tower that is not known"
    shown.add_row("adapter", f"{size.queries} queries", f"{least}{trained:,}", f"{frozen:,}", known_from)
    total = sum(tower.parameters for tower in towers if tower) + frozen
    shown.add_section()
    shown.add_row("in all", "", f"{least}{trained:,}", f"{least}{total:,}", "")
    return shown


def adapter_parameters(
    size: QFormerSize, vision_width: int | None, language_width: int | None, only: Sequence[str] = ()
) -> tuple[int, int]:
    """Trained and frozen parameters of an adapter of this size, less those that are as wide as an unknown tower.

    `only`: the parts that are trained, as `train.only`; none: all.
    """
    with torch.device("meta"):
        former = QFormer(QFormerSize(**{**vars(size), "vision_width": vision_width or 1}))
        made = QFormerConnector(former, language_width or 1)
    unknown = [
        pattern
        for pattern, width in ((OF_ENCODER_WIDTH, vision_width), (OF_LANGUAGE_WIDTH, language_width))
        if width is None
    ]
    known = {
        name: each for name, each in made.named_parameters() if not any(re.match(pattern, name) for pattern in unknown)
    }
    trained = sum(each.numel() for name, each in known.items() if each.requires_grad and starting.covers(only, name))
    return trained, sum(each.numel() for each in known.values()) - trained


def adapter_size(settings: RunConfig) -> tuple[QFormerSize, str]:
    """The Q-Former's size by the settings and the configs of its sources, and where it is known from."""
    given = settings.qformer
    found: dict[str, Any] = {}
    configs: list[str] = []
    unread: list[str] = []
    for name in _sources(settings):
        told = loading.described_size(name)
        (unread if told is None else configs).append(name)
        found = {**(told or {}), **found}
    if not configs:
        with suppress(ConfigError):
            if (tokenizer := instruction.instruction_tokenizer(given)) is not None:
                found["vocabulary"] = len(tokenizer)
    fixed = {name: value for name in SIZES if (value := getattr(given, name)) is not None}
    if given.hidden and not given.intermediate and not configs:
        fixed["intermediate"] = 4 * given.hidden
    known_from = [f"config of {', '.join(configs)}"] if configs else ["the settings"]
    if unread and not configs:
        known_from.append("BERT-base's sizes where they name none")
    size = QFormerSize(**{**found, **fixed, "vision_width": 1, "instruction": given.instruction})
    return size, ", ".join(known_from)


def _sources(settings: RunConfig) -> list[str]:
    """What the adapter starts from, by name."""
    given = settings.qformer.init
    if given is None or isinstance(given, str):
        return [given] if given else []
    return [each.source for each in config.init_sources(given) if each.source not in (starting.NEW, starting.COPIED)]


def _start(settings: RunConfig) -> Text:
    given = settings.qformer.init
    shown = Text("start of the adapter\n", style="bold")
    lines = []
    if given is None:
        lines.append("drawn anew")
    elif isinstance(given, str):
        lines.append(f"{given}{_whereabouts(given)}")
    else:
        for each in config.init_sources(given):
            what = ", ".join(each.parts) or "all that no source above gives"
            lines.append(f"{each.source}{_whereabouts(each.source)}: {what}")
    shown.append("".join(f"  {line}\n" for line in lines), style="not bold")
    return shown


def _whereabouts(name: str) -> str:
    """Says so where a source is a file that is not here."""
    if name in (starting.NEW, starting.COPIED) or name.startswith("demo:") or Path(name).exists():
        return ""
    return " (not here)" if Path(name).suffix or name.startswith((".", "/")) else " (by name: not here, or on the hub)"


# -- data -------------------------------------------------------------------------------------------------------------


def opened(chosen: Mapping[str, TaskCard], settings: RunConfig) -> tuple[dict[str, Source], dict[str, DataError]]:
    """The sets whose files are there, and what is wrong with the others."""
    root, sources = Path(settings.data.root), dict[str, Source]()
    index = Index(root, settings.data.index)
    missing: dict[str, DataError] = {}
    for key, card in chosen.items():
        try:
            sources |= open_sources({key: card}, root, on_error=settings.data.on_error, index=index)
        except DataError as error:
            missing[key] = error
    return sources, missing


def _unscorable(scored: Mapping[str, TaskCard], root: Path) -> dict[str, DataError]:
    """The sets to validate and to score on whose files are not there, and which."""
    missing: dict[str, DataError] = {}
    for key, card in scored.items():
        try:
            check({key: card}, root)
        except DataError as error:
            missing[key] = error
    return missing


def size_of(card: TaskCard, sources: Mapping[str, Source], missing: Mapping[str, DataError]) -> int:
    """S_d: the published size, or the number of records that are there."""
    assert card.train is not None, card.key
    if card.train.size is not None:
        return card.train.size
    if card.key in missing:
        raise missing[card.key]
    return len(sources[card.key].records)


def _mixture(
    mixture: Mixture,
    sizes: Mapping[str, int],
    multipliers: Mapping[str, float],
    here: Mapping[str, int],
    settings: RunConfig,
) -> Table:
    draws = settings.train.steps * settings.train.batch_size
    by = {"sqrt": "in proportion to √S_d", "proportional": "in proportion to S_d", "uniform": "the same for all"}
    steps = f"{settings.train.steps:,} steps of {settings.train.batch_size}"
    shown = Table(
        title=f"mixture: p_d {by[settings.data.sampling]}; {steps} are {draws:,} draws",
        title_justify="left",
        caption="passes: over the records that are here, or over S_d where there are none",
        caption_justify="left",
    )
    for column in ("set", "S_d", "multiplier", "p_d", "records here", "draws", "passes"):
        shown.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    for key, share in mixture.shares().items():
        shown.add_row(
            key, f"{sizes[key]:,}", f"{multipliers[key]:g}", f"{share:.4f}", f"{here[key]:,}" if key in here else "–",
            f"{draws * share:,.0f}", f"{draws * share / mixture.records[key]:,.2f}",
        )  # fmt: skip
    return shown


def _pictures(mixture: Mixture, here: Mapping[str, int], settings: RunConfig) -> Text:
    """How many pictures the sets have that are here, and a step."""
    size, looked = settings.train.batch_size, min(STEPS, settings.train.steps)
    mean = sum(mixture.pictures(first, first + size) for first in range(0, looked * size, size)) / looked
    lines = [
        f"{name}: {mixture.groups[name].pictures:,}, up to {settings.data.per_picture} of whose records come together"
        if name in mixture.groups
        else f"{name}: {here[name]:,}, each with one record"
        for name in mixture.names
        if name in here
    ]
    away = [name for name in mixture.names if name not in here]
    lines += [f"not here, and taken to have a picture a record: {', '.join(away)}"] if away else []
    lines.append(f"a step of {size:,} draws looks at {mean:,.1f} of them (the mean of {looked} steps), set by set")
    return Text.assemble(("pictures\n", "bold"), *(f"  {line}\n" for line in lines))


def _samples(mixture: Mixture, sources: Mapping[str, Source], settings: RunConfig, samples: int) -> Iterator[Text]:
    if not sources:
        return
    joiner, why = None, ""
    try:
        joiner = joiner_of(settings)
    except ConfigError as error:
        why = f"  Shown in words alone, since no tokenizer can be had here: {error}\n"
    heading = "samples: the first of each set, and which tokens are trained on (▸ ◂)\n"
    yield Text.assemble((heading, "bold"), why)
    for task in (name for name in mixture.names if name in sources):
        for number in range(min(samples, mixture.records[task])):
            draw = mixture.nth(task, number)
            yield Text(f"{task}, draw {draw.number} in step {draw.number // settings.train.batch_size}", style="dim")
            try:
                for item in items_of(sources[task], draw, settings.seed):
                    shown = block(joiner, task, item, settings.qformer.queries, ids=False) if joiner else None
                    yield shown or words_of(task, item)
            except DataError as error:
                yield Text(f"  broken: {error}\n")


def _end(missing: Mapping[str, DataError], unscorable: Mapping[str, DataError], settings: RunConfig) -> Text:
    shown, root = Text(), Path(settings.data.root)
    if missing or unscorable:
        shown.append("data that are not there, or cannot be used\n", style="bold")
        if not root.is_dir():
            shown.append(f"  data.root is '{settings.data.root}', and there is no such folder.\n")
        else:
            for use, errors in (("", missing), (", to be scored", unscorable)):
                for key, error in errors.items():
                    said = str(error).partition(" To download:")[0].removeprefix(f"{key}: ")
                    shown.append(f"  {key}{use}: {said}\n")
        shown.append(f"  qformer data check --data {settings.data.root} says what to download and where it goes.\n")
    shown.append("No weight was read.")
    return shown
