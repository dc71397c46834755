"""Prompts of unlike length read side by side, before an LLM goes on writing behind each: no padding is computed.

`generate` pads prompts on the left.  Here all but the last position of each is read in packed rows; what attention
keeps of them is then laid out as `generate` would have it, so that it has one position a prompt left to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qformer.backbones.packing import Packing, cheapest, packed
from qformer.devices import sent

WORTH = 0.85
"""Prompts are read side by side where no more than this share of their padded positions is real."""


def worth(lengths: Sequence[int]) -> bool:
    """Whether reading prompts of these lengths side by side saves more than the step it costs."""
    return min(lengths) > 1 and sum(lengths) <= WORTH * len(lengths) * max(lengths)


@dataclass(frozen=True)
class Layout:
    """Where R prompts, padded on the left to S positions, stand in packed rows but for their last positions.

    packing: the packed rows (B, T); columns (B, T): the padded position of each packed one; places (R, S - 1): the
    number, row by row, of the packed position that stands at each padded one (anything in padding).
    """

    packing: Packing
    columns: Tensor
    places: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, bins: Sequence[Sequence[int]] | None = None) -> Layout:
        """Of prompts of these lengths, each at least 2, for an LLM of this width."""
        read = [length - 1 for length in lengths]
        packing = packed(read, bins or cheapest(read, width))
        starts = max(read) - torch.tensor(read)
        real = packing.owners >= 0
        columns = torch.where(real, starts[packing.owners.clamp(min=0)] + packing.positions, 0)
        places = torch.zeros(len(read), max(read), dtype=torch.long)
        places[packing.owners[real], columns[real]] = real.flatten().nonzero().flatten()
        return cls(packing, columns, places)

    def packed(self, inputs: Tensor) -> Tensor:
        """Padded embeddings (R, S, L) -> (B, T, L)."""
        places = (self.packing.owners.clamp(min=0), self.columns)
        return inputs[tuple(sent(each, inputs.device) for each in places)]

    def padded(self, layers: Iterable[Any], cache: Any, copies: int) -> Any:
        """Puts keys and values of packed rows (B, heads, T, width), layer by layer, into a cache: (R · copies, heads,
        S - 1, width).
        """
        places = self.places.repeat_interleave(copies, 0)
        for number, layer in enumerate(layers):
            places = sent(places, layer.keys.device)  # once, but for an LLM over several devices
            kept = (each.transpose(1, 2).flatten(0, 1) for each in (layer.keys, layer.values))
            keys, values = (each[places].transpose(1, 2) for each in kept)
            cache.update(keys, values, number)
        return cache
