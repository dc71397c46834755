"""How much a score hangs on its wording: a card is scored with each of its template's listed prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.cards import TaskCard
from qformer.errors import ConfigError
from qformer.evaluate.files import write_json
from qformer.evaluate.kept import forget
from qformer.evaluate.metrics import METRICS
from qformer.evaluate.run import file_name, kept_under
from qformer.evaluate.tables import in_words, samples_in_words
from qformer.processes import Processes
from qformer.text import load_templates

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = "prompts"
"""Under the directory of scores: `TASK.json` with every wording's score, and a folder for each wording."""
Score = Callable[[Mapping[str, TaskCard], Mapping[str, str], Path], dict[str, dict[str, Any]]]
"""Scores cards with the wordings given by key, into a directory."""


def prompts(card: TaskCard) -> list[str]:
    """The wordings of a card: what it asks with first, then the others that its template lists."""
    assert card.eval is not None, card.key
    return load_templates(card.eval.template).templates


def check(cards: Mapping[str, TaskCard]) -> list[str]:
    """Refuse cards none of which has a choice of prompts; a sentence about each that has none, if others have.

    Raises:
        ConfigError: each lists one alone.
    """
    alone = [
        f"the card '{card.key}': its template '{card.eval.template}' lists one prompt alone, so there is nothing to "
        f"sweep; list others behind it in the template's file."
        for card in cards.values()
        if card.eval is not None and len(prompts(card)) < 2
    ]
    if len(alone) == len(cards):
        raise ConfigError(alone[0])
    return alone


def sweep(
    cards: Mapping[str, TaskCard], score: Score, directory: Path, processes: Processes
) -> dict[str, dict[str, Any]]:
    """Score each card with each of its wordings, and write what they reached; by card."""
    wordings = {key: prompts(card) for key, card in cards.items()}
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in cards}
    for number in range(max(map(len, wordings.values()))):
        chosen = {key: listed[number] for key, listed in wordings.items() if number < len(listed)}
        results = score({key: cards[key] for key in chosen}, chosen, directory / FOLDER / str(number))
        for key, result in results.items():
            found[key].append({"prompt": chosen[key], **{name: result[name] for name in KEPT}})
    content = {key: {"task": key, **_summary(each)} for key, each in found.items()}
    for key, each in content.items():
        if processes.first:
            write_json(directory / FOLDER / f"{file_name(key, partial=each['partial'])}.json", each)
        for number, one in enumerate(each["prompts"]):  # on the disk of every machine
            forget(directory / FOLDER / str(number), kept_under(key, one))
    return content


KEPT = ("score", "interval", "samples", "broken", "of", "partial", "recipe", "metric", "title")


def _summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which of the wordings did best, in the middle (the lower of two) and worst."""
    scores = [each["score"] for each in found if each["score"] is not None]
    shared = {name: found[0][name] for name in ("metric", "title", "samples", "of", "partial")}
    if not scores:
        return {**shared, "prompts": list(found), "best": None, "median": None, "worst": None}
    places = [each["score"] for each in found]
    picked = {"best": max(scores), "median": statistics.median_low(scores), "worst": min(scores)}
    return {**shared, "prompts": list(found), **{name: places.index(value) for name, value in picked.items()}}


def tables(content: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Best, median and worst wording of each card beside its own, then every wording; parts of sets apart from whole
    ones, as scores are.
    """
    shown = []
    for partial in (False, True):
        chosen = {key: each for key, each in content.items() if each["partial"] is partial}
        if chosen:
            shown.append(_table(chosen, ", on parts of sets" if partial else ""))
    return shown


def _table(content: Mapping[str, Mapping[str, Any]], where: str) -> Table:
    from rich.table import Table

    shown = Table(title=f"Prompts{where} (the card's own is the first; none was chosen by its score)")
    for heading in ("task", "", "score", "n", "recipe", "prompt"):
        shown.add_column(heading, justify="right" if heading in ("score", "n") else "left", overflow="fold")
    for key, each in content.items():
        percent = METRICS[each["metric"]].percent
        for place, one in enumerate(each["prompts"]):
            marks = [name for name in ("best", "median", "worst") if each[name] == place]
            marks = ["own"] * (place == 0) + marks
            score = in_words(one, percent)
            shown.add_row(key, ", ".join(marks), score, samples_in_words(each), one["recipe"], one["prompt"])
        shown.add_section()
    return shown
