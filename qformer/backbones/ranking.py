"""Candidate answers behind prompts: which ids are scored, how many at once, and what is made of the sums.

Three ways lead to the same numbers, and an LLM says which of them it can go.  *Packed*: a prompt and its candidates are
one row, in which every candidate sees the prompt and itself, and common beginnings stand once.  *Behind*: the prompt is
computed once and its cache continued by every candidate.  *Apart*: a row a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qformer.errors import ConfigError
from qformer.sample import Row, Text, row_length
from qformer.text import Joiner

SCORED_POSITIONS = 8192
"""Positions scored at once: bounds memory, changes no number."""
FED_TOKENS = 512
"""Candidates' tokens behind one prompt at once: in longer rows attention costs more than a prompt read again."""
LOGITS_AT_ONCE = 1 << 26
"""Numbers that the output layer may write at once (256 MiB in float32)."""

Ids = tuple[int, ...]


class Group(NamedTuple):
    """A prompt and the ids of distinct candidates behind it."""

    prompt: Row
    candidates: tuple[Ids, ...]


@dataclass(frozen=True)
class Tree:
    """Candidates of one prompt with common beginnings once.

    F tokens are fed, all but the last of each candidate; place 0 is the prompt's last position, place n the n-th fed
    token.  ids, depths (F,): tokens, and how many of their candidate stand before them.  sees (F, F) bool: a token sees
    itself and what stands before it in its candidate.  E edges: places (E,) predict tokens (E,) of candidates owners
    (E,).
    """

    ids: Tensor
    depths: Tensor
    sees: Tensor
    places: Tensor
    tokens: Tensor
    owners: Tensor


@lru_cache(maxsize=64)  # an evaluation asks for the same candidates row after row
def tree_of(candidates: tuple[Ids, ...]) -> Tree:
    """The tree of candidates, each with at least one id."""
    known: dict[tuple[int, int], int] = {}
    before: list[int] = []  # of each fed token: the place it is predicted at
    edges: list[tuple[int, int, int]] = []
    for owner, ids in enumerate(candidates):
        place = 0
        for number, token in enumerate(ids):
            edges.append((place, token, owner))
            if number < len(ids) - 1:
                if (place, token) not in known:
                    before.append(place)
                    known[place, token] = len(before)
                place = known[place, token]
    depths: list[int] = []
    sees = torch.eye(len(before), dtype=torch.bool)
    for number, place in enumerate(before):
        depths.append(depths[place - 1] + 1 if place else 0)
        if place:
            sees[number] |= sees[place - 1]
    places, tokens, owners = torch.tensor(edges).unbind(1)
    fed = torch.tensor([token for _, token in known], dtype=torch.long)
    return Tree(fed, torch.tensor(depths, dtype=torch.long), sees, places, tokens, owners)


def requested(joiner: Joiner, rows: Sequence[Row], candidates: Sequence[Sequence[str]], end: bool) -> list[list[Ids]]:
    """Candidates as ids, tokenised as targets are; `end`: with their end mark.

    Raises:
        ConfigError: a row without candidates, or a candidate with nothing to score.
    """
    known: dict[str, Ids] = {}
    for choices in candidates:
        if not choices:
            raise ConfigError("rank: a prompt has no candidates; give at least one.")
        for choice in choices:
            if choice not in known:
                ids = joiner.target_ids(choice)
                known[choice] = ids if end else ids[: len(ids) - len(joiner.profile.end)]
            if not known[choice]:
                raise ConfigError(
                    f"rank: the candidate '{choice}' has no token to score; give it words, or score its end mark "
                    f"(end=True)."
                )
    return [[known[choice] for choice in choices] for _, choices in zip(rows, candidates, strict=True)]


def ranked(
    score: Callable[[Sequence[Group]], Tensor],
    rows: Sequence[Row],
    candidates: Sequence[Sequence[Ids]],
    normalize: str,
    *,
    queries: int,
    vocabulary: int,
    packed: bool,
) -> list[list[float]]:
    """Candidates' values by prompt.

    Args:
        score: sums of log p of all groups' candidates, one after another.
        rows: the prompts.
        candidates: of each prompt.
        normalize: "sum", "mean" (over scored tokens) or "pmi" (the sum minus the sum without slots).
        queries: positions of a slot.
        vocabulary: logits a position.
        packed: whether `score` makes one row of a group, or a row of every candidate.

    Raises:
        ConfigError: an unknown `normalize`.
    """
    if normalize not in ("sum", "mean", "pmi"):
        raise ConfigError(f"normalize is '{normalize}'; it takes 'sum', 'mean' or 'pmi'.")

    def sums(prompts: Sequence[Row]) -> list[list[float]]:
        found: dict[tuple[Row, Ids], float] = {}
        for part in _parts(_grouped(prompts, candidates), queries, vocabulary, packed):
            keys = [(group.prompt, ids) for group in part for ids in group.candidates]
            found.update(zip(keys, score(part).tolist(), strict=True))
        return [[found[row, ids] for ids in choices] for row, choices in zip(prompts, candidates, strict=True)]

    values = sums(rows)
    if normalize == "mean":
        return [[value / len(ids) for value, ids in zip(*pair, strict=True)] for pair in zip(values, candidates)]
    if normalize == "pmi":
        blind = sums([_without_slots(row) for row in rows])
        return [[value - alone for value, alone in zip(*pair, strict=True)] for pair in zip(values, blind)]
    return values


def _grouped(rows: Sequence[Row], candidates: Sequence[Sequence[Ids]]) -> list[Group]:
    """Distinct prompts with their distinct candidates, in the order of their ids: common beginnings side by side."""
    gathered: dict[Row, set[Ids]] = {}
    for row, choices in zip(rows, candidates, strict=True):
        gathered.setdefault(row, set()).update(choices)
    return [Group(row, tuple(sorted(choices))) for row, choices in gathered.items()]


def _parts(groups: Sequence[Group], queries: int, vocabulary: int, packed: bool) -> Iterator[list[Group]]:
    """Groups as they are scored together: prompts of like length, large groups cut, within the limits above."""
    logits = max(1, LOGITS_AT_ONCE // vocabulary)
    part: list[Group] = []
    wide, high, count = 0, 0, 0  # longest row, positions predicted a row, rows
    for group in sorted(groups, key=lambda each: -row_length(each.prompt, queries)):
        prompt = row_length(group.prompt, queries)
        longest = max(map(len, group.candidates))
        most_rows = len(group.candidates) if packed else min(SCORED_POSITIONS // (prompt + longest), logits // longest)
        # Rows of their own are padded to the longest beside them, and share no beginnings.
        candidates = group.candidates if packed else tuple(sorted(group.candidates, key=len))
        for ids, fed in _cut(candidates, min(FED_TOKENS, logits - 1), max(1, most_rows)):
            words = max(map(len, ids))
            rows, length, predicting = (1, prompt + fed, fed + 1) if packed else (len(ids), prompt + words, words)
            wide, high = max(wide, length), max(high, predicting)
            if part and ((count + rows) * wide > SCORED_POSITIONS or (count + rows) * high > logits):
                yield part
                part, wide, high, count = [], length, predicting, 0
            part.append(Group(group.prompt, ids))
            count += rows
    if part:
        yield part


def _cut(candidates: tuple[Ids, ...], tokens: int, rows: int) -> Iterator[tuple[tuple[Ids, ...], int]]:
    """Candidates in pieces of at most so many fed tokens and rows, and how many tokens each piece feeds."""
    start, fed = 0, 0
    for number, ids in enumerate(candidates):
        new = len(ids) - 1 - (_common(candidates[number - 1][:-1], ids[:-1]) if number > start else 0)
        if number > start and (fed + new > tokens or number - start >= rows):
            yield candidates[start:number], fed
            start, fed, new = number, 0, len(ids) - 1
        fed += new
    yield candidates[start:], fed


def _common(one: Ids, other: Ids) -> int:
    """The length of the beginning that two candidates share."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _without_slots(row: Row) -> Row:
    return tuple(piece for piece in row if isinstance(piece, Text))
