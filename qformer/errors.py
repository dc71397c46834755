"""The errors a user meets: one message that says where, what was found and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class QFormerError(Exception):
    """Anything a user can mend. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str):
        # What a file says may hold half a character, as JSON can write it: no terminal and no log takes that.
        super().__init__(message.encode(errors="backslashreplace").decode())


class ConfigError(QFormerError):
    """A setting, a card or a command is wrong: nothing has been read or written yet."""

    exit_code = 2


class DataError(QFormerError):
    """A file or a record of the user's data is missing, broken or of another form."""


class TrainingError(QFormerError):
    """A run cannot go on: a value that is not finite, a checkpoint that does not fit, labels that do not decode."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: the nearest known name, if one is near, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    return f"{guess} Known: {', '.join(known) or 'none'}."


def reason(error: BaseException) -> str:
    """The first line of what another library says went wrong, or the kind of error where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def lookup(table: Mapping[str, Value], name: str, what: str) -> Value:
    """`table[name]`, or a ConfigError that says what was asked for and what there is."""
    if name not in table:
        raise ConfigError(f"unknown {what} '{name}'.{did_you_mean(str(name), table)}")
    return table[name]
