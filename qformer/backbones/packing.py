"""Rows of unlike length side by side in few tensor rows, so that an LLM computes no padding.

Pieces that share a tensor row count their positions from 0 again, and an LLM keeps them apart in one of two ways.
*Positions*: transformers sees them restart and draws the block-diagonal mask itself, windows and all.  *Mask*: the mask
is given, for families that overlook positions.  An LLM that can do neither takes padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from qformer.devices import sent

WIDER = (1, 2, 3, 4)
"""Tensor rows are this many times as long as the longest row at most."""
ATTENTION = 6
"""A position's linear layers cost this many times its width in keys: 12 · width² against 2 · width · keys."""


@dataclass(frozen=True)
class Packing:
    """B tensor rows of S positions that hold all rows once.

    bins: the rows' numbers in each tensor row, in order; owners (B, S): the row's number at each position, -1 in
    padding; positions (B, S): counted from each row's own first, and in padding from 0.
    """

    bins: tuple[tuple[int, ...], ...]
    owners: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on a device, which is not waited for."""
        return Packing(self.bins, sent(self.owners, device), sent(self.positions, device))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, S, S), added to scores: 0 where a position sees another of its row before it or itself, else the
        least number there is.
        """
        span = self.owners.shape[1]
        sees = self.owners[:, :, None] == self.owners[:, None, :]
        sees &= torch.ones(span, span, dtype=torch.bool, device=sees.device).tril()
        hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return hidden.masked_fill(~sees, torch.finfo(dtype).min)[:, None]

    @property
    def firsts(self) -> Tensor:
        """(B, S) bool: positions that nothing in their tensor row predicts."""
        return (self.positions == 0) | (self.owners < 0)


def cheapest(lengths: Sequence[int], width: int) -> tuple[tuple[int, ...], ...]:
    """Bins of rows for the length of tensor rows that costs an LLM of this width least."""
    options = [first_fit(lengths, max(lengths) * times) for times in WIDER]
    return min(options, key=lambda bins: _cost(bins, lengths, width))


def packed(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> Packing:
    """Rows of these lengths, each at least 1, in the tensor rows that the bins make."""
    span = max(sum(lengths[number] for number in numbers) for numbers in bins)
    owners, positions = [], []
    for numbers in bins:
        padding = span - sum(lengths[number] for number in numbers)
        owners.append([*chain.from_iterable([number] * lengths[number] for number in numbers), *[-1] * padding])
        positions.append([*chain.from_iterable(range(lengths[number]) for number in numbers), *range(padding)])
    return Packing(tuple(map(tuple, bins)), torch.tensor(owners), torch.tensor(positions))


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of rows in bins of a capacity that the longest keeps to: by falling length, each into the first bin with
    room (within 11/9 of the fewest bins, plus one: Johnson et al., 1974).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        place = next((place for place, left in enumerate(room) if left >= lengths[number]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(number)
        room[place] -= lengths[number]
    return tuple(map(tuple, bins))


def _cost(bins: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> float:
    """Positions, each dearer the more keys it looks at; of attention the whole square is computed."""
    span = max(sum(lengths[number] for number in numbers) for numbers in bins)
    return len(bins) * span * (1 + span / (ATTENTION * width))
