"""How another code base asks and decodes, in place of a card's own ways: a file under `configs/decoding`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from qformer import config, presets
from qformer.cards import Decoding, EvalCard, TaskCard
from qformer.errors import ConfigError, did_you_mean

Kind = Literal["encoder_decoder", "decoder_only"]


@dataclass(frozen=True)
class Rule:
    """What is asked in place of the template of some cards."""

    template: str
    """Of the cards it is for."""
    asks: str
    """The template in its place."""
    cards: list[str] = field(default_factory=list)
    """Those it is for; none: all with that template."""
    llm: Kind | None = None
    behind: str | None = None
    """A piece of preface that the cards must have; the new template has it in its own words."""
    max_new_tokens: int | None = None
    """Of an answer, in place of the preset's."""


@dataclass(frozen=True)
class Habits:
    """A file of them."""

    name: str
    version: int
    source: str
    presets: dict[str, str]
    """By kind of LLM, the preset whose `answer` decoding and ranking hold."""
    captions: dict[str, Decoding]
    """By kind of LLM, how captions are decoded."""
    caption_metrics: list[str] = field(default_factory=list)
    """Those that tell a captioning card."""
    prefaces: dict[str, str] = field(default_factory=dict)
    """Pieces of preface, and what is written in their place."""
    rules: list[Rule] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    """Cards that it lets the model write for; where they rank, their variant `generated` does that."""

    def __post_init__(self) -> None:
        for given in (self.presets, self.captions):
            if set(given) != {"encoder_decoder", "decoder_only"}:
                raise ConfigError(
                    f"presets and captions are for {', '.join(sorted(given)) or 'no LLM'}; they take encoder_decoder "
                    f"and decoder_only, both."
                )


def load(name: str) -> Habits:
    """A shipped file, or a YAML file of the same form.

    Raises:
        ConfigError: no such file, or a wrong key or type in it.
    """
    return config.shipped(Habits, "configs/decoding", name, "way of decoding")


def with_habits(card: TaskCard, habits: Habits, *, encoder_decoder: bool) -> TaskCard:
    """A card that asks and decodes so; the habits' name joins its variant, so that its score has a place of its own."""
    section = card.eval
    assert section is not None, card.key
    kind: Kind = "encoder_decoder" if encoder_decoder else "decoder_only"
    preset = presets.load(habits.presets[kind])
    if section.answer == "rank":
        section = dataclasses.replace(section, normalize=preset.ranking.normalize, end=preset.ranking.end)
    elif section.metric in habits.caption_metrics:
        section = dataclasses.replace(section, decoding=habits.captions[kind])
    elif "answer" in preset.decoding:
        section = dataclasses.replace(section, decoding=preset.decoding["answer"])
    else:
        raise ConfigError(
            f"{habits.name}: the preset '{preset.name}' does not say how answers are decoded."
            f"{did_you_mean('answer', preset.decoding)}"
        )
    section = _asked(section, card.name, habits, kind)
    return dataclasses.replace(card, eval=section, variant="+".join(filter(None, (card.variant, f"as_{habits.name}"))))


def unlike(cards: Iterable[TaskCard], habits: Habits) -> list[str]:
    """In sentences, for which cards the other code would not rank."""
    return [
        f"{card.key}: its candidates are ranked, where {habits.name} lets the model write; "
        f"{card.name}:generated does so."
        for card in cards
        if card.name in habits.writes and card.eval is not None and card.eval.answer == "rank"
    ]


def overruled(cards: Iterable[TaskCard], habits: Habits, *, encoder_decoder: bool) -> list[str]:
    """In sentences, which cards rank by another score than the other code, whose own is taken."""
    ranking = presets.load(habits.presets["encoder_decoder" if encoder_decoder else "decoder_only"]).ranking
    return [
        f"{card.key}: its candidates are ranked by '{ranking.normalize}', as {habits.name} does, and not by "
        f"'{card.eval.normalize}'; leave one of the two out."
        for card in cards
        if card.eval is not None and card.eval.answer == "rank" and card.eval.normalize != ranking.normalize
    ]


def _asked(section: EvalCard, name: str, habits: Habits, kind: Kind) -> EvalCard:
    preface = section.preface
    for rule in habits.rules:
        meant = rule.template == section.template and (not rule.cards or name in rule.cards)
        if meant and rule.llm in (None, kind) and (rule.behind is None or rule.behind in preface):
            preface = [piece for piece in preface if piece != rule.behind]
            section = dataclasses.replace(section, template=rule.asks)
            if rule.max_new_tokens is not None and section.answer == "generate":
                decoding = dataclasses.replace(section.decoding, max_new_tokens=rule.max_new_tokens)
                section = dataclasses.replace(section, decoding=decoding)
            break
    return dataclasses.replace(section, preface=[habits.prefaces.get(piece, piece) for piece in preface])
