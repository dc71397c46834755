"""What a run's adapter sees of its LLM in fewer bits: `python benchmarks/quantized.py RUN [KEY=VALUE ...]`.

The first samples of the run's mixture go through the run's adapter (`--fresh`: as it was before training), in front of
its LLM in float32, in bfloat16, and in 8 and 4 bit by whichever of transformers' backends are installed.  For each a
row: the loss in nats a trained token; the cosine of the gradient of all adapter parameters, taken as one vector, with
that in front of float32, of the whole batch and sample by sample (median and least); what the LLM takes in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qformer import cards, config, loading, saved
from qformer.config import RunConfig
from qformer.data.batch import StepMaker, mixture_of, open_sources
from qformer.data.index import Index
from qformer.sample import Batch
from qformer.vlm import VLM

WAYS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "float32": ("torch", "float32", None),
    "bfloat16": ("torch", "bfloat16", None),
    "8 bit, bitsandbytes (LLM.int8)": ("bitsandbytes", "float32", {"load_in_8bit": True}),
    "8 bit, torchao, weights only": (
        "torchao", "float32",
        {"quant_method": "torchao",
         "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}},
    ),
    "8 bit, quanto, weights only": ("optimum.quanto", "float32", {"quant_method": "quanto", "weights": "int8"}),
    "4 bit, bitsandbytes NF4": (
        "bitsandbytes", "float32", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "4 bit, bitsandbytes FP4": (
        "bitsandbytes", "float32", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
}  # fmt: skip
"""The module that a way needs, the LLM's dtype, and what is asked of transformers."""


def installed(module: str) -> bool:
    """Whether it can be imported; a part of a package that is not there cannot."""
    package = module.partition(".")[0]
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def batches(model: VLM, settings: RunConfig, count: int) -> Iterator[Batch]:
    """The first samples of the run's own mixture, one at a time, as training would show them."""
    named, multipliers = cards.mixture(settings.data)
    root = Path(settings.data.root)
    sources = open_sources(named, root, index=Index(root, settings.data.index))
    mixture = mixture_of(sources, settings.data, multipliers, settings.seed)
    maker = StepMaker(
        mixture,
        sources,
        model.assembler(training=True),
        batch_size=1,
        steps=count,
        soft_tokens=settings.qformer.queries,
        micro_batch_tokens=settings.train.micro_batch_tokens,
        packed=model.language.packs is not None,
    )
    for step in range(count):
        yield from maker[step].batches


def gradients(model: VLM, given: Iterable[Batch]) -> Iterator[tuple[float, int, Tensor]]:
    """Of every batch the summed loss in nats, its tokens, and the gradient (parameters,) of all that is trained."""
    model.eval()  # no dropout, which would differ from way to way
    for batch in given:
        lost = model(batch)["answer"]
        lost.backward()
        trained = model.trainable().values()
        found = torch.cat([p.grad.float().flatten() for p in trained if p.grad is not None])
        model.zero_grad()
        yield lost.item(), model.objective.counts(batch)["answer"], found


def cosine(one: Tensor, other: Tensor) -> float:
    """In float64: float32 sums of millions of squares are off in the fourth digit."""
    one, other = one.double(), other.double()
    return float(one @ other / (one.norm() * other.norm()))


def row(name: str, model: VLM, given: Iterable[Batch], kept: list[Tensor]) -> str:
    """A row of the table; the first way's gradients are kept, to compare all others with."""
    first, lost, tokens, each = not kept, 0.0, 0, []
    own = other = torch.zeros(())
    for number, (loss, count, found) in enumerate(gradients(model, given)):
        if first:
            kept.append(found)
        lost, tokens = lost + loss, tokens + count
        each.append(cosine(found, kept[number]))
        own, other = own + found, other + kept[number]
    size = model.language.model.get_memory_footprint() / 1e6
    cells = f"{lost / tokens:.4f} | {cosine(own, other):.4f} | {statistics.median(each):.4f} ({min(each):.4f})"
    return f"| {name} | {cells} | {size:,.0f} MB |"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings, where data or towers have moved")
    parser.add_argument("--fresh", action="store_true", help="the adapter as it starts")
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    settings = config.load(options.run / "config.yaml", options.changes)
    print(f"{platform.machine()}, Python {sys.version.split()[0]}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {options.samples} samples\n")
    print("| LLM in | loss | cosine of the whole | of each sample, median (least) | memory |")
    print("|---|---:|---:|---:|---:|")
    kept: list[Tensor] = []
    for name, (module, dtype, values) in WAYS.items():
        if not installed(module):
            print(f"| {name} | {module.partition('.')[0]} is not installed | | | |")
            continue
        spoken = dataclasses.replace(settings.language, dtype=dtype, quantization=values)
        init = settings.qformer.init if options.fresh else str(saved.last_checkpoint(options.run))
        begun = dataclasses.replace(settings.qformer, init=init)
        changed = dataclasses.replace(settings, language=spoken, qformer=begun)
        model = loading.build(changed, report=str)
        print(row(name, model, batches(model, settings, options.samples), kept), flush=True)


if __name__ == "__main__":
    main()
