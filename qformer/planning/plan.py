"""`qformer plan`: what a run would take, reckoned before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from qformer import cards, devices, dryrun, hub, named
from qformer.backbones import blueprints, ranking
from qformer.backbones.blueprints import language_parameters
from qformer.cards import TaskCard
from qformer.config import RunConfig
from qformer.data.batch import groups_of
from qformer.data.mixture import Mixture
from qformer.errors import ConfigError, DataError
from qformer.nn.qformer import QFormerSize
from qformer.planning import memory, shapes, speed, trace, work
from qformer.planning.memory import Activations, Choice, Weights
from qformer.planning.shapes import LLMKind, MicroBatch, Steps
from qformer.planning.speed import Speed
from qformer.planning.work import EncoderWork, LLMWork
from qformer.render import joiner_of

PAPER_HOURS, PAPER = 576, "16 A100 of 40 GB for 1.5 days"
"""What the paper says its tuning took."""
LENGTHS = "configs/planning/lengths.yaml"
WORDS = ("name", "known from", "remark")
"""Columns of words; others hold numbers."""
MORE = 1.05
"""A part that takes so many times what its operations do is waiting for launches."""
HERE = "here"
"""In the place of a GPU's name: this machine, timed."""
CACHED = ("float16", 2)


@dataclass(frozen=True)
class Sizes:
    """The towers on the meta device, and what their sizes are known from."""

    tower: Any
    model: Any
    encoder: EncoderWork
    language: LLMWork
    former: QFormerSize
    weights: Weights
    known_from: dict[str, str]


@dataclass(frozen=True)
class Data:
    """The mixture as rows: steps of one process, the cards, the sets that are not there, why words are not counted."""

    mixture: Mixture
    kind: LLMKind
    steps: Steps
    cards: dict[str, TaskCard]
    missing: tuple[str, ...]
    untokenized: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run takes: bytes by part at the worst moment, operations and seconds of a step by part."""

    moment: str
    held: dict[str, float]
    work: dict[str, float]
    seconds: dict[str, float]
    heaviest: MicroBatch
    activations: Activations
    choice: Choice
    context: float
    """Bytes that the process holds beside its tensors."""
    launches: dict[str, float]
    """Operations that each part launches in the heaviest micro-batch, both passes."""
    launched: tuple[str, ...]
    """Parts whose kernels take longer to launch than to compute."""

    @property
    def bytes(self) -> float:
        """The most memory that is held at once."""
        return sum(self.held.values())

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def plan(
    settings: RunConfig, *, gpu: str = HERE, gpus: int = 1, efficiency: float | None = None
) -> Iterator[Text | Table]:
    """Tables and blocks of text, in the order in which they are to be read.

    Where this machine is timed without a GPU, the process has its allocator keep freed memory from then on, as that of
    a run does.

    Args:
        settings: the run.
        gpu: a known GPU, or `here` for this machine, whose parts are timed.
        gpus: how many work together.
        efficiency: the share of a known GPU's peak that every part reaches, launches included; None: the shares that
            are shipped.

    Raises:
        ConfigError: an unknown GPU, options that do not go together, whatever of cards and settings a run would
            refuse, or a tower whose sizes cannot be had.
        DataError: a set without a published size is not there.
    """
    check(settings, gpu, gpus, efficiency)
    with hub.asked_if_there():
        found = sizes(settings)
        data = look(settings, found, gpus)
    yield _head(settings, gpu, gpus)
    yield _parameters(settings, found)
    yield from rows(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = speed_of(settings, found, data.steps, gpu, efficiency, device)
    on_cpu = gpu == HERE and device.type == "cpu"
    made = reckon(settings, found, data.steps, rates, gpus=gpus, on_cpu=on_cpu)
    yield from _memory(settings, found, made, gpu, gpus)
    yield from _time(settings, found, data.steps, made, gpu, gpus, efficiency)
    yield _disk(settings, found, data)


def check(settings: RunConfig, gpu: str, gpus: int, efficiency: float | None) -> None:
    """Refuse, before anything is reckoned, what cannot be planned.

    Raises:
        ConfigError: says what would work.
    """
    if gpus < 1:
        raise ConfigError(f"plan: --gpus is {gpus}; it takes a number of GPUs, at least 1.")
    if gpus > settings.train.batch_size:
        raise ConfigError(
            f"plan: --gpus is {gpus}, and a step has {settings.train.batch_size} samples (train.batch_size), so that "
            f"some GPUs would have none; take fewer of them, or a larger batch."
        )
    if gpu == HERE:
        if gpus > 1 or efficiency is not None:
            raise ConfigError(
                f"plan: --{'gpus' if gpus > 1 else 'efficiency'} goes with a known GPU's name, and this machine is "
                f"timed as it is; add --gpu, such as --gpu h200."
            )
    else:
        speed.on(gpu, settings, efficiency)
    if sharded(settings) and gpus == 1:
        raise ConfigError(
            "plan: language.shard spreads the LLM over several GPUs, and one is planned with; add --gpus with more."
        )


def sharded(settings: RunConfig) -> bool:
    """Whether each GPU holds a part of the frozen LLM alone."""
    return bool(getattr(settings.language, "shard", False))


def sizes(settings: RunConfig) -> Sizes:
    """The towers' sizes from their configs or architectures; no weight is read.

    Raises:
        ConfigError: those of a tower cannot be had.
    """
    tower = blueprints.blank_vision(named.located(settings.vision))
    model, known_from = blueprints.blank_language(named.located(settings.language))
    model.requires_grad_(False)
    encoder, language = work.encoder_work(tower), work.language_work(model)
    former, former_from = dryrun.adapter_size(settings)
    former = dataclasses.replace(former, vision_width=encoder.width, dropout=settings.qformer.dropout)
    trained, frozen = dryrun.adapter_parameters(former, encoder.width, language.width, settings.train.only)
    blocks = language.decoder.weights + language.decoder.source
    blocks += language.encoder.weights + language.encoder.source if language.encoder else 0
    rest = language_parameters(model) - blocks
    return Sizes(
        tower,
        model,
        encoder,
        language,
        former,
        Weights(blueprints.count(tower), blocks, rest, trained, frozen),
        {"image encoder": "its architecture", "LLM": known_from, "adapter": former_from},
    )


def look(settings: RunConfig, found: Sizes, ranks: int = 1) -> Data:
    """The rows of the mixture's first steps.

    Raises:
        DataError: a set without a published size is not there, or no draw has a row.
    """
    chosen, multipliers = cards.mixture(settings.data)
    sources, missing = dryrun.opened(chosen, settings)
    published = {key: dryrun.size_of(card, sources, missing) for key, card in chosen.items()}
    shares = cards.probabilities(published, multipliers, settings.data.sampling)
    here = {key: len(source.records) for key, source in sources.items()}
    per = settings.data.per_picture
    away = {key: published[key] for key in missing}
    groups = groups_of(sources, per) | shapes.stated_groups(chosen, away, per)
    mixture = Mixture(shares, {**published, **here}, settings.seed, groups)
    joiner, why = None, ""
    if sources:
        try:
            joiner = joiner_of(settings)
        except ConfigError as error:
            why = str(error)
    coder = found.language.encoder is not None
    starts = 1 + (len(joiner.profile.decoder_opening) if joiner else 0)
    kind = LLMKind(found.language.width, coder, not coder and settings.language.packing, starts)
    steps = shapes.steps_of(settings, mixture, chosen, sources, joiner, kind, ranks)
    if not steps.micro_batches:
        raise DataError(
            f"plan: all of the first {steps.broken} draws are of broken records; qformer data check --data "
            f"{settings.data.root} says what is wrong with them."
        )
    return Data(mixture, kind, steps, chosen, tuple(missing), why)


def work_of(settings: RunConfig, found: Sizes, micro: MicroBatch) -> dict[str, float]:
    """Operations of a micro-batch by part."""
    parts = found.language.encoder is None and micro.trained > ranking.LOGITS_AT_ONCE // found.language.vocabulary
    return {
        "encoder": micro.pictures * found.encoder.picture,
        "adapter": work.former_step(found.former, found.language.width, found.encoder.tokens, micro),
        "language": found.language.step(micro, settings.language.gradient_checkpointing),
        "head": found.language.head(micro, parts),
    }


def speed_of(
    settings: RunConfig,
    found: Sizes,
    steps: Steps,
    gpu: str,
    efficiency: float | None,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Of a known GPU by its peak; of this machine by timing."""
    if gpu != HERE:
        return speed.on(gpu, settings, efficiency)
    devices.choose_attention(device)
    return speed.here(
        settings, usual(settings, found, steps), found.tower, found.encoder, found.model, found.language,
        found.former, device, clock,
    )  # fmt: skip


def usual(settings: RunConfig, found: Sizes, steps: Steps) -> MicroBatch:
    """The micro-batch whose work is nearest to the mean."""
    amounts = {each: sum(work_of(settings, found, each).values()) for each in steps.micro_batches}
    mean = sum(sum(work_of(settings, found, each).values()) for each in steps.micro_batches) / len(steps.micro_batches)
    return min(amounts, key=lambda each: abs(amounts[each] - mean))


def reckon(
    settings: RunConfig,
    found: Sizes,
    steps: Steps,
    rates: Speed,
    *,
    gpus: int = 1,
    on_cpu: bool = False,
) -> Plan:
    """Memory, operations and seconds of a step."""
    heaviest = max(steps.micro_batches, key=lambda each: (each.computed, each.reads))
    autocast = speed.autocast_of(settings)
    queries = settings.qformer.queries
    most = ranking.LOGITS_AT_ONCE // found.language.vocabulary
    side = found.tower.settings.size
    seeing, reading = (speed.autocast_of(settings, each.dtype) for each in (settings.vision, settings.language))
    with nullcontext() if on_cpu else trace.as_on_a_gpu():
        language = trace.language_held(found.model, heaviest, queries, reading)
    activations = Activations(
        encoder=trace.encoder_held(found.tower, heaviest, seeing),
        adapter=trace.former_held(found.former, found.language.width, found.encoder.tokens, heaviest, autocast),
        language=language,
        boundary=float(heaviest.computed * found.language.width * memory.BYTES[settings.language.dtype]),
        computed=heaviest.computed,
        pixels=2.0 * steps.mean("pictures") * 3 * side * side * 4 if on_cpu else 0.0,
        dtype=settings.language.dtype,
        logits_alone=found.language.encoder is None and heaviest.trained > most,
    )
    choice = Choice(
        settings.vision.dtype,
        settings.language.dtype,
        memory.bits_of(settings.language.quantization),
        settings.language.gradient_checkpointing,
        heaviest.computed,
        max(map(len, steps.steps)) > 1,
        gpus,
        sharded(settings),
    )
    context = memory.AT_WORK if on_cpu else memory.CONTEXT
    moment, held = memory.peak(found.weights, activations, choice, context)
    amounts: dict[str, float] = dict.fromkeys(speed.PARTS, 0.0)
    seconds: dict[str, float] = dict.fromkeys(speed.PARTS, 0.0)
    again = settings.language.gradient_checkpointing
    launches = {"adapter": activations.adapter.launches, "language": language.launches(again)}
    for micro in steps.micro_batches:
        each = work_of(settings, found, micro)
        for part, amount in each.items():
            amounts[part] += amount / len(steps.steps)
        for part, taken in rates.seconds(each, launches).items():
            seconds[part] += taken / len(steps.steps)
    slower = {part for part in rates.launch if seconds[part] * rates.rates[part] > MORE * amounts[part]}
    seconds = {part: taken for part, taken in seconds.items() if taken}
    seconds["optimizer"] = found.weights.trained * rates.optimizer
    launched = tuple(part for part in speed.PARTS if part in slower)
    return Plan(moment, held, amounts, seconds, heaviest, activations, choice, context, launches, launched)


# -- what is shown ----------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 or column in WORDS else "right")
    return shown


def _notes(*lines: str) -> Text:
    return Text("".join(f"  {line}\n" for line in lines))


def _head(settings: RunConfig, gpu: str, gpus: int) -> Text:
    if gpu == HERE:
        where = "on this machine, whose parts are timed with random weights"
    else:
        where = f"on {gpus} {gpu}" if gpus > 1 else f"on one {gpu}"
    steps = f"{settings.train.steps:,} steps of {settings.train.batch_size}"
    return Text.assemble((f"{settings.name}: {steps}, {where}\n", "bold"))


def _parameters(settings: RunConfig, found: Sizes) -> Table:
    shown = _table("parameters", "part", "name", "trained", "frozen", "known from")
    counts, known_from = found.weights, found.known_from
    shown.add_row("image encoder", settings.vision.name, "0", f"{counts.vision:,}", known_from["image encoder"])
    shown.add_row("LLM", settings.language.name, "0", f"{counts.blocks + counts.rest:,}", known_from["LLM"])
    queries = f"{found.former.queries} queries"
    shown.add_row("adapter", queries, f"{counts.trained:,}", f"{counts.frozen:,}", known_from["adapter"])
    return shown


def rows(data: Data) -> Iterator[Text | Table]:
    """What a step is made of, and where that is known from."""
    steps = data.steps
    shown = _table("a step of one process", "what", "mean")
    for what, name in (
        ("pictures encoded", "pictures"), ("reads of the Q-Former", "reads"), ("positions of the LLM", "positions"),
        ("computed, padding among them", "computed"), ("tokens trained on", "trained"),
    ):  # fmt: skip
        shown.add_row(what, f"{steps.mean(name):,.0f}")
    shown.add_row("micro-batches", f"{len(steps.micro_batches) / len(steps.steps):,.1f}")
    yield shown
    notes = [f"{len(steps.steps)} steps of {steps.samples} draws were looked at."]
    if steps.read_from:
        how = "its own tokens" if not data.untokenized else f"letters, {shapes.LETTERS} a token"
        notes.append(f"Counted in {how}: {', '.join(steps.read_from)}.")
    if data.untokenized:
        notes.append(f"No tokenizer can be had here: {data.untokenized}")
    if data.missing:
        notes.append(f"Not here, and taken as {LENGTHS} states them, unmeasured: {', '.join(data.missing)}.")
    if steps.broken:
        notes.append(f"{steps.broken} draws were of broken records, which have no row.")
    yield _notes(*notes)


def _memory(settings: RunConfig, found: Sizes, made: Plan, gpu: str, gpus: int) -> Iterator[Text | Table]:
    room, each = _room(gpu), " on each GPU" if gpus > 1 else ""
    shown = _table(f"memory: {_size(made.bytes)} of {_size(room)}{each}", "part", "held")
    for part, amount in made.held.items():
        if amount:
            shown.add_row(part, _size(amount))
    yield shown
    yield _notes(f"The most is held {made.moment}.", *fit(found, made, gpu, room))


def _room(gpu: str) -> float:
    if gpu != HERE:
        return speed.gpu(gpu).memory * 1e9
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def fit(found: Sizes, made: Plan, gpu: str, room: float) -> Iterator[str]:
    """Whether it fits; if not, what to change, one on top of the other, until it does."""
    if made.bytes <= room * memory.USABLE:
        yield f"It fits: {made.bytes / room:.0%} of the memory."
        return
    yield f"It does not fit into {memory.USABLE:.0%} of {_size(room)}. What to change, each on top of those before it:"
    on_gpu = gpu != HERE or torch.cuda.is_available()
    for change, choice in memory.lighter(made.choice, made.heaviest.span, on_gpu=on_gpu):
        held = memory.peak(found.weights, made.activations, choice, made.context)[1]
        yield f"  {change}: {_size(sum(held.values()))}"
        if sum(held.values()) <= room * memory.USABLE:
            yield "  and then it fits."
            return
    yield "  and still it does not fit: take a smaller LLM, or a larger GPU."


def _time(
    settings: RunConfig, found: Sizes, steps: Steps, made: Plan, gpu: str, gpus: int, efficiency: float | None
) -> Iterator[Text | Table]:
    hours, samples = made.step * settings.train.steps / 3600, settings.train.batch_size / made.step
    shown = _table(
        f"time: {made.step:.3g} s a step, {samples:,.3g} samples/s, {_duration(hours)} for all steps",
        "part", "operations of a sample", "seconds of a step", "share",
    )  # fmt: skip
    for part, seconds in made.seconds.items():
        amount = made.work.get(part, 0.0) / steps.samples
        shown.add_row(part, f"{amount:.3g}" if amount else "–", f"{seconds:.3g}", f"{seconds / made.step:.0%}")
    shown.add_section()
    shown.add_row("in all", f"{sum(made.work.values()) / steps.samples:.3g}", f"{made.step:.3g}", "")
    yield shown
    if gpu == HERE:
        how = "Timed here: single blocks of each part at their true width, times their number."
    else:
        told = ", ".join(f"{part} {share:.0%}" for part, share in speed.shares_of(settings, efficiency).items())
        known = "as you say" if efficiency else "measured in part, on one H200"
        how = f"Taken, {known}: of the peak of {gpu} ({speed.gpu(gpu).source}) {told}."
        if not settings.train.compile:
            counted = ", ".join(f"{part} {number:,.0f}" for part, number in made.launches.items())
            how += f"\n  Operations launched in a micro-batch: {counted}."
        if made.launched:
            how += (
                f"\n  Launching kernels takes longer than computing them: {', '.join(made.launched)}. "
                f"train.compile=true shortens that, and a larger train.micro_batch_tokens may, if it pads little."
            )
    fed = steps.mean("pictures") * gpus / made.step
    notes = [how, f"Not counted: opening pictures (data.workers must bring {fed:,.0f} a second), validation, scoring."]
    if gpus > 1:
        travels = f"{_size(4.0 * found.weights.trained)} of gradients a step"
        if made.choice.sharded:
            whole = found.weights.blocks * memory.BYTES[made.choice.language]
            travels += f", {_size(2.0 * whole)} of the LLM into each GPU a micro-batch"
        notes.append(f"Nor what travels between GPUs: {travels}.")
    spent = hours * gpus
    notes.append(f"{spent:,.3g} GPU hours; the paper's run of FlanT5-XL took {PAPER_HOURS:.0f}: {PAPER}.")
    yield _notes(*notes)


def _disk(settings: RunConfig, found: Sizes, data: Data) -> Table:
    shown = _table("disk", "what", "takes", "remark")
    root = Path(settings.data.root)
    files = {each.into: each.gigabytes for card in data.cards.values() for each in card.downloads}
    here = [into for into in files if (root / into).exists()]
    told = f"as the cards state; {len(here)} of {len(files)} files and folders are there"
    shown.add_row("data", _size(1e9 * sum(files.values())), told)
    pictures = pictures_of(data.cards)
    name, each = CACHED
    cache = float(pictures * found.encoder.tokens * found.encoder.width * each)
    augmented = settings.vision.train_transform.mode == "random_crop" or settings.vision.train_transform.flip > 0
    remark = f"{pictures:,} pictures × {found.encoder.tokens} tokens × {found.encoder.width} × {each} bytes ({name})"
    if augmented:
        remark += "; not while pictures are cropped or flipped at random"
    shown.add_row("feature cache, if you turn it on", _size(cache), remark)
    adapter = 4.0 * (found.weights.trained + found.weights.frozen)
    one = adapter + 8.0 * found.weights.trained
    kept = settings.train.keep_checkpoints
    best = adapter if settings.validation.tasks else 0.0
    remark = f"{kept} kept and one being written, {_size(one)} each"
    if best:
        remark += f"; the best, {_size(best)}, and its successor"
    shown.add_row("checkpoints", _size((kept + 1) * one + 2 * best), remark)
    return shown


def pictures_of(chosen: Mapping[str, TaskCard]) -> int:
    """At most how many distinct pictures a mixture has: sets that share a folder share its pictures."""
    stated, folders = shapes.stated_lengths(), dict[str, int]()
    for key, card in chosen.items():
        assert card.train is not None, key
        folder = str(card.train.files.get("images", key))
        count = stated.of(card).pictures or card.train.size or 0
        folders[folder] = max(folders.get(folder, 0), count)
    return sum(folders.values())


def _size(amount: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= scale:
            return f"{amount / scale:,.3g} {unit}"
    return f"{amount / 1e3:,.3g} kB"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
