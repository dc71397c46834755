"""Where a model is deep: its lists of alike blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

LEAST_PART = 0.05
"""Of a model's parameters, what a list of alike blocks holds at least to count as its depth."""


def blocks_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Lists of alike blocks that make a model deep, by name: one in most, two in encoder–decoders, none in others."""
    found: list[tuple[str, Any]] = []
    whole = sum(each.numel() for each in model.parameters())
    for name, each in model.named_modules():
        alike = isinstance(each, nn.ModuleList | nn.Sequential) and len({type(block) for block in each}) == 1
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if alike and not inside and sum(p.numel() for p in each.parameters()) >= LEAST_PART * whole:
            found.append((name, each))
    return found
