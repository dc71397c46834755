"""What a device computes with: the types of frozen towers beside autocast, and the kernels of attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def in_own(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Where a tower's weights are float16 no autocast, which is to bfloat16 here: torch refuses to mix the two."""
    return torch.autocast(device.type, enabled=False) if dtype == torch.float16 else nullcontext()


def choose_attention(device: torch.device) -> None:
    """On a GPU attention by flash or memory-efficient kernels in this process from now on, and not by cuDNN's.

    cuDNN plans anew for every shape it has not seen, tenths of a second each, and no two steps have the same shapes: on
    an H200 a step of new ones took up to five times as long as the same step again (`benchmarks/gpu.md`), where its
    kernels gain at most a few per cent (pytorch/pytorch#155958, modelscope/FunASR#3704).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
