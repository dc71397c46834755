"""What each saving of a training step brings alone, and how far it is from the floor: `python benchmarks/parts.py`.

On the rows and the models of `benchmarks/speed.py`.  Each saving is switched off by itself; steps with and without it
are timed in turn, and their losses compared before.  A row says what was tried and brought too little to be kept.  The
floor is what the step's floating-point operations would take at the speed of this machine's own large matrix products.
One row is of an encoder–decoder alone, of the T5 of `benchmarks/ranking.py`.  `--compile` has the blocks compiled as
`train.compile` does, which takes minutes before the first step, and times that as one more saving; `--only padded
floor` chooses rows by words in their names.  Autocast to bfloat16 takes minutes a step on a CPU without instructions
for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import ranking as ranking_benchmark
import speed
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qformer.assemble import Prepared
from qformer.backbones import fused, ranking
from qformer.data.batch import StepMaker
from qformer.data.mixture import Mixture
from qformer.nn.attention import CrossAttention, Places, SelfAttention
from qformer.nn.tokens import Tokens
from qformer.sample import Batch
from qformer.train import compiling
from qformer.train.step import train_step
from qformer.vlm import VLM

SIDE = 2048
"""Of the matrices whose product says how fast the machine is."""
Switch = Callable[[VLM], AbstractContextManager[Any]]


@contextmanager
def padded_rows(model: VLM) -> Iterator[None]:
    """Rows of the LLM padded to the longest instead of packed."""
    with patch.object(model.language, "packing", False):
        yield


@contextmanager
def padded_text(model: VLM) -> Iterator[None]:
    """The Q-Former computes what instructions are padded with."""
    of = Places.of

    def padded(*given: Any) -> Places:
        return of(*given)._replace(real=None)

    with patch.object(Places, "of", padded):
        yield


@contextmanager
def whole_head(model: VLM) -> Iterator[None]:
    """Logits at all positions of the LLM instead of those that predict."""
    with patch.dict(vars(model.language), {"_head_stands_alone": False, "_keeps_positions": False}):
        yield


@contextmanager
def last_text(model: VLM) -> Iterator[None]:
    """The words' half of the Q-Former's last block, which nothing reads."""
    last = model.connector.qformer.blocks[-1]
    hook = last.register_forward_hook(lambda _, given, made: made[: given[1].seen])
    try:
        with patch.object(last, "queries_only", False):
            yield
    finally:
        hook.remove()


@contextmanager
def keys_a_read(model: VLM) -> Iterator[None]:
    """The Q-Former makes keys and values of a picture anew for every read of it; the encoder still sees it once."""
    reads = model._reads

    def apart(batch: Batch) -> Any:
        tokens, instruction = reads(batch)
        assert tokens.pictures is not None and tokens.mask is None
        return Tokens(tokens.values[tokens.pictures]), instruction

    with patch.object(model, "_reads", apart):
        yield


@contextmanager
def logits_in_parts(model: VLM) -> Iterator[None]:
    """Logits of a quarter of the trained tokens at a time, written again backwards: for memory, where they are many."""
    trained = sum(answer for _, answer in speed.SHAPES)
    with patch.object(ranking, "LOGITS_AT_ONCE", -(-trained // 4) * model.language.model.config.vocab_size):
        yield


def in_bfloat16(model: VLM) -> AbstractContextManager[Any]:
    """Products in bfloat16, as a run makes them with `train.precision`."""
    return torch.autocast("cpu", torch.bfloat16)


def features_at_hand(model: VLM, given: Batch) -> Switch:
    """The encoder's outputs of a batch, made beforehand."""
    kept = model.encode(given.pixels)
    return lambda model: speed.features(model, kept)


def a_picture_a_read(given: Batch) -> Batch:
    """Every read with a copy of its picture."""
    pictures = [read.picture for read in given.reads]
    reads = tuple(dataclasses.replace(read, picture=number) for number, read in enumerate(given.reads))
    return dataclasses.replace(given, pixels=given.pixels[pictures], reads=reads)


def norms_written_out(model: VLM) -> AbstractContextManager[None]:
    """The LLM's norms and activations as transformers writes them."""
    return fused.as_written(model.language.model)


@contextmanager
def one_product(model: VLM) -> Iterator[None]:
    """Queries, keys and values of the Q-Former by one product, and keys and values of pictures by another."""

    def project(source: Tensor, *layers: nn.Linear) -> Tensor:
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        return F.linear(source, torch.cat(weights), torch.cat(biases))

    plain = SelfAttention.forward

    def among_all(self: SelfAttention, x: Tensor, places: Places, *, queries_only: bool = False) -> Tensor:
        if queries_only:  # asked by some and answered by all: nothing to share
            return plain(self, x, places, queries_only=True)
        rows = places.in_rows(project(x, self.query, self.key, self.value))
        context = self._context(*rows.chunk(3, -1), places.mask)
        return self._closed(x, places.in_line(context))

    def at_pictures(self: CrossAttention, x: Tensor, tokens: Tokens) -> Tensor:
        both, mask = project(tokens.values, self.key, self.value), tokens.mask
        if tokens.pictures is not None:
            both = both.index_select(0, tokens.pictures)
            mask = None if mask is None else mask.index_select(0, tokens.pictures)
        return self._closed(x, self._context(self.query(x), *both.chunk(2, -1), mask))

    with patch.object(SelfAttention, "forward", among_all), patch.object(CrossAttention, "forward", at_pictures):
        yield


SAVINGS: dict[str, tuple[int, Switch | None]] = {
    "rows packed, not padded": (14, padded_rows),
    "output layer at predicting positions": (14, whole_head),
    "instructions without padding in the Q-Former": (14, padded_text),
    "no last text half in the Q-Former": (14, last_text),
    "norms of the LLM by one operation": (14, norms_written_out),
    "each picture once, 14 rows on two": (2, None),
    "of that, its keys and values once": (2, keys_a_read),
}
"""Pictures of the 14 rows, and what switches the saving off (None: a batch with copies)."""
OPTIONS: dict[str, tuple[Callable[[VLM, Batch], Switch], float]] = {
    "features at hand (vision.cache)": (features_at_hand, 1e-5),
    "logits in four parts": (lambda model, given: logits_in_parts, 1e-5),
    "autocast to bfloat16 (train.precision)": (lambda model, given: in_bfloat16, 2e-2),
}
"""What is not done in this step by itself: what switches it on, and how near the losses come."""
TRIED: dict[str, Switch] = {"projections of the Q-Former fused": one_product}
"""What was tried and not kept, and what switches it on."""
BY_LENGTH = "micro-batches by length, of a T5 alone"
COMPILED = "blocks compiled (train.compile)"
ROOM = 1024
"""Positions of a micro-batch of an encoder–decoder, on both its sides."""


def table(both: speed.Both, repeats: int, compiled: bool, only: Sequence[str] = ()) -> Iterator[str]:
    """A row a saving, and the floor, or those whose names have one of the words; what is `compiled` is so from its row
    on.
    """

    def wanted(name: str) -> bool:
        return not only or any(word in name for word in only)

    yield "| saving | with it (s) | without (s) | brings | range |"
    yield "|---|---|---|---|---|"
    for name, (pictures, off) in SAVINGS.items():
        if wanted(name):
            yield f"| {name} | {saved(both, speed.batch(speed.SHAPES, pictures), off, repeats)} |"
    given = speed.batch(speed.SHAPES, len(speed.SHAPES))
    for name, (option, near) in OPTIONS.items():
        if wanted(name):
            yield f"| {name} | {saved(both, given, None, repeats, option(both.ours, given), near)} |"
    for name, on in TRIED.items():
        if wanted(name):
            yield f"| {name} (tried, not kept) | {saved(both, given, None, repeats, on)} |"
    if wanted(BY_LENGTH):
        yield f"| {BY_LENGTH} | {by_length(repeats)} |"
    if compiled and wanted(COMPILED):
        compiling.compile_blocks(both.ours)
        yield f"| {COMPILED} | {saved(both, given, compiling.as_written, repeats)} |"
    if wanted("floor"):
        with compiling.as_written(both.ours):
            told = floor(both, repeats)
        yield ""
        yield told


def saved(
    both: speed.Both, given: Batch, off: Switch | None, repeats: int, on: Switch | None = None, near: float = 1e-5
) -> str:
    """Seconds with and without a saving, and the ratio; with neither switch, without is a picture a read."""
    plain = a_picture_a_read(given) if off is None and on is None else given
    mine, _ = both.optimizers()
    losses: dict[str, float] = {}

    def step(batch: Batch, label: str) -> None:
        report = train_step(both.ours, both.ours.objective, [batch], batch, mine, both.accelerator, None)
        losses[label] = report.loss

    def without() -> None:
        with off(both.ours) if off else nullcontext():
            step(plain, "without")

    def saving() -> None:
        with on(both.ours) if on else nullcontext():
            step(given, "with")

    without(), saving()
    assert math.isclose(losses["with"], losses["without"], rel_tol=near), losses
    return cells(*speed.in_turn(without, saving, repeats))


def cells(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Seconds with and without, and their ratio, as a row tells them."""
    return f"{statistics.median(fast):.3g} | {statistics.median(slow):.3g} | {speed.faster(slow, fast)}"


def by_length(repeats: int) -> str:
    """The rows of four steps, in no order, in micro-batches cut by length and as they come: an encoder–decoder's loss
    and gradient at its soft tokens.
    """
    llm = ranking_benchmark.tower("t5")
    shapes = list(speed.SHAPES) * 4
    random.Random(0).shuffle(shapes)
    rows = speed.batch(shapes, len(shapes)).rows
    items = [Prepared(str(number), (str(number),), (), row) for number, row in enumerate(rows)]
    cut = {"mixture": Mixture({"rows": 1.0}, {"rows": len(rows)}, 0), "sources": {}, "assembler": cast(Any, None)}
    sizes = {"batch_size": len(rows), "steps": 1, "soft_tokens": speed.QUERIES, "micro_batch_tokens": ROOM}
    maker = StepMaker(**cut, **sizes, apart=True)
    sorted_groups = [*maker.groups(items)]
    with patch.object(StepMaker, "_falling", lambda self, item: 0):
        groups = [*maker.groups(items)]
    drawn = torch.randn(len(rows), speed.QUERIES, llm.width)
    losses: dict[str, float] = {}

    def step(groups: Sequence[Sequence[Prepared]], label: str) -> None:
        losses[label] = 0.0
        for group in groups:
            soft = drawn.clone().requires_grad_()
            loss = -llm.log_likelihood(soft, [item.row for item in group])[0].sum()
            loss.backward()
            losses[label] += loss.item()

    without, saving = partial(step, groups, "without"), partial(step, sorted_groups, "with")
    without(), saving()
    assert math.isclose(losses["with"], losses["without"], rel_tol=1e-5), losses
    return cells(*speed.in_turn(without, saving, repeats))


def floor(both: speed.Both, repeats: int) -> str:
    """Seconds of a step beside those of its operations at the speed of large matrix products."""
    given = speed.batch(speed.SHAPES, len(speed.SHAPES))
    mine, _ = both.optimizers()
    with FlopCounterMode(display=False) as counter:
        train_step(both.ours, both.ours.objective, [given], given, mine, both.accelerator, None)
    taken, seconds = counter.get_total_flops(), speed.step_time(both, given, repeats)
    peak = matrix_speed(repeats)
    return (
        f"A step of 14 rows on 14 pictures makes {taken / 1e12:.2f} · 10¹² floating-point operations in products, "
        f"{taken / peak:.2f} s at the {peak / 1e9:.0f} · 10⁹ a second of matrices of {SIDE} × {SIDE}, and takes "
        f"{seconds:.2f} s: {seconds * peak / taken:.2f} times the floor."
    )


def matrix_speed(repeats: int) -> float:
    """Operations a second of a large product, the median."""
    first, second = torch.randn(2, SIDE, SIDE)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        first @ second
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / statistics.median(seconds[1:])


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="time compiled blocks too")
    parser.add_argument("--only", nargs="*", default=(), help="words of the rows that are wanted, or floor")
    options = parser.parse_args()
    print(speed.machine(options.repeats))
    with tempfile.TemporaryDirectory() as folder:
        for line in table(speed.Both(Path(folder)), options.repeats, options.compile, options.only):
            print(line, flush=True)


if __name__ == "__main__":
    main()
