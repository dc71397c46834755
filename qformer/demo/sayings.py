"""What the held-in sets of the full mixture ask and say about scenes, beyond what the ordinary demo's sets do.

The frozen LLM of the demo has read none of these forms.  They stay clear of what the held-out sets ask in a manner of
their own: statements to judge, references in two steps, options to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

from qformer.demo import scenes
from qformer.demo.scenes import (
    ATTRIBUTES,
    HELD_OUT_PAIRS,
    PAIRS,
    QUERY,
    WORDS,
    Ask,
    Dice,
    Scene,
    Thing,
    with_article,
    yes_or_no,
)

# -- written words: OCR-VQA and TextCaps ------------------------------------------------------------------------------


def title_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What word is the title?  The one that is written in the picture."""
    for thing in scene.things:
        if thing.word:
            yield Ask("What word is the title?", thing.word, "title", "word")


def says_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What colour is the thing saying sun?"""
    yield from scenes.by_word_asks(scene, "saying", QUERY, "says")


def written_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the word sun written here?"""
    here = {thing.word for thing in scene.things} - {None}
    for word in WORDS if here else ():
        yield Ask(f"Is the word {word} written here?", yes_or_no(word in here), "written", "yes/no")


def caption_with_words(scene: Scene, dice: Dice) -> str:
    """A caption that tells what is written: "a red cube at the top left saying sun and a blue ball at the bottom left".

    In one of three only the thing with the word is told.
    """
    if dice.chance(1 / 3):
        return scenes.joined(_short(thing, placed=False) for thing in scene.things if thing.word)
    placed = dice.chance(0.75)
    return scenes.joined(_short(thing, placed=placed) for thing in sorted(scene.things, key=scenes.reading_order))


# -- facts that no picture shows: OKVQA -------------------------------------------------------------------------------

FACTS: dict[str, dict[str, str]] = {
    "colour": {
        "red": "with the colour of blood",
        "green": "with the colour of grass",
        "blue": "with the colour of the sea",
        "yellow": "with the colour of lemons",
        "purple": "with the colour of plums",
        "orange": "with the colour of carrots",
    },
    "shape": {
        "cube": "with the shape of dice",
        "ball": "with the shape of the moon",
        "cone": "that could hold ice cream",
        "ring": "that could be worn on a finger",
        "star": "with the shape of lights at night",
        "cross": "with the shape of a plus sign",
    },
    "material": {
        "rubber": "that would bounce",
        "metal": "that a magnet would hold",
        "wood": "that a carpenter would make",
    },
    "word": {
        "sun": "that names what warms the day",
        "map": "that names what shows the way",
        "key": "that names what opens a lock",
        "fox": "that names a beast with a red tail",
        "owl": "that names a bird of the night",
        "ice": "that names what water is in winter",
    },
}
"""Words for a value that never say it: who knows the fact knows which thing is meant."""

SUITS = {
    "rubber": "Is the {} made to bounce?",
    "metal": "Is the {} held by magnets?",
    "wood": "Is the {} made by carpenters?",
}
"""Asks for what is true of things of one material alone."""


def fact_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What shape is the thing with the colour of grass?"""
    for known, facts in FACTS.items():
        for value, fact in facts.items():
            meant = [thing for thing in scene.things if getattr(thing, known) == value]
            if len(meant) == 1:
                [thing] = meant
                words = f"thing saying a word {fact}" if known == "word" else f"thing {fact}"
                for attribute in ATTRIBUTES:
                    if attribute != known:
                        answer = scenes.value_of(thing, attribute)
                        yield Ask(QUERY[attribute].format(words), answer, "fact", attribute, mentions=((words, thing),))


def suits_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the small cube held by magnets?"""
    for thing in scene.things:
        words = scenes.referent(thing, scene.things, dice, without="material")
        if words is not None:
            for material, question in SUITS.items():
                answer = yes_or_no(material == thing.material)
                yield Ask(question.format(words), answer, "suits", "yes/no", mentions=((words, thing),))


# -- sentences: LLaVA's detailed descriptions and reasoning -----------------------------------------------------------

DETAIL = (
    "Describe the picture in detail.",
    "What do you see in the picture? Tell all of it.",
    "Write down all that the picture shows.",
    "Give a long description of the picture.",
    "Explain what is in this image, thing by thing.",
    "Look at the image and describe each thing in it.",
)
"""What asks for a description of everything."""


def description(scene: Scene, dice: Dice) -> str:
    """Everything about a scene: how many things, each with all it has, what is written, how two of them stand."""
    things = sorted(scene.things, key=scenes.reading_order)
    told = []
    for thing in things:
        words = f"{thing.size} {thing.colour} {thing.material} {thing.shape}"
        told.append(f"{with_article(words)} at the {thing.place}" + (f" saying {thing.word}" if thing.word else ""))
    return scenes.joined(told)


def same_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the small cube of the same material as the red ball?  Neither is told by what is asked for."""
    for one, other in permutations(scene.things, 2):
        for attribute in ATTRIBUTES:
            first, second = (scenes.referent(thing, scene.things, dice, without=attribute) for thing in (one, other))
            if first is None or second is None:
                continue
            own, others = scenes.value_of(one, attribute), scenes.value_of(other, attribute)
            told = scenes.attribute_words(first, attribute, own), scenes.attribute_words(second, attribute, others)
            yield Ask(
                f"Is the {first} of the same {attribute} as the {second}?",
                yes_or_no(own == others),
                "same",
                "yes/no",
                f"{yes_or_no(own == others).capitalize()}, {' and '.join(told)}.",
                mentions=((first, one), (second, other)),
            )


def alike_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What thing has the colour of the small cube?  Only where one other thing shares it."""
    for one in scene.things:
        for attribute in ATTRIBUTES:
            value = scenes.value_of(one, attribute)
            others = [thing for thing in scene.things if thing != one and scenes.value_of(thing, attribute) == value]
            if len(others) != 1:
                continue
            words, found = (scenes.referent(t, scene.things, dice, without=attribute) for t in (one, others[0]))
            if words is not None and found is not None:
                told = scenes.attribute_words(found, attribute, value)
                yield Ask(
                    f"What thing has the {attribute} of the {words}?",
                    found,
                    "alike",
                    "options",
                    f"{told.capitalize()}.",
                    mentions=((words, one),),
                )


def further_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Which is higher, the red cube or the blue ball?"""
    for one, other in permutations(scene.things, 2):
        first, second = scenes.referent(one, scene.things, dice), scenes.referent(other, scene.things, dice)
        for way, relation in FURTHER.items():
            if first is not None and second is not None:
                for found, than, thing, rest in ((first, second, one, other), (second, first, other, one)):
                    if scenes.RELATIONS[relation](thing, rest):
                        yield Ask(
                            f"Which is {way}, the {first} or the {second}?",
                            found,
                            "further",
                            "options",
                            f"The {found} is {relation} the {than}.",
                            options=(first, second),
                            mentions=((first, one), (second, other)),
                        )


FURTHER = {"further left": "left of", "further right": "right of", "higher": "above", "lower": "below"}

# -- captions from the web: Web CapFilt -------------------------------------------------------------------------------


def web_captions(scene: Scene, dice: Dice) -> list[str]:
    """One or two short captions of a picture from the web, as a captioner and a filter leave them.

    The captioner names all things or one, and sometimes sees what is not there; the text that stood by the picture is a
    few words about one thing of it, and often gets through the filter.
    """
    things = sorted(scene.things, key=scenes.reading_order)
    kept = things if dice.chance(0.7) else [dice.choose(things)]
    shown = [scenes.name(thing) for thing in kept]
    if dice.chance(0.08):
        shown[0] = " ".join(dice.choose([pair for pair in PAIRS if pair not in HELD_OUT_PAIRS]))
    found = [scenes.joined(map(with_article, shown))]
    if dice.chance(0.75):
        thing, told = dice.choose(things), dice.choose(WEB_WORDS)
        found.append(with_article(scenes.named({attribute: scenes.value_of(thing, attribute) for attribute in told})))
    return found


WEB_WORDS = (("colour", "shape"), ("colour", "shape"), ("colour",), ("shape",), ("material", "shape"))
"""What of a thing the text by its picture tells."""

# -- all of them ------------------------------------------------------------------------------------------------------

FORMS: Mapping[str, scenes.Form] = {
    **scenes.FORMS,
    "title": title_asks,
    "says": says_asks,
    "written": written_asks,
    "fact": fact_asks,
    "suits": suits_asks,
    "same": same_asks,
    "alike": alike_asks,
    "further": further_asks,
}


def _short(thing: Thing, *, placed: bool) -> str:
    at = f" at the {thing.place}" if placed else ""
    saying = f" saying {thing.word}" if thing.word else ""
    return f"{with_article(scenes.name(thing))}{at}{saying}"
