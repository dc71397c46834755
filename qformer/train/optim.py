"""Parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from qformer.config import TrainConfig


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, decay_queries: bool
) -> list[dict[str, object]]:
    """Weight decay on matrices alone: norms, biases and (unless asked for) the queries go without.

    The original code decays the queries, since their tensor is 3-D (LAVIS `Blip2Base.get_optimizer_params`).
    """
    decayed = {
        name
        for name, parameter in parameters.items()
        if (name.rpartition(".")[2] == "queries" and decay_queries)
        or (name.rpartition(".")[2] != "queries" and parameter.ndim >= 2)
    }
    return [
        {"params": [parameters[name] for name in parameters if name in decayed], "weight_decay": weight_decay},
        {"params": [parameters[name] for name in parameters if name not in decayed], "weight_decay": 0.0},
    ]


def optimizer_for(parameters: Mapping[str, nn.Parameter], settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW as the paper uses it, over the trainable parameters."""
    return torch.optim.AdamW(
        parameter_groups(parameters, settings.weight_decay, settings.decay_queries),
        lr=learning_rate(0, settings),
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,
    )


def learning_rate(step: int, settings: TrainConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to `final_rate` at the last step; counted in steps from 0."""
    if step < settings.warmup_steps:
        return settings.warmup_rate + (settings.rate - settings.warmup_rate) * step / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    share = min(1.0, (step - settings.warmup_steps) / span)
    return settings.final_rate + (settings.rate - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * share))
