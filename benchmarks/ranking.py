"""How much faster candidates are ranked than by one forward pass each: `python benchmarks/ranking.py`.

A Llama of SmolLM2-135M's sizes with random weights, a prompt of 72 positions, candidates of one to four tokens (2.5 on
average); one prompt at a time, and eight as an evaluation ranks several.  The baseline scores every candidate in a row
of its own, all rows in one padded call, with the soft tokens at hand and the output layer on the candidates' positions
only.  Both are timed in turn in one process; the table gives
medians of seconds, the median of the paired ratios and their range.  On a machine that does other work as well, the
clock's seconds tell little: `--clock cpu` counts those that the processor spent on it (OMP_NUM_THREADS=1 beside it).
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

from qformer.backbones.decoder_only import DecoderOnly
from qformer.backbones.encoder_decoder import EncoderDecoder
from qformer.backbones.language import LanguageTower
from qformer.backbones.ranking import Group
from qformer.sample import Row, Slot, Text
from qformer.text import Profile

QUERIES, PROMPT, VOCABULARY = 32, 72, 49_152
IDS = 30_000
"""What random ids are below."""
SMOL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
}  # fmt: skip
T5_SMALL = {
    "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 8, "num_heads": 6, "vocab_size": 32_128,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


KINDS = ("decoder-only", "t5")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def tower(kind: str) -> LanguageTower:
    """An LLM with random weights; its tokenizer is never asked.  Rows are padded: the baseline is one padded call."""
    torch.manual_seed(0)
    profile = Profile(layout="plain", opening=(), end=(2,), pad=0, encoder_decoder=kind == "t5")
    if kind == "t5":
        model: Any = T5ForConditionalGeneration(T5Config(**T5_SMALL)).eval()
        return EncoderDecoder(model, _NoTokenizer(), profile)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SMOL)).eval()
    return DecoderOnly(llama, _NoTokenizer(), profile, packing=False)


class _NoTokenizer:
    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return VOCABULARY


def candidates(count: int) -> tuple[tuple[int, ...], ...]:
    """Distinct candidates of one to four tokens, equally many of each length."""
    dice = random.Random(count)
    return tuple(tuple(dice.randrange(3, IDS) for _ in range(1 + number % 4)) for number in range(count))


def prompt(number: int) -> Row:
    """72 positions, of other words for every number."""
    first = 3 + number * PROMPT
    return (Slot(number), Text(tuple(range(first, first + PROMPT - QUERIES))))


def measure(
    llm: LanguageTower, count: int, repeats: int, clock: Any, prompts: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of the baseline and of `rank`'s engine for so many prompts at once, in turn, after one untimed round.

    On a GPU `clock` has to wait for what was begun.
    """
    soft = torch.randn(prompts, QUERIES, llm.width).to(llm.device)
    chosen = candidates(count)
    group = [Group(prompt(number), chosen) for number in range(prompts)]
    near = 1e-4 if llm.dtype == torch.float32 else 0.05
    ways = {"apart": llm._apart, llm.ranks: llm._scorers[llm.ranks]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        found: dict[str, Tensor] = {name: score(soft, group) for name, score in ways.items()}
        torch.testing.assert_close(found["apart"], found[llm.ranks], rtol=near, atol=near)
        for _ in range(repeats):
            for name, score in ways.items():
                began = clock()
                score(soft, group)
                seconds[name].append(clock() - began)
    return seconds["apart"], seconds[llm.ranks]


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="*", default=[4, 100])
    parser.add_argument("--prompts", type=int, nargs="*", default=[1, 8], help="ranked at once")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    print(f"{platform.machine()}, threads: {torch.get_num_threads()}, Python {sys.version.split()[0]}, ", end="")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, float32, {options.clock} seconds, ",
        end="",
    )
    print(f"{options.repeats} pairs\n")
    print("| LLM | way | prompts at once | candidates | one pass each (s) | ranked (s) | faster | range of ratios |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        llm = tower(kind)
        for prompts, count in product(options.prompts, options.counts):
            slow, fast = measure(llm, count, options.repeats, CLOCKS[options.clock], prompts)
            ratios = [a / b for a, b in zip(slow, fast, strict=True)]
            print(
                f"| {kind} | {llm.ranks} | {prompts} | {count} | "
                f"{statistics.median(slow):.3f} | {statistics.median(fast):.3f} | "
                f"{statistics.median(ratios):.1f}× | {min(ratios):.1f}–{max(ratios):.1f}× |",
                flush=True,
            )


if __name__ == "__main__":
    main()
