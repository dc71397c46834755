"""The proof that what is trained on is what was meant: trained tokens decoded and held against their targets."""

from __future__ import annotations

from collections import Counter

from qformer.data.batch import StepData, StepMaker
from qformer.errors import TrainingError
from qformer.sample import Text
from qformer.text import Joiner, Rendered


class LabelProof:
    """Decodes the trained tokens of batches and compares them with their targets' own round trip."""

    def __init__(self, joiner: Joiner):
        self.tokenizer, self.profile = joiner.tokenizer, joiner.profile
        self.lossy: Counter[str] = Counter()

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
                    self.lossy[draw.task] += self.loses_characters(target)
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
        ids = self.tokenizer(self.profile.separator + target.strip(), add_special_tokens=False).input_ids
        kept = list(ids[: self.profile.target_limit - len(self.profile.end)])
        return str(self.tokenizer.decode([*kept, *self.profile.end])).strip()

    def loses_characters(self, target: str) -> bool:
        """Whether the tokenizer cannot give a target back as it was."""
        ids = self.tokenizer(target.strip(), add_special_tokens=False).input_ids
        return bool(self.tokenizer.decode(list(ids)).strip() != target.strip())

    def summary(self) -> list[str]:
        """A line per set with targets that the tokenizer cannot give back."""
        return [
            f"{name}: {count} of the first targets lose characters in the LLM's tokenizer"
            for name, count in sorted(self.lossy.items())
            if count
        ]


def _targets(rendered: Rendered) -> list[str]:
    return [turn.answer for turn in rendered.turns] if rendered.turns else [rendered.target]
