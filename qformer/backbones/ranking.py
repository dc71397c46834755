"""Candidate answers behind prompts: which ids are scored, how many at once, and what is made of the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from qformer.errors import ConfigError
from qformer.sample import Row, Text, row_length
from qformer.text import Joiner

SCORED_POSITIONS = 8192
"""Positions scored at once: bounds memory, changes no number."""

Request = tuple[Row, tuple[int, ...]]
"""A prompt and the ids of one candidate behind it."""


def requested(
    joiner: Joiner, rows: Sequence[Row], candidates: Sequence[Sequence[str]], end: bool
) -> list[list[Request]]:
    """Candidates as ids, tokenised as targets are; `end`: with their end mark.

    Raises:
        ConfigError: a row without candidates, or a candidate with nothing to score.
    """
    scored: dict[str, tuple[int, ...]] = {}
    for choices in candidates:
        if not choices:
            raise ConfigError("rank: a prompt has no candidates; give at least one.")
        for choice in choices:
            if choice not in scored:
                scored[choice] = joiner.target_ids(choice) if end else joiner.answer_ids(choice)
            if not scored[choice]:
                raise ConfigError(
                    f"rank: the candidate '{choice}' has no token to score; give it words, or score its end mark "
                    f"(end=True)."
                )
    return [[(row, scored[choice]) for choice in choices] for row, choices in zip(rows, candidates, strict=True)]


def ranked(
    score: Callable[[Sequence[Request]], Tensor], requests: Sequence[Sequence[Request]], queries: int, normalize: str
) -> list[list[float]]:
    """Candidates' values by prompt; `score` gives (C,) sums of log p, `queries` are the positions of a slot.

    Raises:
        ConfigError: an unknown `normalize`.
    """
    if normalize not in ("sum", "mean", "pmi"):
        raise ConfigError(f"normalize is '{normalize}'; it takes 'sum', 'mean' or 'pmi'.")
    sums = _sums(score, requests, queries)
    if normalize == "mean":
        return [[value / len(ids) for value, (_, ids) in zip(*pair, strict=True)] for pair in zip(sums, requests)]
    if normalize == "pmi":
        blind = [[(_without_slots(row), ids) for row, ids in group] for group in requests]
        pairs = zip(sums, _sums(score, blind, queries), strict=True)
        return [[value - alone for value, alone in zip(*pair, strict=True)] for pair in pairs]
    return sums


def prompts_of(requests: Sequence[Request]) -> tuple[list[Row], list[int]]:
    """The distinct prompts of candidates, and which of them is whose."""
    numbers: dict[Row, int] = {}
    owner = [numbers.setdefault(row, len(numbers)) for row, _ in requests]
    return list(numbers), owner


def _sums(
    score: Callable[[Sequence[Request]], Tensor], requests: Sequence[Sequence[Request]], queries: int
) -> list[list[float]]:
    """Long prompts first, a prompt's candidates together; what is asked twice is computed once."""
    distinct = list(dict.fromkeys(request for group in requests for request in group))
    prompts, owner = prompts_of(distinct)
    lengths = [row_length(row, queries) for row in prompts]
    places = sorted(range(len(distinct)), key=lambda n: (-lengths[owner[n]], owner[n], -len(distinct[n][1])))
    longest = max((len(ids) for _, ids in distinct), default=0)
    found: dict[Request, float] = {}
    while len(found) < len(places):
        first = len(found)
        count = max(1, SCORED_POSITIONS // (lengths[owner[places[first]]] + longest))
        part = [distinct[place] for place in places[first : first + count]]
        found.update(zip(part, score(part).tolist(), strict=True))
    return [[found[request] for request in group] for group in requests]


def _without_slots(row: Row) -> Row:
    return tuple(piece for piece in row if isinstance(piece, Text))
