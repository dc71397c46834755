"""Likelihoods per token; adding up and dividing is left to the objective and the training step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, in nats.

    Args:
        logits: (..., V) unnormalised scores, any float type; computed in float32 at least.
        targets: (...) ids, each in [0, V).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return -flat.view(targets.shape)
