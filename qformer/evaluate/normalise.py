"""How answers are made alike before they are compared: the rules of the VQA scorers, kept with their quirks.

Sources: the official VQA scorer (GT-Vision-Lab/VQA, vqaEval.py); the processor of the EvalAI servers (MMF,
m4c_evaluators.py).  Both share punctuation, digits, articles and contractions.
"""

from __future__ import annotations

import re
import string

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
COMMA_BETWEEN_DIGITS = re.compile(r"(\d)(,)(\d)")
COMMAS_BETWEEN_DIGITS = re.compile(r"(?<=\d)(,)+(?=\d)")
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
"""Meant as a look-behind and mistyped in the original: every period goes that no digit follows."""
MOST_PERIODS = 32
"""The original hands `re.UNICODE` (32) to `sub` in the place of the count."""

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = frozenset(("a", "an", "the"))


def _contractions() -> dict[str, str]:
    """The original's table: a word that lost an apostrophe, and the word; its odd entries are kept."""
    one = """
        ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
        I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
        shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
        there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
        where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
        you've
    """
    two = """
        couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
        something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
    """
    table = {word.replace("'", ""): word for word in one.split()}
    for word in two.split():
        marks = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in marks}
    return table | {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}


CONTRACTIONS = _contractions()


def plain(text: str) -> str:
    """Line breaks and tabs as blanks, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def lower(text: str) -> str:
    """Lower case, without blanks at the ends or full stops behind."""
    return plain(text).lower().rstrip(". ")


def without_punctuation(text: str, comma: re.Pattern[str] = COMMA_BETWEEN_DIGITS) -> str:
    """The punctuation step: a mark beside a blank goes, any other becomes one, periods go unless a digit follows.

    A comma between two digits anywhere makes all marks go.
    """
    number = comma.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_blank = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_blank or number else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def plain_words(text: str) -> str:
    """The digit and article step: lower case, number words as digits, no articles, apostrophes back in contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(text: str) -> str:
    """Both steps of the official VQA scorer."""
    return plain_words(without_punctuation(plain(text)))


def evalai(text: str) -> str:
    """The processor of the EvalAI servers, TextVQA's among them."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(plain(text), COMMAS_BETWEEN_DIGITS))


def first_word(text: str) -> str:
    """The first word in lower case without punctuation around it; empty where there is none."""
    words = text.lower().split()
    return words[0].strip(string.punctuation) if words else ""
