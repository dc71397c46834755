"""The proof that what is trained on is what was meant: trained tokens decoded and held against their targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qformer.data.batch import Source, StepData, StepMaker, items_of
from qformer.data.mixture import Draw
from qformer.errors import DataError, TrainingError
from qformer.sample import Text
from qformer.text import Joiner, Rendered, word_ids

SURVEYED = 200
"""Records of each set whose targets go through the LLM's tokenizer and back, spread evenly over the set."""


class LabelProof:
    """Decodes the trained tokens of batches and compares them with their targets' own round trip."""

    def __init__(self, joiner: Joiner):
        self.tokenizer, self.profile = joiner.tokenizer, joiner.profile

    def check(self, maker: StepMaker, data: StepData) -> None:
        """Compare a step's batches with the targets of its draws.

        Raises:
            TrainingError: a trained span is not decode(encode(target)), cut to the limit, with the end mark behind it.
        """
        broken = {(task, record) for task, record, _ in data.broken}
        wanted: Counter[tuple[str, str]] = Counter()
        for draw in maker.draws(data.step):
            if (draw.task, maker.sources[draw.task].records.key(draw.place)) in broken:
                continue
            for item in maker.items(draw):
                for target in _targets(item.rendered):
                    wanted[item.name, self.expected(target)] += 1
        found = Counter(
            (name, self.tokenizer.decode(list(piece.ids)).strip())
            for batch in data.batches
            for name, row in zip(batch.samples, batch.rows, strict=True)
            for piece in row
            if isinstance(piece, Text) and piece.trained
        )
        if wanted != found:
            name, text = next(iter((wanted - found) or (found - wanted)))
            trained = [text for each, text in found if each == name]
            raise TrainingError(
                f"sample '{name}': the trained tokens decode to {trained}, and the target to '{text}'; "
                f"check language.profile (separator, end)."
            )

    def expected(self, target: str) -> str:
        """A target as the tokenizer gives it back, cut to the limit, with the end mark."""
        ids = word_ids(self.tokenizer, self.profile.separator + target.strip())
        kept = ids[: self.profile.target_limit - len(self.profile.end)]
        return str(self.tokenizer.decode([*kept, *self.profile.end])).strip()


def lossy_targets(tokenizer: Any, sources: Mapping[str, Source], seed: int) -> list[str]:
    """A line for every set with targets that the LLM's tokenizer cannot give back as they were, with one of them."""
    lines = []
    for name, source in sources.items():
        size = len(source.records)
        lost: list[tuple[str, str]] = []
        seen = 0
        for number in range(min(size, SURVEYED)):
            try:
                items = items_of(source, Draw(number, name, 0, number * size // min(size, SURVEYED)), seed)
            except DataError:
                continue  # told when it is drawn
            for target in (target.strip() for item in items for target in _targets(item.rendered)):
                seen += 1
                back = tokenizer.decode(list(word_ids(tokenizer, target))).strip()
                if back != target:
                    lost.append((target, back))
        if lost:
            target, back = min(lost, key=lambda pair: len(pair[0]))
            lines.append(
                f"{name}: {len(lost)} of {seen} targets lose characters in the LLM's tokenizer: {target!r} comes back "
                f"as {back!r}"
            )
    return lines


def _targets(rendered: Rendered) -> list[str]:
    return [turn.answer for turn in rendered.turns] if rendered.turns else [rendered.target]
