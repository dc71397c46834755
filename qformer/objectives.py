"""What is optimised: parts of a loss as sums and counts, so that any split of a step gives the same gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from qformer.sample import Batch, trained_tokens

if TYPE_CHECKING:
    from qformer.vlm import VLM


class Objective(Protocol):
    """`counts` needs no forward pass; `sums` is what `VLM.forward` returns.  The loss is Σ over parts of sum/count."""

    whole_batch: bool
    """True where a step cannot be split into micro-batches (in-batch negatives)."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many things each part's sum is over."""
        ...

    def sums(self, model: VLM, batch: Batch) -> dict[str, Tensor]:
        """Each part's sum, a scalar with a gradient."""
        ...


class AnswerLikelihood:
    """Negative log-likelihood of the trained tokens given pictures and instructions (InstructBLIP, section 2)."""

    whole_batch = False

    def counts(self, batch: Batch) -> dict[str, int]:
        """Trained tokens; none in a dummy."""
        return {"answer": sum(map(trained_tokens, batch.rows)) if batch.weight else 0}

    def sums(self, model: VLM, batch: Batch) -> dict[str, Tensor]:
        """Nats over all trained tokens of the batch."""
        soft, rows = model.seen(batch)
        log_likelihood, _ = model.language.log_likelihood(soft, rows)
        return {"answer": -log_likelihood.sum() * batch.weight}
