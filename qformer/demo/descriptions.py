"""Scenes in words, and what is asked about them: what the demo's LLMs and its BERT are taught with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from qformer.demo import scenes
from qformer.demo.scenes import Dice, Scene
from qformer.text import lettered, load_templates

TEXT_SEED, TEXT_TEST_SEED = 72_001, 72_002

FORM_WEIGHTS = {
    "attribute": 3, "relation": 4, "word": 1, "place": 2, "exists": 2, "side": 4, "count": 1, "query": 4, "two_step": 2,
    "verify": 4, "choose": 3, "statement": 5, "which": 3, "options": 3,
}  # fmt: skip
FORMS = [form for form, weight in FORM_WEIGHTS.items() for _ in range(weight)]
FINDING = ("attribute", "place")
JUDGING = (
    "attribute", "place", "exists", "side", "side", "statement", "statement", "relation", "query", "verify", "word",
)  # fmt: skip
TOLD = ("attribute", "exists", "place", "relation", "side", "count", "word")
"""Forms of a dialogue's questions, which are answered in sentences."""


@dataclass(frozen=True)
class Exchange:
    """What is asked and answered in words; a dialogue has several turns.

    `mentions`: words of the first question that name one thing, and that thing.
    """

    turns: tuple[tuple[str, str], ...]
    form: str = ""
    mentions: tuple[tuple[str, scenes.Thing], ...] = ()


@dataclass(frozen=True)
class Description:
    """A scene in words: a group a phrase, in no order; and what is asked about it."""

    groups: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


@cache
def wordings(name: str) -> tuple[str, ...]:
    """The shipped templates of a name."""
    return tuple(load_templates(name).templates)


def text_scene(seed: int, number: int, things: Sequence[int]) -> Scene:
    """What the LLM reads about: half of the scenes have the pairs that no training picture shows."""
    return scenes.sample_scene(seed, number, held_out=number % 2 == 1, things=things)


def described(
    scene: Scene,
    dice: Dice,
    *,
    count: int,
    forms: Sequence[str] = FORMS,
    terse: float = 0.0,
    plain: float = 0.0,
    telling: bool = True,
) -> Description:
    """A scene with two questions in each of `count` forms and, where `telling`, a caption, a dialogue, a VQG pair."""
    exchanges: list[Exchange] = []
    for _ in range(count):
        form = dice.choose(forms)
        found = list(scenes.FORMS[form](scene, dice))
        for _ in range(2):
            if found:
                answer = dice.choose(sorted({ask.answer for ask in found}))
                ask = dice.choose([ask for ask in found if ask.answer == answer])
                if ask.type in TERSE and dice.chance(terse):
                    exchanges.append(Exchange(((in_brief(ask.question), ask.answer),), form, ask.mentions))
                elif not ask.options and dice.chance(plain):
                    exchanges.append(Exchange(((ask.question, ask.answer),), form, ask.mentions))
                else:
                    exchanges.append(asked(ask, dice))
    if not telling:
        return Description(groups(scene, dice), tuple(dice.shuffled(exchanges)))
    if dice.chance(0.7):
        exchanges.append(
            Exchange(((dice.choose(wordings("caption")), scenes.captions(scene, 1, dice.below(99))[0]),), "caption")
        )
    told = dice.shuffled(scenes.FORMS[dice.choose(TOLD)](scene, dice))
    if len(told) > 1 and dice.chance(0.5):
        exchanges.append(Exchange(tuple((ask.question, ask.sentence) for ask in told[:2]), "dialogue"))
    if told and dice.chance(0.25):
        wording = dice.choose(wordings("vqg")).format(answer=told[0].answer)
        exchanges.append(Exchange(((wording, told[0].question),), "vqg"))
    return Description(groups(scene, dice), tuple(dice.shuffled(exchanges)))


TERSE = (*scenes.ATTRIBUTES, "place")
UNSAID = {"What", "is", "the", "of", "that", "Of", "Which", "How"}


def in_brief(question: str) -> str:
    """The key words of a question: "What colour is the small cube?" is "colour small cube"."""
    return " ".join(word for word in question.removesuffix("?").split() if word not in UNSAID)


def groups(scene: Scene, dice: Dice) -> tuple[str, ...]:
    """A phrase a thing; some places are said to hold nothing, and some things are told twice or in part."""
    told = [scenes.phrase(thing) for thing in scene.things]
    taken = {thing.place for thing in scene.things}
    free = [f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS if f"{row} {column}" not in taken]
    told += [f"nothing {place}" for place in dice.shuffled(free)[: dice.below(len(free) + 1)]]
    if dice.chance(0.3):
        told.append(dice.choose(told))
    return tuple(dice.shuffled(told))


def asked(ask: scenes.Ask, dice: Dice) -> Exchange:
    """A question in one of the wordings that the library's templates have."""
    fields = {"question": ask.question, "statement": ask.question, "options": lettered(ask.options)}
    if ask.form == "statement":
        wording = wordings("vsr_zero_shot")[0]
    elif ask.options and dice.chance(0.8):
        wording = wordings("multiple_choice")[0]
    else:
        chance = dice.below(10)
        wording = (
            "{question}" if chance < 5 else wordings("short_answer")[0] if chance < 7 else dice.choose(wordings("vqa"))
        )
    return Exchange(((wording.format(**fields), ask.answer),), ask.form, ask.mentions)


def corpus(count: int) -> Iterator[str]:
    """Texts for tokenizers and the BERT: descriptions, questions and answers."""
    for number in range(count):
        dice = Dice("corpus", TEXT_SEED, number)
        found = described(text_scene(TEXT_SEED, number, (2, 3, 4)), dice, count=6)
        yield ", ".join(found.groups) + "."
        for exchange in found.exchanges:
            for question, answer in exchange.turns:
                yield f"{question} {answer}"
