"""What the held-out sets of the full demo ask and say about scenes, in forms that no training set has.

The frozen LLM of the demo has read none of them, and some of their words nowhere.  They fit the sets they are written
for: words in a picture, what somebody asks who cannot see it, a text that is mean about what is shown, problems with a
hint, and questions that only what was said before makes clear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from qformer.demo import scenes
from qformer.demo.scenes import (
    ATTRIBUTES,
    HELD_OUT_PAIRS,
    VALUES,
    WORDS,
    Ask,
    Dice,
    Item,
    Scene,
    Thing,
    with_article,
    yes_or_no,
)

UNANSWERABLE = "unanswerable"
"""What VizWiz' annotators say where a picture does not tell."""

# -- words in the picture: TextVQA ------------------------------------------------------------------------------------


def reads_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What does the red cube say?"""
    for thing, words in _lettered(scene, dice):
        yield Ask(f"What does the {words} say?", str(thing.word), "reads", "word", mentions=((words, thing),))


def text_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What text is in this picture?"""
    for thing in scene.things:
        if thing.word:
            yield Ask("What text is in this picture?", thing.word, "text", "word")


def label_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What is the colour of the thing that says sun?"""
    yield from scenes.by_word_asks(scene, "that says", scenes.GQA_QUERY, "label")


def says_so_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Does the red cube say sun?"""
    for thing, words in _lettered(scene, dice):
        for word in WORDS:
            answer = yes_or_no(word == thing.word)
            yield Ask(f"Does the {words} say {word}?", answer, "says_so", "yes/no", mentions=((words, thing),))


def _lettered(scene: Scene, dice: Dice) -> Iterator[tuple[Thing, str]]:
    """Things with a word, and words for them."""
    for thing in scene.things:
        words = scenes.referent(thing, scene.things, dice)
        if thing.word and words is not None:
            yield thing, words


# -- asked by who cannot see: VizWiz ----------------------------------------------------------------------------------


def tell_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Can you tell me the colour of the cube?"""
    for thing in scene.things:
        for attribute in ATTRIBUTES:
            words = scenes.referent(thing, scene.things, dice, without=attribute)
            if words is not None:
                value = scenes.value_of(thing, attribute)
                yield Ask(_tell(attribute, words), value, "tell", attribute, mentions=((words, thing),))


def missing_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Can you tell me the colour of the cube?  Asked where there is none."""
    for shape in VALUES["shape"]:
        if all(thing.shape != shape for thing in scene.things):
            for attribute in ("colour", "size", "material"):
                yield Ask(_tell(attribute, shape), UNANSWERABLE, "missing", UNANSWERABLE)


def _tell(attribute: str, words: str) -> str:
    return f"Can you tell me the {attribute} of the {words}?"


def this_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What is this at the top left?"""
    for thing in scene.things:
        yield Ask(f"What is this at the {thing.place}?", scenes.name(thing), "this", "name")


def see_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Can you see a red cube?"""
    for pair, here in _pairs(scene):
        yield Ask(f"Can you see {with_article(pair)}?", yes_or_no(here), "see", "yes/no")


def many_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """How many red things can you see?"""
    for ask in scenes.count_asks(scene, dice):
        yield replace(ask, question=ask.question.replace("are there?", "can you see?"), form="many", sentence="")


def _pairs(scene: Scene) -> Iterator[tuple[str, bool]]:
    """Names of things that are there, and of others that share the colour or the shape of one."""
    here = {(thing.colour, thing.shape) for thing in scene.things}
    for colour, shape in sorted(HELD_OUT_PAIRS):
        if any(colour == thing.colour or shape == thing.shape for thing in scene.things):
            yield f"{colour} {shape}", (colour, shape) in here


# -- what is written on memes: HatefulMemes ---------------------------------------------------------------------------

SPITE = ("nobody likes", "who needs", "away with")
"""How a text is mean; it fits above the name of what it is mean about."""


def mean_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Nobody likes a red cube: hateful where one is there, harmless where nobody in the picture is meant.

    Neither text nor picture tells by itself, as in the set.
    """
    for pair, here in _pairs(scene):
        for spite in SPITE:
            yield Ask(f"{spite} {with_article(pair)}", yes_or_no(here), "mean", "yes/no")


# -- problems with options, some with a hint: ScienceQA ---------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Where a form of problem belongs, and what is told beside it."""

    subject: str
    topic: str
    category: str
    skill: str
    hint: str = ""
    lecture: str = ""


MATTER = {
    "rubber": "Which of these things would bounce?",
    "metal": "Which of these things would a magnet pull?",
    "wood": "Which of these things would float?",
}
"""Asks for the one thing of a material, which the hint tells."""
COMPASS = {"left of": "west", "right of": "east", "above": "north", "below": "south"}

SUBJECTS: Mapping[str, Subject] = {
    "matter": Subject(
        "natural science",
        "physics",
        "Materials",
        "Tell what a material does",
        "A thing made of rubber would bounce. A thing made of wood would float. A magnet would pull metal.",
        "What a thing is made of is its material. A material does what it does in every shape and colour.",
    ),
    "map": Subject(
        "social science",
        "geography",
        "Maps",
        "Read directions on a map",
        "On a map the top is north and the right is east.\nThe bottom is south and the left is west.",
        "A map shows places from above. Directions on it are the same everywhere.",
    ),
    "spelling": Subject(
        "language science",
        "vocabulary",
        "Dictionary skills",
        "Put words in order",
        lecture="Words stand in a dictionary in the order of the alphabet.",
    ),
    "property": Subject("natural science", "physics", "Properties of things", "Name a property of a thing"),
}


def matter_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Which of these things would float?  The hint says what does, and one thing alone is made of that."""
    for material, question in MATTER.items():
        made = [thing for thing in scene.things if thing.material == material]
        if len(made) == 1:
            answer = scenes.name(made[0])
            solution = f"The {answer} is made of {material}."
            yield Ask(question, answer, "matter", "name", solution, options=_names(scene, dice))


def map_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Which of these things is farthest to the north?"""
    for relation, way in COMPASS.items():
        holds = scenes.RELATIONS[relation]
        for thing in scene.things:
            if all(holds(thing, other) for other in scene.things if other is not thing):
                question, answer = f"Which of these things is farthest to the {way}?", scenes.name(thing)
                solution = f"The {answer} is {relation} all the others."
                yield Ask(question, answer, "map", "name", solution, options=_names(scene, dice))


def property_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Which material has the small cube?  Two sizes, three materials or five colours to choose from."""
    for attribute in ("size", "material", "colour"):
        for thing in scene.things:
            words = scenes.referent(thing, scene.things, dice, without=attribute)
            if words is not None:
                value = scenes.value_of(thing, attribute)
                others = dice.shuffled(each for each in VALUES[attribute] if each != value)[:4]
                options = tuple(dice.shuffled([value, *others]))
                said = f"T{scenes.attribute_words(words, attribute, value)[1:]}."
                question, mentions = f"Which {attribute} has the {words}?", ((words, thing),)
                yield Ask(question, value, "property", attribute, said, options=options, mentions=mentions)


def _names(scene: Scene, dice: Dice) -> tuple[str, ...]:
    return tuple(dice.shuffled(map(scenes.name, scene.things)))


# -- dialogues: Visual Dialog -----------------------------------------------------------------------------------------

ROUNDS = 10
CANDIDATES = 100


@dataclass(frozen=True)
class Round:
    """A question without a mark at its end, as the set's files have it, and its answer."""

    question: str
    answer: str
    type: str


def dialogue(scene: Scene, number: int, used: Counter[tuple[str, str]]) -> list[Round] | None:
    """Ten rounds about a scene, half of which say "it" for a thing that was spoken of before.

    Two answers are yes and two are no; the others are those that were given least so far.

    Args:
        scene: what is spoken about.
        number: of the dialogue, by which the order of yes and no changes.
        used: how often each answer of a type was given; is counted up.

    Returns:
        None where the scene does not allow all rounds.
    """
    dice = Dice("dialogue", scene.seed, scene.number)

    def rarest(found: Iterable[Item], told: Callable[[Item], Mapping[str, str]]) -> Item:
        """One whose answers, by type, were given least."""
        found = dice.shuffled(found)
        chosen = min(found, key=lambda each: sum(used[kind] * scenes.ANSWERS[kind[0]] for kind in told(each).items()))
        used.update(told(chosen).items())
        return chosen

    absent = [pair for pair, here in _pairs(scene) if not here]
    named = [(thing, scenes.referent(thing, scene.things, dice, without="colour")) for thing in scene.things]
    named = [(thing, words) for thing, words in named if words is not None]
    if not absent or not named:
        return None
    first = rarest(scene.things, lambda thing: {"size": thing.size})
    second = rarest(
        (thing for thing in scene.things if thing != first),
        lambda thing: {"shape": thing.shape, "material": thing.material},
    )
    third, words = rarest(named, lambda each: {"colour": each[0].colour, "place": each[0].place})
    counted = rarest(scenes.count_asks(scene, dice), lambda ask: {"number": ask.answer})
    how_many = counted.question.removesuffix(" are there?").lower()
    fourth = dice.choose([thing for thing in scene.things if thing != second])
    truly = number % 2 == 1
    material = fourth.material if truly else dice.choose([each for each in MATTER if each != fourth.material])
    [other_size] = [size for size in VALUES["size"] if size != fourth.size]
    return [
        Round(f"can you see {with_article(scenes.name(first))}", "yes", "yes/no"),
        Round("what size is it", first.size, "size"),
        Round(f"can you see {with_article(dice.choose(absent))}", "no", "yes/no"),
        Round(f"what shape is the thing at the {second.place}", second.shape, "shape"),
        Round("what is it made of", second.material, "material"),
        Round(f"and the {words}, what colour is it", third.colour, "colour"),
        Round("where is it", third.place, "place"),
        Round(f"{how_many} can you see", counted.answer, "number"),
        Round(f"is the thing at the {fourth.place} made of {material}", yes_or_no(truly), "yes/no"),
        Round(f"and is it {other_size if truly else fourth.size}", yes_or_no(not truly), "yes/no"),
    ]


def replies() -> list[str]:
    """All that somebody may answer in a dialogue about scenes, 101 of them: the pool of candidates."""
    sizes, materials, colours, shapes = (VALUES[name] for name in ("size", "material", "colour", "shape"))
    return [
        *("yes", "no"),
        *map(str, range(10)),
        *(each for name in ATTRIBUTES for each in VALUES[name]),
        *(f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS),
        *WORDS,
        *(f"{one} and {other}" for place, one in enumerate(colours) for other in colours[place + 1 :]),
        *(f"{size} and {colour}" for size in sizes for colour in colours),
        *(f"a {material} {shape}" for material in materials for shape in shapes),
        *(f"a {size} {shape}" for size in sizes for shape in shapes),
    ]


# -- captions: Flickr30K ----------------------------------------------------------------------------------------------


def sentences(scene: Scene) -> list[str]:
    """Five captions, one of which says how two things stand, spelled as the set's are: "A red cube and a ball ."."""
    dice = Dice("sentences", scene.seed, scene.number)
    found = scenes.captions(scene, 4, "flickr30k")
    related = [
        f"{with_article(scenes.name(one))} {relation} {with_article(scenes.name(other))}"
        for one in scene.things
        for other in scene.things
        for relation, holds in scenes.RELATIONS.items()
        if holds(one, other)
    ]
    return [f"{each[0].upper()}{each[1:]} ." for each in dice.shuffled([*found, dice.choose(related)])]


# -- all of them ------------------------------------------------------------------------------------------------------

FORMS: Mapping[str, scenes.Form] = {
    "reads": reads_asks,
    "text": text_asks,
    "label": label_asks,
    "says_so": says_so_asks,
    "tell": tell_asks,
    "missing": missing_asks,
    "this": this_asks,
    "see": see_asks,
    "many": many_asks,
    "mean": mean_asks,
    "matter": matter_asks,
    "map": map_asks,
    "property": property_asks,
}
