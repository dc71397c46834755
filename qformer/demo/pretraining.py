"""What the trainings of the demo's towers share: a clock, the rate's schedule, Muon, and how weights are written."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def say(line: str) -> None:
    """Progress, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Clock:
    """Prints a line now and then: step, mean losses since the last line, seconds."""

    def __init__(self, name: str, steps: int, every: int = 50):
        self.name, self.steps, self.every = name, steps, every
        self.began = time.perf_counter()
        self.seen: list[list[float]] = []

    def tick(self, step: int, *losses: Tensor) -> None:
        """Count one step's losses."""
        self.seen.append([loss.item() for loss in losses])
        if (step + 1) % self.every == 0:
            seconds = time.perf_counter() - self.began
            means = " ".join(f"{sum(column) / len(column):.4f}" for column in zip(*self.seen, strict=True))
            say(f"{self.name} {step + 1}/{self.steps} loss {means} {seconds:.0f} s")
            self.seen.clear()


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int, most: float = 1.0) -> None:
    """Linear warm-up, then cosine to zero, up to a share `most` of each group's first rate."""
    share = most * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group.setdefault("full_rate", group["lr"])
        group["lr"] = group["full_rate"] * share


def save_half(model: Any, folder: Path) -> None:
    """Write a transformers model as float16 safetensors, without changing the one in memory."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan and others 2024), for matrices; in float32: bfloat16 is slow on many CPUs."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are treated together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                directions = []
                for p in same:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    assert p.grad is not None
                    directions.append(p.grad.lerp(state["momentum"], group["momentum"]))
                turned = orthogonal(torch.stack(directions))
                scale = max(1.0, same[0].shape[0] / same[0].shape[1]) ** 0.5
                for p, direction in zip(same, turned, strict=True):
                    p.mul_(1 - 0.01 * group["lr"]).add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(N, A, B) -> the nearest orthogonal matrices, about, by Newton and Schulz's iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / (found.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = found @ found.mT
        found = 3.4445 * found + (-4.7750 * square + 2.0315 * square @ square) @ found
    return found.mT if tall else found
