"""The one training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from qformer.errors import TrainingError
from qformer.objectives import Objective
from qformer.sample import Batch


@dataclass(frozen=True)
class StepReport:
    """What a step did: loss in nats per counted thing (summed over parts), gradient norm, counts over all ranks."""

    loss: float
    gradient_norm: float
    counts: dict[str, int]


def train_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    dummy: Batch,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_norm: float | None,
) -> StepReport:
    """One optimizer step over all ranks' micro-batches: every trained token weighs the same, however they were split.

    The counts of the whole step come first; each backward then gets its share of Σ sum/count.  All ranks make as many
    forward passes as the longest needs, the surplus on `dummy`, since gradients travel inside the wrapped backward.
    """
    counts, rounds = global_counts(objective, batches, accelerator)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[Tensor] = []
    with accelerator.autocast():  # around them all, so that weights are cast once a step
        for number in range(rounds):
            batch = batches[number] if number < len(batches) else dummy
            last = number == rounds - 1
            with nullcontext() if last else accelerator.no_sync(model):
                sums = model(batch)
                loss = torch.stack([sums[part] / max(1, counts[part]) for part in sums]).sum()
                (loss * accelerator.num_processes).backward()  # DDP averages over ranks; ours is a sum
            losses.append(loss.detach())
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    total = accelerator.reduce(torch.stack(losses).sum(), "sum")
    # Asked once, when all is on its way, since a GPU would wait for it; of what is the same on all ranks, which meet
    # there; and before clipping, which would spread it to all gradients.
    if not (torch.isfinite(norm) and torch.isfinite(total)):
        raise not_finite(model, losses, batches)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepReport(float(total), float(norm), counts)


def rehearse(model: nn.Module, dummy: Batch, accelerator: Accelerator) -> None:
    """A backward pass that adds nothing, before the first step of several ranks.

    DDP puts gradients into buckets anew behind its first backward pass, by the order in which they came, and sums over
    more than two ranks are rounded by their place in a bucket: without this a run that goes on would add up its first
    step in another order than one that never stopped.
    """
    if accelerator.num_processes == 1:
        return
    with accelerator.autocast():
        torch.stack([*model(dummy).values()]).sum().backward()
    model.zero_grad(set_to_none=True)


def global_counts(
    objective: Objective, batches: Sequence[Batch], accelerator: Accelerator
) -> tuple[dict[str, int], int]:
    """Counts of a step's parts over all micro-batches and ranks, and the number of forward passes each rank makes."""
    counted = [objective.counts(batch) for batch in batches]
    parts = sorted({part for each in counted for part in each} | {"answer"})
    own = torch.tensor([sum(each.get(part, 0) for each in counted) for part in parts], device=accelerator.device)
    rounds = torch.tensor([max(1, len(batches))], device=accelerator.device)
    total = accelerator.reduce(own, "sum")
    return dict(zip(parts, total.tolist(), strict=True)), int(accelerator.gather(rounds).max())


class NotFiniteError(TrainingError):
    """A loss or gradient that is not a finite number; names the module it came from and the samples it came with."""

    def __init__(self, where: str, samples: Sequence[str]):
        self.where, self.samples = where, tuple(samples)
        shown = ", ".join(self.samples[:8]) + (" …" if len(self.samples) > 8 else "")
        found = f"a value that is not finite in {where}, with the samples {shown}"
        super().__init__(f"{found}; lower train.rate, or look at these samples.")


def not_finite(model: nn.Module, losses: Sequence[Tensor], batches: Sequence[Batch]) -> NotFiniteError:
    """What went wrong in a step, asked by all ranks together: the losses of some micro-batches, or else a gradient.

    There may be more losses than micro-batches: those behind are of dummies.
    """
    finite = [bool(loss.isfinite()) for loss in losses]
    names = [name for batch, fine in zip(batches, finite, strict=False) if not fine for name in batch.samples]
    if names := gather_object(names):
        return NotFiniteError("the loss", names)
    return NotFiniteError(first_not_finite(model), gather_object([name for each in batches for name in each.samples]))


def first_not_finite(model: nn.Module) -> str:
    """The first trained parameter whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name.removeprefix('module.')}"
    return "the gradient"
