"""How another code base asks and decodes, in place of a card's own ways: a file under `configs/decoding`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from qformer import config, presets, resources
from qformer.cards import Decoding, EvalCard, TaskCard
from qformer.errors import ConfigError, did_you_mean

Kind = Literal["encoder_decoder", "decoder_only"]


@dataclass(frozen=True)
class Rule:
    """What is asked in place of the template or the preface of some cards; what is null stays."""

    template: str
    """Of the cards it is for."""
    card: str | None = None
    """The one it is for; null: all with that template."""
    llm: Kind | None = None
    asks: str | None = None
    """A template."""
    preface: list[str] | None = None


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
    rules: list[Rule] = field(default_factory=list)

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
    path = resources.find("configs/decoding", name, "way of decoding")
    return config.structured(Habits, [(str(path), config.read_yaml(path))])


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


def _asked(section: EvalCard, name: str, habits: Habits, kind: Kind) -> EvalCard:
    for rule in habits.rules:
        if rule.template == section.template and rule.card in (None, name) and rule.llm in (None, kind):
            return dataclasses.replace(
                section,
                template=rule.asks or section.template,
                preface=section.preface if rule.preface is None else rule.preface,
            )
    return section
