"""What a GPU is given and how, so that it is not kept waiting: copies, and the kernels of attention."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device: on a GPU behind what that is busy with, without waiting until it has done it.

    Others wait: what is sent often lives no longer than the call, and MPS would read it later (pytorch/pytorch#139550).
    """
    return values.to(device, non_blocking=device.type == "cuda")


def choose_attention(device: torch.device) -> None:
    """On a GPU attention by flash or memory-efficient kernels in this process from now on, and not by cuDNN's.

    cuDNN plans anew for every shape it has not seen, tenths of a second each, and no two steps have the same shapes: on
    an H200 a step of new ones took up to five times as long as the same step again, where its kernels gain at most a
    twelfth (`benchmarks/gpu.md`; pytorch/pytorch#155958, modelscope/FunASR#3704).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
