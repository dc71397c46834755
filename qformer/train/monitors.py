"""Readings that tell a run that has gone blind from a healthy one; they change nothing in the run itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qformer.nn.qformer import query_cosine
from qformer.sample import Batch, Slot
from qformer.train import compiling
from qformer.vlm import VLM

COSINE_LIMIT = 0.99
GAP_LIMIT = 0.01
READINGS = 3


@contextmanager
def undisturbed(model: VLM) -> Iterator[None]:
    """Evaluation mode without gradients, every random state and mode left as it was found, and nothing compiled."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), compiling.as_written(model):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def readings(model: VLM, batch: Batch) -> dict[str, float]:
    """Query cosine, cross-attention entropy and image-shuffle gap of one batch.

    cosine: mean over pairs of different queries of the cosine between their outputs (1: the queries have collapsed).
    entropy: of the cross-attention over image tokens, over its greatest value log P (1: looks everywhere alike).
    gap: loss with another sample's picture minus loss with its own, in nats a token (0: the pictures do not matter);
    left out where the batch has no pictures to change for others.
    """
    with undisturbed(model):
        outputs, entropy = model.look(batch)
        result = {"cosine": float(query_cosine(outputs)), "entropy": float(entropy)}
        shuffled = with_others_pictures(batch)
        if shuffled is not None:
            tokens = max(1, model.objective.counts(batch)["answer"])
            own, other = model(batch)["answer"], model(shuffled)["answer"]
            result["gap"] = float(other - own) / tokens
    return result


def with_others_pictures(batch: Batch) -> Batch | None:
    """The batch with every read moved on by the same number of pictures, the least that leaves no row a picture of its
    own (a row may have several: frames of a film are nearly alike); None where there is no such number.
    """
    pictures = batch.pictures
    rows = [{batch.reads[piece.read].picture for piece in row if isinstance(piece, Slot)} for row in batch.rows]
    for step in range(1, pictures):
        if not any((picture + step) % pictures in own for own in rows for picture in own):
            moved = (replace(read, picture=(read.picture + step) % pictures) for read in batch.reads)
            return replace(batch, reads=tuple(moved))
    return None


class BlindnessAlarm:
    """Says in words when several readings in a row look like a model that does not see."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, float]] = deque(maxlen=READINGS)

    def __call__(self, reading: dict[str, float]) -> list[str]:
        """The warnings after one more reading."""
        self.recent.append(reading)
        if len(self.recent) < READINGS:
            return []
        warnings = []
        if all(each["cosine"] > COSINE_LIMIT for each in self.recent):
            warnings.append(
                f"the query outputs are nearly equal (mean cosine above {COSINE_LIMIT} at {READINGS} readings in a "
                f"row): the queries have collapsed; try a lower train.rate or a longer warm-up."
            )
        if all(each.get("gap", 1.0) < GAP_LIMIT for each in self.recent):
            warnings.append(
                f"the pictures hardly matter (image-shuffle gap below {GAP_LIMIT} nats a token at {READINGS} readings "
                f"in a row): the model answers from the words alone; check the pictures, or train longer."
            )
        return warnings
