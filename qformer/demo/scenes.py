"""Small scenes: what stands where, how it looks, and what can be asked and said about it.

Three or four things stand in the cells of a 3 × 3 board, a little off the middle.  They share colours and shapes, so
that a question has to bind attributes.  One thing is left of another when its column is, and above it when its row is.
Everything is a function of a seed.  Scenes that are held out use colour–shape pairs that no other scene shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import permutations
from typing import TypeVar

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from qformer import keyed

SHAPES = ("cube", "ball", "cone", "ring", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (44, 92, 214),
    "yellow": (244, 214, 50),
    "purple": (140, 58, 178),
    "orange": (245, 136, 22),
}
SIZES = {"small": 7, "large": 11}  # half the extent in pixels
MATERIALS = ("rubber", "metal", "wood")
WORDS = ("sun", "map", "key", "fox", "owl", "ice")
COLUMNS = ("left", "centre", "right")
ROWS = ("top", "middle", "bottom")
ATTRIBUTES = ("colour", "shape", "size", "material")
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "material": MATERIALS}
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT_PAIRS = frozenset(
    (colour, SHAPES[(number + step) % 6]) for number, colour in enumerate(COLOURS) for step in (0, 2)
)

PICTURE = 96
CELL = PICTURE // 3
SUPERSAMPLED = 4

Item = TypeVar("Item")


class Dice:
    """Choices one after another that belong to a key."""

    def __init__(self, *key: object):
        self._stream: Iterator[float] = keyed.stream(*key)

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(next(self._stream) * count)

    def choose(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return next(self._stream) < probability

    def shuffled(self, items: Iterable[Item]) -> list[Item]:
        """All items in another order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]


# -- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One thing; (column, row) is its cell, (x, y) the middle of the thing as a share of the picture's side."""

    shape: str
    colour: str
    size: str
    material: str
    column: int
    row: int
    x: float
    y: float
    word: str | None = None

    @property
    def place(self) -> str:
        """Its cell in words: "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """Things of one picture, in no order that means anything."""

    seed: int
    number: int
    things: tuple[Thing, ...]
    held_out: bool


def sample_scene(seed: int, number: int = 0, *, held_out: bool, things: Sequence[int] = (3, 4)) -> Scene:
    """Scene `number` of a seed; `things` says how many there may be.

    Two things of a scene never have both colour and shape in common.
    """
    dice = Dice("scene", seed, number, held_out)
    allowed = tuple(pair for pair in PAIRS if (pair in HELD_OUT_PAIRS) == held_out)
    count = dice.choose(things)
    pairs = [dice.choose(allowed)]
    while len(pairs) < count:
        near = [pair for pair in allowed if pair not in pairs and any(_shares(pair, other) for other in pairs)]
        far = [pair for pair in allowed if pair not in pairs]
        pairs.append(dice.choose(near if dice.chance(0.75) else far))
    cells = dice.shuffled(range(9))[:count]
    named = dice.below(count) if dice.chance(0.6) else None
    made = []
    for index, ((colour, shape), cell) in enumerate(zip(pairs, cells, strict=True)):
        size, material = dice.choose(tuple(SIZES)), dice.choose(MATERIALS)
        word = dice.choose(WORDS) if index == named else None
        column, row = cell % 3, cell // 3
        right, down = dice.below(7) - 3, dice.below(5) - 2
        x = (column * CELL + CELL // 2 + right) / PICTURE
        y = (row * CELL + (CELL // 2 + down if word is None else CELL // 2 - 4)) / PICTURE
        made.append(Thing(shape, colour, size, material, column, row, x, y, word))
    return Scene(seed, number, tuple(made), held_out)


def _shares(pair: tuple[str, str], other: tuple[str, str]) -> bool:
    return pair[0] == other[0] or pair[1] == other[1]


RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda one, other: one.column < other.column,
    "right of": lambda one, other: one.column > other.column,
    "above": lambda one, other: one.row < other.row,
    "below": lambda one, other: one.row > other.row,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# -- pictures ---------------------------------------------------------------------------------------------------------

LETTERS = {
    " ": "..... ..... ..... ..... ..... ..... .....",
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "b": "####. #...# #...# ####. #...# #...# ####.",
    "c": ".#### #.... #.... #.... #.... #.... .####",
    "d": "####. #...# #...# #...# #...# #...# ####.",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "f": "##### #.... #.... ####. #.... #.... #....",
    "g": ".#### #.... #.... #.### #...# #...# .####",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "i": ".###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "o": ".###. #...# #...# #...# #...# #...# .###.",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "s": ".#### #.... #.... .###. ....# ....# ####.",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
    "w": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "x": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
}


def draw(scene: Scene) -> Image.Image:
    """The scene as a picture of 96 × 96 pixels on a grey ground of its own shade."""
    dice = Dice("ground", scene.seed, scene.number, scene.held_out)
    shade = 205 + dice.below(36)
    picture = Image.new("RGB", (PICTURE, PICTURE), (shade + dice.below(9) - 4, shade, shade + dice.below(9) - 4))
    for thing in scene.things:
        tile = _tile(thing.shape, thing.colour, thing.size, thing.material)
        at = round(thing.x * PICTURE) - tile.width // 2, round(thing.y * PICTURE) - tile.height // 2
        picture.paste(tile, at, tile)
        if thing.word is not None:
            mask = written(thing.word)
            left = round(thing.x * PICTURE) - mask.width // 2
            picture.paste((20, 20, 20), (left, (thing.row + 1) * CELL - mask.height - 1), mask)
    return picture


@cache
def written(words: str) -> Image.Image:
    """A mask of the words in letters of 5 × 7 pixels."""
    mask = Image.new("L", (6 * len(words) - 1, 7))
    for place, letter in enumerate(words):
        for y, line in enumerate(LETTERS[letter].split()):
            for x, mark in enumerate(line):
                mask.putpixel((6 * place + x, y), 255 if mark == "#" else 0)
    return mask


@lru_cache(maxsize=4096)
def _tile(shape: str, colour: str, size: str, material: str) -> Image.Image:
    """One thing with smooth edges on a transparent ground: drawn larger, then reduced.

    A colour may also be "#rrggbb", and a shape "blob N", a form without a name: no scene has them, but an encoder that
    learns the named ones from `draw` can be shown them.
    """
    tint = COLOURS[colour] if colour in COLOURS else ImageColor.getrgb(colour)[:3]
    half = SIZES[size] * SUPERSAMPLED
    side = 2 * half + 2 * SUPERSAMPLED
    mask = Image.new("L", (side, side))
    _outline(ImageDraw.Draw(mask), shape, side / 2, half)
    paint = Image.new("RGB", (side, side), tint)
    if shape == "cube":
        _faces(ImageDraw.Draw(paint), tint, side / 2, half)
    if material == "wood":
        pen, step = ImageDraw.Draw(paint), 3 * SUPERSAMPLED
        for y in range(step // 2, side, step):
            pen.line((0, y, side, y), fill=_mixed(tint, (40, 24, 10), 0.6), width=SUPERSAMPLED)
    if material == "metal":
        shine = Image.new("L", (side, side))
        ImageDraw.Draw(shine).line((0, side * 0.72, side * 0.72, 0), fill=235, width=round(half * 0.38))
        paint.paste((255, 255, 255), (0, 0), shine.filter(ImageFilter.GaussianBlur(SUPERSAMPLED)))
    inner = mask.filter(ImageFilter.MinFilter(2 * (SUPERSAMPLED // 2) + 1))
    rim = ImageChops.subtract(mask, inner)
    paint.paste(_mixed(tint, (0, 0, 0), 0.45), (0, 0), rim)
    paint.putalpha(mask)
    return paint.resize((side // SUPERSAMPLED, side // SUPERSAMPLED), Image.Resampling.BOX)


def _outline(pen: ImageDraw.ImageDraw, shape: str, middle: float, half: float) -> None:
    def around(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(middle + x * half, middle + y * half) for x, y in points]

    box = [middle - half, middle - half, middle + half, middle + half]
    if shape == "cube":
        pen.rectangle(box, fill=255)
    elif shape == "ball":
        pen.ellipse(box, fill=255)
    elif shape == "cone":
        pen.polygon(around((0, -1), (1, 1), (-1, 1)), fill=255)
    elif shape == "ring":
        pen.ellipse(box, fill=255)
        hole = half * 0.5
        pen.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    elif shape == "star":
        tips = ((0, -1), (0.95, -0.31), (0.59, 0.81), (-0.59, 0.81), (-0.95, -0.31))
        dents = ((0.24, -0.32), (0.38, 0.12), (0, 0.4), (-0.38, 0.12), (-0.24, -0.32))
        pen.polygon(around(*(point for pair in zip(tips, dents, strict=True) for point in pair)), fill=255)
    elif shape.startswith("blob"):
        dice = Dice(shape)
        angles = [(corner + dice.below(60) / 100) * math.tau / 7 for corner in range(7)]
        radii = [0.45 + dice.below(56) / 100 for _ in angles]
        pen.polygon(around(*((r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True))), fill=255)
    else:
        pen.rectangle([middle - half, middle - half * 0.36, middle + half, middle + half * 0.36], fill=255)
        pen.rectangle([middle - half * 0.36, middle - half, middle + half * 0.36, middle + half], fill=255)


def _faces(pen: ImageDraw.ImageDraw, colour: tuple[int, int, int], middle: float, half: float) -> None:
    """The top and the right side of a cube, lighter and darker than its front."""
    low, high, depth = middle - half, middle + half, half * 0.5
    lighter, darker = _mixed(colour, (255, 255, 255), 0.4), _mixed(colour, (0, 0, 0), 0.35)
    pen.polygon([(low, low + depth), (low, low), (high, low), (high - depth, low + depth)], fill=lighter)
    pen.polygon([(high - depth, low + depth), (high, low), (high, high), (high - depth, high)], fill=darker)


def _mixed(colour: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


# -- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A question, its answer in a word or two and as a sentence.

    `form` is how it asks (a name of `FORMS`), `type` what kind of answer it has ("yes/no", "number", "colour", …); a
    `question` of type "true/false" is a statement to judge.  `options` are choices, the answer among them.
    `mentions` are the words of the question that name one thing, and that thing, in the order in which they end.
    """

    question: str
    answer: str
    form: str
    type: str
    sentence: str = ""
    options: tuple[str, ...] = ()
    mentions: tuple[tuple[str, Thing], ...] = ()


def value_of(thing: Thing, attribute: str) -> str:
    """The word for an attribute of a thing."""
    return str(getattr(thing, attribute))


def phrase(thing: Thing) -> str:
    """All that can be said of a thing alone: "small red metal cube top left saying sun"."""
    word = f" saying {thing.word}" if thing.word else ""
    return f"{thing.size} {thing.colour} {thing.material} {thing.shape} {thing.place}{word}"


def name(thing: Thing) -> str:
    """Colour and shape, which no other thing of the scene shares: "red cube"."""
    return f"{thing.colour} {thing.shape}"


NAMINGS = (
    ("shape",),
    ("colour",),
    ("size", "shape"),
    ("colour", "shape"),
    ("material", "shape"),
    ("size", "colour"),
    ("size", "colour", "shape"),
)


def several(value: str, attribute: str) -> str:
    """Words for things that share a value: "red things", "crosses"."""
    if attribute != "shape":
        return f"{value} things"
    return f"{value}es" if value.endswith("s") else f"{value}s"


def fits(thing: Thing, wanted: dict[str, str]) -> bool:
    """Whether a thing has all these values."""
    return all(value_of(thing, attribute) == value for attribute, value in wanted.items())


def named(wanted: dict[str, str]) -> str:
    """Attributes as words before a noun: {"size": "small", "shape": "cube"} is "small cube"."""
    words = [wanted[attribute] for attribute in ("size", "colour", "material") if attribute in wanted]
    return " ".join([*words, wanted.get("shape", "thing")])


def referent(thing: Thing, among: tuple[Thing, ...], dice: Dice, without: str = "") -> str | None:
    """Words that fit this thing alone, without telling the attribute `without`; None if there are none."""
    found = _referents(thing, among, without)
    return dice.choose(found) if found else None


@lru_cache(maxsize=256)
def _referents(thing: Thing, among: tuple[Thing, ...], without: str) -> list[str]:
    found = []
    for naming in NAMINGS:
        if without not in naming:
            wanted = {attribute: value_of(thing, attribute) for attribute in naming}
            if sum(fits(other, wanted) for other in among) == 1:
                found.append(named(wanted))
    return found


QUERY = {
    "colour": "What colour is the {}?",
    "shape": "What shape is the {}?",
    "size": "What size is the {}?",
    "material": "What is the {} made of?",
}
GQA_QUERY = {
    "colour": "What is the colour of the {}?",
    "shape": "Of what shape is the {}?",
    "size": "How large is the {}?",
    "material": "Which material is the {} of?",
}


def by_word_asks(scene: Scene, says: str, queries: Mapping[str, str], form: str) -> Iterator[Ask]:
    """What colour is the thing saying sun?  `says` stands before the word, `queries` has a question an attribute."""
    for thing in scene.things:
        if thing.word:
            words = f"thing {says} {thing.word}"
            for attribute in ATTRIBUTES:
                value = value_of(thing, attribute)
                yield Ask(queries[attribute].format(words), value, form, attribute, mentions=((words, thing),))


def yes_or_no(truth: bool) -> str:
    """The answer in a word."""
    return "yes" if truth else "no"


def with_article(words: str) -> str:
    """A red cube."""
    return f"{article(words)} {words}"


def attribute_words(words: str, attribute: str, value: str) -> str:
    """Words for an attribute of a thing: "the red thing is a cube"."""
    return f"the {words} is {({'shape': 'a ', 'material': 'made of '}).get(attribute, '')}{value}"


def _attribute_sentence(words: str, attribute: str, value: str) -> str:
    return f"T{attribute_words(words, attribute, value)[1:]}."


def attribute_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What colour is the small cube?"""
    for thing in scene.things:
        for attribute in ATTRIBUTES:
            words = referent(thing, scene.things, dice, without=attribute)
            if words is not None:
                value = value_of(thing, attribute)
                said = _attribute_sentence(words, attribute, value)
                mentions = ((words, thing),)
                yield Ask(QUERY[attribute].format(words), value, "attribute", attribute, said, mentions=mentions)


def word_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What word is written below the red cube?"""
    for thing in scene.things:
        words = referent(thing, scene.things, dice)
        if thing.word and words is not None:
            said = f"The word {thing.word} is written below the {words}."
            question = f"What word is written below the {words}?"
            yield Ask(question, thing.word, "word", "word", said, mentions=((words, thing),))


def place_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Where is the red cube?"""
    for thing in scene.things:
        words = referent(thing, scene.things, dice)
        if words is not None:
            said = f"The {words} is at the {thing.place}."
            yield Ask(f"Where is the {words}?", thing.place, "place", "place", said, mentions=((words, thing),))


@dataclass(frozen=True)
class Related:
    """A thing told by how it stands to another: `noun` ("cube") `relation` ("left of") the `anchor` ("small ball")."""

    thing: Thing
    noun: str
    relation: str
    anchor: str
    other: Thing

    def words(self, link: str = "") -> str:
        """The words for the thing, with `link` before the relation: "cube that is left of the small ball"."""
        return f"{self.noun} {link}{self.relation} the {self.anchor}"

    def mentions(self, link: str = "") -> tuple[tuple[str, Thing], ...]:
        """The other thing's words, then this thing's."""
        return (self.anchor, self.other), (self.words(link), self.thing)


THAT_IS = "that is "


def related(scene: Scene, dice: Dice, hide: str = "") -> Iterator[Related]:
    """Things that can be told alone by how they stand to another, without telling the attribute `hide`."""
    for other in scene.things:
        for relation, holds in RELATIONS.items():
            there = [thing for thing in scene.things if holds(thing, other)]
            anchor = referent(other, scene.things, dice)
            if not there or anchor is None:
                continue
            for thing in there:
                nouns = [thing.shape] if hide != "shape" and sum(t.shape == thing.shape for t in there) == 1 else []
                if len(there) == 1:
                    nouns.append("thing")
                if nouns:
                    yield Related(thing, dice.choose(nouns), relation, anchor, other)


def relation_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What colour is the thing left of the small cube?"""
    for attribute in ATTRIBUTES:
        for found in related(scene, dice, hide=attribute):
            words, value = found.words(), value_of(found.thing, attribute)
            said = _attribute_sentence(words, attribute, value)
            question = QUERY[attribute].format(words)
            yield Ask(question, value, "relation", attribute, said, mentions=found.mentions())


def exists_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is there a red cube?  What is not there is made of what is: a colour of one thing, a shape of another."""
    here = {(thing.colour, thing.shape) for thing in scene.things}
    for thing in scene.things:
        words = name(thing)
        yield _yes_no(f"Is there a {words}?", True, "exists", f"there is a {words}", f"there is no {words}")
    for one, other in permutations(scene.things, 2):
        pair = one.colour, other.shape
        # A pair that a kind of scene never shows would always be answered by no.
        if pair not in here and (pair in HELD_OUT_PAIRS) == scene.held_out:
            words = f"{one.colour} {other.shape}"
            yield _yes_no(f"Is there a {words}?", False, "exists", f"there is a {words}", f"there is no {words}")
    for size, shape in sorted({(one.size, other.shape) for one, other in permutations(scene.things, 2)}):
        words = f"{size} {shape}"
        truth = any(thing.size == size and thing.shape == shape for thing in scene.things)
        yield _yes_no(f"Is there a {words}?", truth, "exists", f"there is a {words}", f"there is no {words}")


def side_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the red cube left of the blue ball?  Only where the two differ in that direction."""
    for one, other, relation, truth in _sides(scene):
        first, second = referent(one, scene.things, dice), referent(other, scene.things, dice)
        if first is not None and second is not None:
            said = f"the {first} is {relation} the {second}"
            denied = f"the {first} is {OPPOSITE[relation]} the {second}"
            mentions = ((first, one), (second, other))
            yield _yes_no(f"Is the {first} {relation} the {second}?", truth, "side", said, denied, mentions)


def count_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """How many red things are there?  Answers are 0 to 3."""
    for attribute in ATTRIBUTES:
        for value in VALUES[attribute]:
            count = sum(value_of(thing, attribute) == value for thing in scene.things)
            words = several(value, attribute)
            if count <= 3:
                yield Ask(f"How many {words} are there?", str(count), "count", "number", f"There are {count} {words}.")


def query_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What is the colour of the cube that is left of the small ball?  In the manner of GQA."""
    for attribute in ATTRIBUTES:
        for found in related(scene, dice, hide=attribute):
            question = GQA_QUERY[attribute].format(found.words(THAT_IS))
            value = value_of(found.thing, attribute)
            yield Ask(question, value, "query", attribute, mentions=found.mentions(THAT_IS))


def two_step_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """What is the colour of the cube that is left of the thing above the red ball?"""
    for found in list(related(scene, dice)):
        for relation, holds in RELATIONS.items():
            there = [thing for thing in scene.things if holds(thing, found.thing)]
            if len(there) == 1 and there[0] != found.other:
                [thing] = there
                attribute = dice.choose(ATTRIBUTES)
                words = f"thing that is {relation} the {found.words()}"
                mentions = (*found.mentions(), (words, thing))
                asked = GQA_QUERY[attribute].format(words)
                yield Ask(asked, value_of(thing, attribute), "two_step", attribute, mentions=mentions)


def verify_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the thing that is left of the small cube red?"""
    for attribute in ("colour", "size", "material"):
        for found in related(scene, dice, hide=attribute):
            words, mentions, own = found.words(THAT_IS), found.mentions(THAT_IS), value_of(found.thing, attribute)
            wrong = [v for v in sorted({value_of(t, attribute) for t in scene.things}) if v != own]
            yield Ask(f"Is the {words} {own}?", "yes", "verify", "yes/no", mentions=mentions)
            if wrong:
                yield Ask(f"Is the {words} {dice.choose(wrong)}?", "no", "verify", "yes/no", mentions=mentions)


def choose_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Is the cube that is left of the small ball red or blue?"""
    for attribute in ("colour", "material"):
        for found in related(scene, dice, hide=attribute):
            words, own = found.words(THAT_IS), value_of(found.thing, attribute)
            wrong = [v for v in sorted({value_of(t, attribute) for t in scene.things}) if v != own]
            if wrong:
                pair = dice.shuffled([own, dice.choose(wrong)])
                question = f"Is the {words} {pair[0]} or {pair[1]}?"
                yield Ask(question, own, "choose", attribute, mentions=found.mentions(THAT_IS))


def statements(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """The red cube is left of the blue ball: to be judged true or false."""
    for one, other, relation, truth in _sides(scene):
        first, second = referent(one, scene.things, dice), referent(other, scene.things, dice)
        if first is not None and second is not None:
            said, mentions = f"The {first} is {relation} the {second}.", ((first, one), (second, other))
            yield Ask(said, str(truth).lower(), "statement", "true/false", mentions=mentions)


def which_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """Which thing is left of the blue ball?  The options are names; the wrong ones stand elsewhere, or nowhere."""
    for other in scene.things:
        for relation, holds in RELATIONS.items():
            there = [thing for thing in scene.things if holds(thing, other)]
            anchor = referent(other, scene.things, dice)
            if len(there) == 1 and anchor is not None:
                [thing] = there
                wrong = [name(t) for t in scene.things if t not in (thing, other)]
                options = tuple(dice.shuffled([name(thing), *wrong[:3]]))
                question, mentions = f"Which thing is {relation} the {anchor}?", ((anchor, other),)
                yield Ask(question, name(thing), "which", "options", options=options, mentions=mentions)


def options_asks(scene: Scene, dice: Dice) -> Iterator[Ask]:
    """An attribute question with four values to choose from, those of the scene among them."""
    for ask in [*attribute_asks(scene, dice), *relation_asks(scene, dice)]:
        if ask.type in ("colour", "shape"):
            seen = {value_of(thing, ask.type) for thing in scene.things} - {ask.answer}
            others = [value for value in VALUES[ask.type] if value not in seen | {ask.answer}]
            rest = dice.shuffled(sorted(seen)) + dice.shuffled(others)
            options = tuple(dice.shuffled([ask.answer, *rest[:3]]))
            yield replace(ask, form="options", options=options)


Form = Callable[[Scene, Dice], Iterator[Ask]]
"""All questions of one kind that a scene allows."""

FORMS: dict[str, Form] = {
    "attribute": attribute_asks,
    "word": word_asks,
    "place": place_asks,
    "relation": relation_asks,
    "exists": exists_asks,
    "side": side_asks,
    "count": count_asks,
    "query": query_asks,
    "two_step": two_step_asks,
    "verify": verify_asks,
    "choose": choose_asks,
    "statement": statements,
    "which": which_asks,
    "options": options_asks,
}


def asks(scene: Scene, form: str, *key: object, table: Mapping[str, Form] = FORMS) -> list[Ask]:
    """All questions of a form that a scene allows; the key chooses between ways to name a thing."""
    return list(table[form](scene, Dice("asks", form, *key, scene.seed, scene.number)))


def _sides(scene: Scene) -> Iterator[tuple[Thing, Thing, str, bool]]:
    for one, other in permutations(scene.things, 2):
        for relation, holds in RELATIONS.items():
            if holds(one, other) or RELATIONS[OPPOSITE[relation]](one, other):
                yield one, other, relation, holds(one, other)


def _yes_no(
    question: str, truth: bool, form: str, said: str, denied: str, mentions: tuple[tuple[str, Thing], ...] = ()
) -> Ask:
    answer = "yes" if truth else "no"
    sentence = f"{answer.capitalize()}, {said if truth else denied}."
    return Ask(question, answer, form, "yes/no", sentence, mentions=mentions)


def balanced(
    scenes: Sequence[Scene], forms: Sequence[str], per_scene: int, *key: object, table: Mapping[str, Form] = FORMS
) -> list[tuple[Scene, Ask]]:
    """About `per_scene` questions on every scene, its forms in turn, with answers as even as they can be made.

    Yes and no (true and false) are exactly as many in every form; no other answer is above 1.3 times the uniform share
    of its type: what would be is left out, later scenes first.
    """
    used: Counter[tuple[str, str]] = Counter()
    chosen: list[tuple[Scene, Ask]] = []
    turn = 0
    for scene in scenes:
        taken: set[str] = set()
        for _ in range(per_scene):
            for _ in forms:
                form = forms[turn % len(forms)]
                turn += 1
                found = [ask for ask in asks(scene, form, *key, table=table) if ask.question not in taken]
                if found:
                    break
            else:
                break
            dice = Dice("balanced", *key, scene.seed, scene.number, len(taken))
            by_answer: dict[tuple[str, str], list[Ask]] = {}
            for ask in found:
                by_answer.setdefault((_group(ask), ask.answer), []).append(ask)
            least = min(dice.shuffled(by_answer), key=lambda group: used[group])
            ask = dice.choose(by_answer[least])
            used[least] += 1
            taken.add(ask.question)
            chosen.append((scene, ask))
    return _trimmed(chosen)


def _group(ask: Ask) -> str:
    return f"{ask.form} {ask.type}" if ask.type in ("yes/no", "true/false") else ask.type


def _trimmed(chosen: list[tuple[Scene, Ask]]) -> list[tuple[Scene, Ask]]:
    """Without the surplus of answers that are too frequent."""
    while True:
        by_group: dict[str, Counter[str]] = {}
        for _, ask in chosen:
            if ask.type != "options":
                by_group.setdefault(_group(ask), Counter())[ask.answer] += 1
        limit = {}
        for group, counts in by_group.items():
            if group.endswith(("yes/no", "true/false")):
                limit[group] = min(counts.values()) if len(counts) == 2 else 0
            else:
                limit[group] = int(1.3 * sum(counts.values()) / ANSWERS[group])
        kept: list[tuple[Scene, Ask]] = []
        seen: Counter[tuple[str, str]] = Counter()
        for scene, ask in chosen:
            group = _group(ask)
            seen[group, ask.answer] += 1
            if group not in limit or seen[group, ask.answer] <= limit[group]:
                kept.append((scene, ask))
        if len(kept) == len(chosen):
            return kept
        chosen = kept


ANSWERS = {
    "colour": 6, "shape": 6, "size": 2, "material": 3, "word": 6, "place": 9, "number": 4, "way": 4, "name": 12,
    "unanswerable": 1,
}  # fmt: skip
"""How many answers a type has."""


def captions(scene: Scene, count: int, *key: object) -> list[str]:
    """Full captions: everything in the picture and, mostly, its place."""
    dice = Dice("captions", *key, scene.seed, scene.number)
    return [dice.choose((_places, _places, _places, _listing))(scene, dice) for _ in range(count)]


def _listing(scene: Scene, dice: Dice) -> str:
    return joined(f"{article(name(thing))} {name(thing)}" for thing in sorted(scene.things, key=reading_order))


def _places(scene: Scene, dice: Dice) -> str:
    things = sorted(scene.things, key=reading_order)
    return joined(f"{article(name(thing))} {name(thing)} at the {thing.place}" for thing in things)


def joined(parts: Iterable[str]) -> str:
    """One, another and a third."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def reading_order(thing: Thing) -> tuple[int, int]:
    """Row by row, each from the left: a key to sort things by."""
    return thing.row, thing.column


def article(words: str) -> str:
    """What stands before the words: a, an."""
    return "an" if words[0] in "aeiou" else "a"
