"""Frozen towers beside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def in_own(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Where a tower's weights are float16 no autocast, which is to bfloat16 here: torch refuses to mix the two."""
    return torch.autocast(device.type, enabled=False) if dtype == torch.float16 else nullcontext()
