"""What the fields of a record must hold, with one sentence for each that holds something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qformer.errors import DataError
from qformer.text import letter, lettered

RANKS = ("texts", "letters", "lettered")
"""What of a problem's choices a model may choose from."""


def words(row: Mapping[str, Any], name: str) -> str:
    """A field that must be text with something in it, on one line and without blanks at its ends."""
    return text(row[name], f"'{name}'")


def text(value: Any, what: str) -> str:
    """A value that must be text with something in it, on one line and without blanks at its ends."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {shown(value)} where text belongs")
    line = " ".join(value.split())
    if not line:
        raise DataError(f"{what} is empty; fill it, or remove the record")
    return line


def answers(value: Any, what: str, *, blank: bool = False) -> tuple[str, ...]:
    """Texts in their order, duplicates kept; numbers among them as they are written, blanks only where they may be."""
    found = []
    for each in several(value, what):
        if isinstance(each, int | float) and not isinstance(each, bool):
            each = str(each)
        found.append("" if blank and isinstance(each, str) and not each.strip() else text(each, f"one of {what}"))
    return tuple(found)


def identifies(value: Any) -> bool:
    """Whether a value can be an id: text or a number, but no NaN, which does not even equal itself."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def several(value: Any, what: str) -> list[Any]:
    """A value that must be a list of at least one."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{what} is {shown(value)}; it must be a list of at least one")
    return value


def number(row: Mapping[str, Any], name: str) -> int:
    """A field that must be a whole number, which may be written as text."""
    value = row[name]
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 30:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"'{name}' is {shown(value)} where a whole number belongs")
    return value


def chosen(choices: Sequence[Any], place: Any, name: str) -> Any:
    """The choice that a field numbers; a negative number would silently count from the end."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
        raise DataError(
            f"'{name}' is {shown(place)}; it must be at least 0 and below {len(choices)}, the number of choices"
        )
    return choices[place]


def offered(choices: Sequence[str], rank: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """What is chosen from, one of `RANKS`, and the field `options` where it is not what a prompt shows."""
    if rank == "texts":
        return {}, tuple(choices)
    letters = [f"({letter(number)})" for number in range(len(choices))]
    candidates = letters if rank == "letters" else [f"{mark} {choice}" for mark, choice in zip(letters, choices)]
    return {"options": lettered(choices)}, tuple(candidates)


def shown(value: Any, most: int = 60) -> str:
    """A value as JSON, cut where it is long."""
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # bytes, or a whole number of more digits than Python writes
        written = f"a {type(value).__name__}"
    return written if len(written) <= most else f"{written[:most]} …"
