"""Step k of a run as batches: draws, rendering, pictures, ids, and the cut into micro-batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from qformer import keyed
from qformer.assemble import Assembler, Item, Pixels, Prepared
from qformer.cards import TaskCard, TrainCard, probabilities
from qformer.config import DataConfig
from qformer.data.grouping import Groups, read_by_picture
from qformer.data.index import Index
from qformer.data.mixture import Draw, Mixture, dealt
from qformer.data.readers import Records, open_records
from qformer.errors import DataError
from qformer.features import Tally
from qformer.sample import Batch, row_length, trained_tokens
from qformer.text import Templates, Truncations, load_templates, render_train

ALIKE = 16
"""Answers that stand apart are of like length where they differ by fewer tokens than this."""


@dataclass(frozen=True)
class Source:
    """One set of the mixture: its card, its phrasings, its records."""

    card: TaskCard
    section: TrainCard
    templates: Templates
    records: Records

    def described(self) -> dict[str, Any]:
        """Hashes of the card's section and of its templates, the number of records, and a hash of what is in them."""
        return {
            "card": f"{keyed.keyed_hash(json.dumps(asdict(self.section), sort_keys=True)):016x}",
            "templates": f"{keyed.keyed_hash(json.dumps(self.templates.templates)):016x}",
            "records": len(self.records),
            "content": self.records.rows.content,
        }


@dataclass
class StepData:
    """What one process is given for one step.

    `drawn` counts draws per set; `broken` lists records that could not be read, by set and key; `error` is the first of
    them where a broken record is to end the run (it travels as a value, since a worker's exception would bring its
    traceback along).
    """

    step: int
    batches: list[Batch] = field(default_factory=list)
    drawn: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, Any, str]] = field(default_factory=list)
    truncations: Truncations = field(default_factory=Truncations)
    tally: Tally = field(default_factory=Tally)
    error: DataError | None = None

    def pin_memory(self) -> StepData:
        """Asked for by `DataLoader` where there is a GPU."""
        self.batches = [batch.pin_memory() for batch in self.batches]
        return self


def open_sources(
    cards: Mapping[str, TaskCard], root: Path, *, on_error: str = "fail", index: Index | None = None
) -> dict[str, Source]:
    """The training sets of the cards.

    Raises:
        ConfigError: an unknown reader or template.
        DataError: files that are not there, or not of the form expected; with `on_error: fail` also the first record
            that is already known to be broken.
    """
    sources = {
        key: Source(card, card.train, load_templates(card.train.template), open_records(card.train, root, card, index))
        for key, card in cards.items()
        if card.train is not None
    }
    for source in sources.values():
        if source.records.broken and on_error == "fail":
            raise source.records.broken[min(source.records.broken)]
    return sources


def mixture_of(
    sources: Mapping[str, Source],
    settings: DataConfig,
    multipliers: Mapping[str, float],
    seed: int,
    say: Callable[[str], object] = str,
) -> Mixture:
    """The mixture of opened sets: p_d by published (or read) size, passes by the records really there.

    `say` is given a line where records are sorted by picture and that takes a while.
    """
    sizes = {key: source.section.size or len(source.records) for key, source in sources.items()}
    shares = probabilities(sizes, multipliers, settings.sampling)
    here = {key: len(source.records) for key, source in sources.items()}
    return Mixture(shares, here, seed, groups_of(sources, settings.per_picture, say))


def groups_of(sources: Mapping[str, Source], per: int | None, say: Callable[[str], object] = str) -> dict[str, Groups]:
    """The groups of each set in which any two records share a picture; none where `data.per_picture` is off."""
    if per is None:
        return {}
    found = {key: read_by_picture(source.records, say) for key, source in sources.items()}
    return {key: Groups(each, per) for key, each in found.items() if each.shared}


def told_groups(mixture: Mixture, per: int | None) -> str | None:
    """Which sets of a mixture come in groups, and on how many pictures their records are; None where none was to."""
    if per is None:
        return None
    sets = [f"{name} ({each.records:,} records on {each.pictures:,} pictures)" for name, each in mixture.groups.items()]
    alone = [name for name in mixture.names if name not in mixture.groups]
    said = [f"up to {per} records on one picture are drawn together in {', '.join(sets)}"] if sets else []
    said += [f"no two records share a picture in {', '.join(alone)}"] if alone else []
    return f"data.per_picture: {'; '.join(said)}"


def items_of(source: Source, draw: Draw, seed: int) -> list[Item]:
    """The rows of one draw in words: one, or one per turn of a dialogue.

    Raises:
        DataError: the record is broken.
    """
    sample = source.records[draw.place]
    rendered = render_train(source.section, source.templates, sample, seed, draw.turn)
    return [Item(sample.id, sample.images, each) for each in rendered]


class StepMaker(Dataset[StepData]):
    """Makes the batches of step k for one rank: a data set over steps, for a `DataLoader` without batching.

    packed: rows share tensor rows; apart: prompts and answers have tensors of their own, as in an encoder–decoder.
    """

    def __init__(
        self,
        mixture: Mixture,
        sources: Mapping[str, Source],
        assembler: Assembler,
        *,
        batch_size: int,
        steps: int,
        soft_tokens: int,
        micro_batch_tokens: int | None = None,
        packed: bool = False,
        apart: bool = False,
        rank: int = 0,
        ranks: int = 1,
        on_error: str = "fail",
    ):
        self.mixture, self.sources, self.assembler = mixture, dict(sources), assembler
        self.batch_size, self.steps, self.soft_tokens = batch_size, steps, soft_tokens
        self.micro_batch_tokens, self.packed, self.apart = micro_batch_tokens, packed, apart
        self.rank, self.ranks, self.on_error = rank, ranks, on_error

    def __len__(self) -> int:
        return self.steps

    def draws(self, step: int) -> list[Draw]:
        """This rank's draws of a step: every `ranks`-th of `batch_size` consecutive ones, or whole groups of them."""
        first = step * self.batch_size
        if self.mixture.groups and self.ranks > 1:
            drawn = [self.mixture.draw(number) for number in range(first, first + self.batch_size)]
            return dealt(drawn, self.ranks)[self.rank]
        return [self.mixture.draw(number) for number in range(first + self.rank, first + self.batch_size, self.ranks)]

    def __getitem__(self, step: int) -> StepData:
        data = StepData(step)
        pixels: Pixels = {}
        prepared: list[Prepared] = []
        self.assembler.joiner.truncations, self.assembler.tally = data.truncations, data.tally
        for draw in self.draws(step):
            data.drawn[draw.task] += 1
            try:
                key = (self.mixture.seed, step)
                prepared += [self.assembler.prepare(i, pixels, answered=True, key=key) for i in self.items(draw)]
            except DataError as error:
                if self.on_error == "fail":
                    data.error = error
                    return data
                data.broken.append((draw.task, self.sources[draw.task].records.key(draw.place), str(error)))
        data.batches = [self.assembler.batch(group, pixels) for group in self.groups(prepared)]
        return data

    def items(self, draw: Draw) -> list[Item]:
        """The rows of one draw in words."""
        return items_of(self.sources[draw.task], draw, self.mixture.seed)

    def groups(self, prepared: Sequence[Prepared]) -> Iterator[list[Prepared]]:
        """Rows by falling length, cut so that a micro-batch holds at most the budget of LLM positions: those of its
        rows where they are packed, else those of a padded rectangle; of two where prompts and answers stand apart.
        There rows go by answers of like length first, since one long answer would pad the answers of all beside it.

        Where records come in groups, rows on the same pictures follow the longest of them, since a picture is encoded
        once in each micro-batch that it is in.
        """
        budget = self.micro_batch_tokens or 0
        group: list[Prepared] = []
        filled = longest = answer = 0
        ordered = sorted(prepared, key=self._falling)
        if self.mixture.groups:
            mates: dict[tuple[str, ...], list[Prepared]] = {}
            for each in ordered:
                mates.setdefault(each.pictures, []).append(each)
            ordered = [each for rows in mates.values() for each in rows]
        for each in ordered:
            length, target = self._sides(each)
            padded = (max(longest, length) + max(answer, target)) * (len(group) + 1)
            if group and budget and (filled + length if self.packed else padded) > budget:
                yield group
                group, filled, longest, answer = [], 0, 0, 0
            group.append(each)
            filled, longest, answer = filled + length, max(longest, length), max(answer, target)
        if group:
            yield group

    def _sides(self, item: Prepared) -> tuple[int, int]:
        """Positions of a row, and of what stands apart from it."""
        target = trained_tokens(item.row) if self.apart else 0
        return row_length(item.row, self.soft_tokens) - target, target

    def _falling(self, item: Prepared) -> tuple[int, int]:
        length, target = self._sides(item)
        return -(target // ALIKE), -length
