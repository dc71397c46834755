"""How large the tensors of a step are: rows of seeded steps, counted where the data are there, else of stated lengths.

B tensor rows of S positions, N reads, T instruction ids of a read in the mean, M trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from qformer import config, images, keyed
from qformer.assemble import Assembler, Prepared, reads_of
from qformer.backbones import packing
from qformer.cards import TaskCard
from qformer.config import RunConfig
from qformer.data.batch import Source, StepMaker
from qformer.data.grouping import ByPicture, Groups
from qformer.data.mixture import Draw, Mixture
from qformer.errors import DataError
from qformer.sample import Slot, Text, Video, row_length, trained_tokens
from qformer.text import Joiner

DRAWS = 768
"""How many samples are looked at, at least; whole steps of them."""
LETTERS = 4
"""Letters that make a token, where no tokenizer can be had."""


@dataclass(frozen=True)
class Stated:
    """Lengths of a set that is not there: three each, of which a quarter, a half and a quarter are drawn."""

    prompt: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    rows: int = 1
    pictures: int | None = None


@dataclass(frozen=True)
class StatedLengths:
    """`configs/planning/lengths.yaml`: by set, by category, and for whatever is left."""

    sets: dict[str, Stated] = field(default_factory=dict)
    categories: dict[str, Stated] = field(default_factory=dict)
    other: Stated = field(default_factory=Stated)

    def of(self, card: TaskCard) -> Stated:
        """What is stated of a card's set, of its category, or of any."""
        return self.sets.get(card.name) or self.categories.get(card.category) or self.other


@cache
def stated_lengths() -> StatedLengths:
    """The lengths shipped here."""
    return config.shipped(StatedLengths, "configs/planning", "lengths", "list of lengths")


def stated_groups(cards: Mapping[str, TaskCard], sizes: Mapping[str, int], per: int | None) -> dict[str, Groups]:
    """The groups of sets that are not there, of these sizes: as if their records were evenly spread on the pictures
    that are stated; none where `data.per_picture` is off.
    """
    found: dict[str, Groups] = {}
    lengths = stated_lengths()
    for key, size in sizes.items():
        pictures = min(lengths.of(cards[key]).pictures or size, size)
        many, more = divmod(size, pictures)
        counts = tuple(pair for pair in ((many + 1, more), (many, pictures - more)) if pair[1])
        if per is not None and size > pictures:
            found[key] = Groups(ByPicture(counts, range(size)), per)
    return found


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass.

    pictures and reads; `instruction`: T, since the Q-Former pads nothing but the rows of its attention; rows × span:
    what a decoder-only LLM computes, or an encoder–decoder's encoder; written × length: what the decoder of the latter
    computes; trained: M; positions: those of the rows without any padding; packed: whether rows share tensor rows.
    """

    pictures: int
    reads: int
    instruction: int
    rows: int
    span: int
    trained: int
    positions: int
    written: int = 0
    length: int = 0
    packed: bool = False

    @property
    def computed(self) -> int:
        """Positions that the LLM computes, padding among them."""
        return self.rows * self.span + self.written * self.length


@dataclass(frozen=True)
class Steps:
    """Micro-batches of some steps of one process, and what they were made of."""

    steps: tuple[tuple[MicroBatch, ...], ...]
    samples: int
    """Of a step, of one process."""
    read_from: tuple[str, ...]
    """Sets whose own rows were counted."""
    broken: int = 0

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """All of them."""
        return [each for step in self.steps for each in step]

    def mean(self, name: str) -> float:
        """Of a number of `MicroBatch`, its sum over a step, averaged over the steps."""
        return sum(getattr(each, name) for each in self.micro_batches) / len(self.steps)


@dataclass(frozen=True)
class LLMKind:
    """What of an LLM decides on the shapes of its tensors."""

    width: int
    encoder_decoder: bool
    packs: bool
    """Whether rows share tensor rows: of decoder-only LLMs it is taken for granted that they can."""
    starts: int = 1
    """Ids that an encoder–decoder's decoder is given before it writes."""


def steps_of(
    settings: RunConfig,
    mixture: Mixture,
    cards: Mapping[str, TaskCard],
    sources: Mapping[str, Source],
    joiner: Joiner | None,
    kind: LLMKind,
    ranks: int = 1,
) -> Steps:
    """The first steps of a run as one of `ranks` processes makes them; pictures are neither opened nor looked for."""
    maker = maker_of(settings, mixture, sources, packs=kind.packs, apart=kind.encoder_decoder, ranks=ranks)
    count = max(1, -(-DRAWS // max(1, settings.train.batch_size // ranks)))
    broken = 0
    steps = []
    for step in range(min(count, settings.train.steps)):
        prepared, failed = rows_of(maker, step, cards, joiner, settings)
        broken += failed
        steps.append(tuple(shape(group, settings.qformer.queries, kind) for group in maker.groups(prepared)))
    share = -(-settings.train.batch_size // ranks)
    return Steps(tuple(steps), share, tuple(name for name in mixture.names if name in sources), broken)


def maker_of(
    settings: RunConfig, mixture: Mixture, sources: Mapping[str, Source], *, packs: bool, apart: bool, ranks: int = 1
) -> StepMaker:
    """What draws samples and cuts their rows into micro-batches, without an assembler; see `StepMaker`."""
    return StepMaker(
        mixture,
        sources,
        cast(Assembler, None),
        batch_size=settings.train.batch_size,
        steps=settings.train.steps,
        soft_tokens=settings.qformer.queries,
        micro_batch_tokens=settings.train.micro_batch_tokens,
        packed=packs,
        apart=apart,
        ranks=ranks,
    )


def rows_of(
    maker: StepMaker, step: int, cards: Mapping[str, TaskCard], joiner: Joiner | None, settings: RunConfig
) -> tuple[list[Prepared], int]:
    """The rows of a step, those of sets that are not there of stated lengths; and how many of its draws are broken."""
    lengths, prepared, broken = stated_lengths(), list[Prepared](), 0
    for draw in maker.draws(step):
        try:
            prepared += (
                _counted(maker, draw, joiner, settings)
                if draw.task in maker.sources
                else _stated(lengths.of(cards[draw.task]), draw, settings)
            )
        except DataError:
            broken += 1
    return prepared, broken


def shape(group: Sequence[Prepared], queries: int, kind: LLMKind) -> MicroBatch:
    """The tensors that a group of rows is computed in."""
    pictures = {name for each in group for name in each.pictures}
    reads = {(name, each.instruction) for each in group for name in each.pictures}
    trained = [trained_tokens(each.row) for each in group]
    lengths = [row_length(each.row, queries) for each in group]
    made: dict[str, Any] = {
        "pictures": len(pictures),
        "reads": len(reads),
        "instruction": math.ceil(sum(len(words) for _, words in reads) / max(1, len(reads))),
        "positions": sum(lengths),
        "trained": sum(trained),
    }
    if kind.encoder_decoder:
        closed = [length - target + 1 for length, target in zip(lengths, trained, strict=True)]
        length = max(trained) + kind.starts - 1
        return MicroBatch(**made, rows=len(group), span=max(closed), written=len(group), length=length)
    if not kind.packs:
        return MicroBatch(**made, rows=len(group), span=max(lengths))
    bins = packing.cheapest(lengths, kind.width)
    span = max(sum(lengths[number] for number in numbers) for numbers in bins)
    return MicroBatch(**made, rows=len(bins), span=span, packed=True)


def _counted(maker: StepMaker, draw: Draw, joiner: Joiner | None, settings: RunConfig) -> Iterator[Prepared]:
    """The rows of a draw whose set is there, in its own words."""
    for item in maker.items(draw):
        pictures = []
        for picture in item.pictures:
            name = images.picture_key(picture, Path(settings.data.root))
            frames = range(picture.count) if isinstance(picture, Video) else [None]
            pictures += [name if frame is None else f"{name}#{frame}" for frame in frames]
        words = item.rendered
        if joiner is not None:
            read = joiner.read_ids(words.turns[0].instruction if words.turns else words.instruction)
            row = joiner.row(words, reads_of(item.pictures), answered=True)
            yield Prepared(item.name, tuple(pictures), read, row)
            continue
        turns = [*words.history, *words.turns]
        asked = [turn.instruction for turn in turns] + ([] if words.turns else [words.instruction])
        answered = [turn.answer for turn in turns]
        trained = "".join(turn.answer for turn in words.turns) if words.turns else words.target
        told = sum(map(len, asked)) + (0 if words.turns else sum(map(len, answered)))
        yield _dummy(
            item.name, tuple(pictures), len(asked[0 if words.turns else -1]) // LETTERS, told // LETTERS,
            len(trained) // LETTERS + 1, settings,
        )  # fmt: skip


def _stated(stated: Stated, draw: Draw, settings: RunConfig) -> Iterator[Prepared]:
    """The rows of a draw whose set is not there: lengths as stated, by the draw's number; a picture each or a group."""
    picture = str(draw.place) if draw.group is None else f"{draw.turn}/{draw.group}"
    for row in range(stated.rows):
        place = (0, 1, 1, 2)[keyed.keyed_hash(settings.seed, "length", draw.number, row) % 4]
        read = (stated.read or stated.prompt)[place]
        yield _dummy(
            f"{draw.number}.{row}", (f"{draw.task} {picture}",), read, stated.prompt[place], stated.target[place],
            settings,
        )  # fmt: skip


def _dummy(name: str, pictures: tuple[str, ...], read: int, prompt: int, target: int, settings: RunConfig) -> Prepared:
    """A row of so many ids, within the limits of the settings; its read is its own."""
    read, target = min(read + 2, settings.qformer.instruction_limit), min(target, settings.language.target_limit)
    mark = keyed.keyed_hash(name) if settings.qformer.instruction else 0
    ids = (mark, *[0] * (read - 1)) if settings.qformer.instruction else ()
    slots = tuple(Slot(number) for number in range(len(pictures)))
    return Prepared(
        name, pictures, ids, (*slots, Text((0,) * max(1, prompt)), Text((0,) * max(1, target), trained=True))
    )
