"""Frozen towers beside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

HALVES = (torch.float16, torch.bfloat16)


def in_own(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """No autocast, which is to bfloat16 here, where a tower's weights are in half precision.

    torch refuses to mix float16 with it, and what it would do in bfloat16 is to make some of a block's tensors float32
    and back again.
    """
    return torch.autocast(device.type, enabled=False) if dtype in HALVES else nullcontext()
