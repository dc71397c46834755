"""Training, generation and ranking against transformers on the same weights: `python benchmarks/speed.py`.

An InstructBLIP with random weights of true sizes (a Llama of SmolLM2-135M's, a BERT-base Q-Former, a small ViT) is
written as transformers writes it, and read by both.  Every pair does the same work in turn, in one process, after an
untimed round in which losses, tokens or scores are compared; *faster* is the median of the pairs' ratios.

- training: 14 rows (6 of 12 prompt tokens and 2 answer tokens, 6 of 6 and 12, 2 of 40 and 100), forward, backward,
  AdamW.  transformers is given what its users give it: one padded batch, a picture a row;
- generation: 16 prompts of 6, 12 and 40 tokens, greedy, 20 new tokens each;
- ranking: as `benchmarks/ranking.py` measures it, 4 and 100 candidates behind a prefix of 72, and 4 behind each of 8;
- our own code: the time of a step that is spent in no tower, Q-Former, head, backward pass or optimizer;
- growth: the time of a step by rows, text, queries and frames, with a straight line through the LLM's positions.

`--only` chooses parts; `--plot FILE` draws the growth.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ranking
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

import qformer
from qformer import charts
from qformer.config import TrainConfig
from qformer.nn.tokens import Tokens
from qformer.sample import Batch, Read, Row, Slot, Text
from qformer.train.optim import optimizer_for
from qformer.train.step import train_step
from qformer.vlm import VLM

QUERIES = 32
IMAGE = ranking.VOCABULARY - 1
"""The id that stands for a soft token in what transformers reads."""
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
          "image_size": 224, "patch_size": 16}  # fmt: skip
QFORMER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 384}
SHAPES = ((12, 2),) * 6 + ((6, 12),) * 6 + ((40, 100),) * 2
"""Prompt and answer tokens of the rows of a training step."""
PROMPTS = (6, 12, 40, 12) * 4
NEW_TOKENS = 20
PARTS = ("training", "cached", "two pictures", "generation", "ranking", "own", "growth")
ASKED = {"training": "2.0×", "cached": "2.2×", "two pictures": "2.1×", "generation": "1.1×", "own": "3 %"}
RANKED = {(1, 100): "12×", (1, 4): "2.5×", (8, 4): "2.5×"}
"""What is asked of so many prompts at once with so many candidates."""
GROWTH = {
    "rows": (8, 16, 32, 64), "text": (16, 64, 128, 256), "queries": (8, 32, 64, 128), "frames": (1, 2, 4, 8),
}  # fmt: skip


class Both:
    """The same model twice: ours, and that of transformers."""

    def __init__(self, folder: Path, queries: int = QUERIES):
        torch.manual_seed(0)
        text = LlamaConfig(**ranking.SMOL, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        parts = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": text}
        whole = InstructBlipConfig(**parts, num_query_tokens=queries, image_token_index=IMAGE)
        self.theirs = InstructBlipForConditionalGeneration(whole)
        torch.nn.init.normal_(self.theirs.query_tokens, std=0.02)  # zeros, as they come, would all do the same
        self.theirs.save_pretrained(folder)
        self.ours: VLM = qformer.load(folder, report=lambda line: None)
        for name, parameter in self.theirs.named_parameters():
            parameter.requires_grad_(not any(frozen in name for frozen in ("vision_model", "language_model")))
        self.accelerator = Accelerator(cpu=True)

    def optimizers(self) -> tuple[Any, Any]:
        """AdamW over each one's adapter; a rate of nothing keeps the losses of all rounds equal."""
        mine = optimizer_for(self.ours.trainable(), TrainConfig())
        for group in mine.param_groups:
            group["lr"] = 0.0
        trained = [parameter for parameter in self.theirs.parameters() if parameter.requires_grad]
        return mine, torch.optim.AdamW(trained, lr=0.0, fused=True)


def ids(count: int, seed: int) -> tuple[int, ...]:
    dice = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(10, ranking.IDS, (count,), generator=dice).tolist())


def batch(shapes: Sequence[tuple[int, int]], pictures: int, *, frames: int = 1) -> Batch:
    """Rows of prompt and answer tokens, each on a picture (or on frames of its own); the Q-Former reads the prompt."""
    reads, rows = [], list[Row]()
    for number, (prompt, answer) in enumerate(shapes):
        first = len(reads)
        own = [(number * frames + frame) % (pictures * frames) for frame in range(frames)]
        reads += [Read(picture, ids(prompt, number)) for picture in own]
        said = (Text(ids(answer, 1000 + number), trained=True),) if answer else ()
        rows.append((*(Slot(first + frame) for frame in range(frames)), Text(ids(prompt, number)), *said))
    pixels = torch.randn(pictures * frames, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return Batch(pixels, tuple(reads), tuple(rows), tuple(f"row {number}" for number in range(len(rows))))


def theirs_of(
    ours: Batch, *, left: bool = False, image: int = IMAGE, closing: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The same rows as transformers takes them: a picture a row, all padded to the longest.

    `image`: the id that stands for a soft token; `closing`: of an encoder–decoder, whose answers stand apart as labels,
    what ends a prompt.
    """
    rows = [[piece for piece in row if isinstance(piece, Text)] for row in ours.rows]
    if closing is None:
        words = [[each for piece in row for each in piece.ids] for row in rows]
        labels = [[each if piece.trained else -100 for piece in row for each in piece.ids] for row in rows]
    else:
        words = [[*(each for piece in row if not piece.trained for each in piece.ids), *closing] for row in rows]
        labels = [[each for piece in row if piece.trained for each in piece.ids] for row in rows]
    read = [list(each.instruction) for each in ours.reads]
    ones = torch.ones(len(rows), QUERIES, dtype=torch.long)  # the soft tokens stand in front, before any padding too
    given = {
        "pixel_values": ours.pixels[[each.picture for each in ours.reads]],
        "qformer_input_ids": _padded(read, 0),
        "qformer_attention_mask": _padded([[1] * len(each) for each in read], 0),
        "input_ids": torch.cat([image * ones, _padded(words, 0, left)], 1),
        "attention_mask": torch.cat([ones, _padded([[1] * len(each) for each in words], 0, left)], 1),
    }
    if any(piece.trained for row in rows for piece in row):
        answers = _padded(labels, -100)
        given["labels"] = answers if closing is not None else torch.cat([-100 * ones, answers], 1)
    return given


def _padded(rows: list[list[int]], filler: int, left: bool = False) -> Tensor:
    longest = max(map(len, rows))
    pads = [[filler] * (longest - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])


# -- pairs ------------------------------------------------------------------------------------------------------------


def in_turn(slow: Callable[[], Any], fast: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, pair by pair."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, kept in zip((slow, fast), seconds, strict=True):
            began = time.perf_counter()
            work()
            kept.append(time.perf_counter() - began)
    return seconds


def line(what: str, asked: str, seconds: tuple[list[float], list[float]]) -> str:
    """A row of the table."""
    slow, fast = seconds
    return f"| {what} | {asked} | {statistics.median(slow):.3g} | {statistics.median(fast):.3g} | {faster(*seconds)} |"


def faster(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Two cells of a row: the median of the pairs' ratios, and their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"**{statistics.median(ratios):.2f}×** | {min(ratios):.2f}–{max(ratios):.2f}×"


def training(both: Both, part: str, repeats: int) -> str:
    """A step of 14 rows: on 14 pictures, on 14 with their features at hand, on two."""
    ours = batch(SHAPES, 2 if part == "two pictures" else len(SHAPES))
    theirs = theirs_of(ours)
    mine, other = both.optimizers()
    losses: dict[str, float] = {}

    def our_step() -> None:
        report = train_step(both.ours, both.ours.objective, [ours], ours, mine, both.accelerator, None)
        losses["ours"] = report.loss

    def their_step() -> None:
        loss = both.theirs(**theirs).loss
        loss.backward()
        other.step()
        other.zero_grad(set_to_none=True)
        losses["theirs"] = loss.item()

    with features(both.ours, both.ours.encode(ours.pixels)) if part == "cached" else nullcontext():
        our_step(), their_step()
        assert math.isclose(losses["ours"], losses["theirs"], rel_tol=1e-4), losses
        seconds = in_turn(their_step, our_step, repeats)
    what = {"training": "14 pictures", "cached": "14 pictures, features at hand", "two pictures": "two pictures"}[part]
    return line(f"training step, 14 rows on {what}", ASKED[part], seconds)


@contextmanager
def features(model: VLM, kept: Tokens) -> Iterator[None]:
    """With the encoder's outputs of a batch in memory."""
    encode = model.encode
    model.encode = lambda pixels: kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.encode = encode  # type: ignore[method-assign]


def generation(both: Both, repeats: int) -> Iterator[str]:
    """16 prompts, greedy; and how long it takes to write, with the soft tokens at hand."""
    ours = batch([(prompt, 0) for prompt in PROMPTS], len(PROMPTS))
    theirs = theirs_of(ours, left=True)
    written: dict[str, Tensor] = {}

    @torch.inference_mode()
    def our_words() -> None:
        written["ours"] = both.ours.language.write(*both.ours.seen(ours), max_new_tokens=NEW_TOKENS)

    @torch.inference_mode()
    def their_words() -> None:
        decoding = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        written["theirs"] = both.theirs.generate(**theirs, **decoding)

    both.ours.eval(), both.theirs.eval()
    our_words(), their_words()
    new = written["theirs"][:, -NEW_TOKENS:]
    assert torch.equal(written["ours"], new), (written["ours"], new)
    seconds = in_turn(their_words, our_words, repeats)
    yield line("generation, 16 prompts, 20 tokens each", ASKED["generation"], seconds)
    with torch.inference_mode():
        soft, rows = both.ours.seen(ours)
        alone = []
        for _ in range(repeats):
            began = time.perf_counter()
            both.ours.language.write(soft, rows, max_new_tokens=NEW_TOKENS)
            alone.append(time.perf_counter() - began)
    yield f"| of ours, writing with the soft tokens at hand | – | – | {statistics.median(alone):.3g} | – | – |"


def ranked(repeats: int) -> Iterator[str]:
    """The decoder-only rows of `benchmarks/ranking.py`."""
    llm = ranking.tower("decoder-only")
    for (prompts, count), asked in RANKED.items():
        seconds = ranking.measure(llm, count, repeats, time.perf_counter, prompts)
        yield line(f"{ranked_what(prompts, count)}, against a pass each", asked, seconds)


def ranked_what(prompts: int, count: int) -> str:
    """A row's name."""
    return f"ranking {count} candidates" + (f" behind each of {prompts} prompts" if prompts > 1 else "")


# -- our own code -----------------------------------------------------------------------------------------------------


def own(both: Both, repeats: int) -> str:
    """The share of a step that is spent outside towers, Q-Former, head, backward pass and optimizer."""
    ours = batch(SHAPES, len(SHAPES))
    mine, _ = both.optimizers()
    inside, depth = 0.0, 0

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            nonlocal inside, depth
            depth += 1
            began = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                depth -= 1
                if not depth:
                    inside += time.perf_counter() - began

        return timed

    model = both.ours
    llm: Any = model.language.model
    places = [
        (model.vision, "forward"), (model.connector, "forward"), (llm.model, "forward"), (llm.lm_head, "forward"),
        (torch.Tensor, "backward"), (torch.nn.utils, "clip_grad_norm_"), (mine, "step"), (torch, "logsumexp"),
        (torch.nn.functional, "linear"), (torch.nn.functional, "cross_entropy"),
    ]  # fmt: skip
    before = [(place, name, getattr(place, name), name in vars(place)) for place, name in places]
    shares = []
    try:
        for place, name, work, _ in before:
            setattr(place, name, counted(work))
        for number in range(repeats + 1):
            inside, began = 0.0, time.perf_counter()
            train_step(model, model.objective, [ours], ours, mine, both.accelerator, None)
            if number:  # the first is a warm-up
                shares.append(1 - inside / (time.perf_counter() - began))
    finally:
        for place, name, work, there in before:
            setattr(place, name, work) if there else delattr(place, name)
    low, high = min(shares), max(shares)
    return (
        f"| our own code, share of a step | {ASKED['own']} | – | – | **{statistics.median(shares):.1%}** | "
        f"{low:.1%}–{high:.1%} |"
    )


# -- growth -----------------------------------------------------------------------------------------------------------


def growth(folder: Path, repeats: int, plot: Path | None, most: int) -> Iterator[str]:
    """Seconds of a step by one size at a time, the exponent, and how far from a straight line through the positions."""
    yield "| what grows | sizes | seconds | exponent | positions of the LLM | largest distance from the line |"
    yield "|---|---|---|---|---|---|"
    curves = {}
    for name, given in GROWTH.items():
        sizes = [size for size in given if size <= most * given[0]]
        seconds, positions = [], []
        for size in sizes:
            queries = size if name == "queries" else QUERIES
            both = Both(folder / f"{name}-{size}", queries) if name == "queries" else Both(folder / "growth")
            shapes = [(8, size - 8 if name == "text" else 8)] * (size if name == "rows" else 8)
            ours = batch(shapes, len(shapes), frames=size if name == "frames" else 1)
            seconds.append(step_time(both, ours, repeats))
            positions.append(sum(queries * _slots(row) + _words(row) for row in ours.rows))
        curves[name] = (sizes, seconds)
        slope, _ = fit([math.log(size) for size in sizes], [math.log(second) for second in seconds])
        steepness, start = fit(list(map(float, positions)), seconds)
        away = max(abs(start + steepness * p - s) / s for p, s in zip(positions, seconds, strict=True))
        yield (
            f"| {name} | {', '.join(map(str, sizes))} | {', '.join(f'{each:.2f}' for each in seconds)} | {slope:.2f} | "
            f"{', '.join(map(str, positions))} | {away:.0%} |"
        )
    if plot:
        draw(curves, plot)


def _slots(row: Row) -> int:
    return sum(isinstance(piece, Slot) for piece in row)


def _words(row: Row) -> int:
    return sum(len(piece.ids) for piece in row if isinstance(piece, Text))


def step_time(both: Both, ours: Batch, repeats: int) -> float:
    """Median seconds of a training step, after an untimed one."""
    mine, _ = both.optimizers()
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        train_step(both.ours, both.ours.objective, [ours], ours, mine, both.accelerator, None)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and start of the straight line of least squares."""
    line = statistics.linear_regression(xs, ys)
    return line.slope, line.intercept


STYLE = (
    "text{font:11px sans-serif;fill:#555} .grid{stroke:#ddd} polyline{fill:none;stroke:#26c;stroke-width:2} "
    ".title{font-size:13px;fill:#222}"
)


def draw(curves: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """A panel a size, from nothing up, two beside each other, as one SVG."""
    width, height, panels = charts.WIDTH, charts.HEIGHT + 20, []
    for place, (name, (sizes, seconds)) in enumerate(curves.items()):
        x, y = place % 2 * width, place // 2 * height
        line = charts.line_chart(name, [("line", list(zip(sizes, seconds, strict=True)))]).removeprefix("<svg ")
        panels.append(f'<text class="title" x="{x + charts.LEFT}" y="{y + 14}">seconds a step by {name}</text>')
        panels.append(f'<svg x="{x}" y="{y + 20}" width="{width}" height="{charts.HEIGHT}" {line}')
    size = f'width="{width * min(2, len(curves))}" height="{height * -(-len(curves) // 2)}"'
    page = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(panels)}</svg>'
    file.write_text(page + "\n", encoding="utf-8")


def machine(repeats: int) -> str:
    """What was measured with."""
    return (
        f"{platform.machine()}, threads: {torch.get_num_threads()}, Python {sys.version.split()[0]}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, float32, {repeats} pairs\n"
    )


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--plot", type=Path, help="where the picture of the growth goes")
    parser.add_argument("--most", type=int, default=64, help="the greatest size, in multiples of the least")
    options = parser.parse_args()
    print(machine(options.repeats))
    with tempfile.TemporaryDirectory() as folder:
        for rows in tables(Path(folder), options):
            print(rows, flush=True)


def tables(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Their lines, one by one."""
    yield "| work | asked | transformers (s) | qformer (s) | faster | range |"
    yield "|---|---|---|---|---|---|"
    if set(options.only) - {"ranking", "growth"}:
        both = Both(folder / "model")
        for part in ("training", "cached", "two pictures"):
            if part in options.only:
                yield training(both, part, options.repeats)
        if "own" in options.only:
            yield own(both, options.repeats)
        if "generation" in options.only:
            yield from generation(both, options.repeats)
        del both
    if "ranking" in options.only:
        yield from ranked(options.repeats)
    if "growth" in options.only:
        yield ""
        yield from growth(folder, options.repeats, options.plot, options.most)


if __name__ == "__main__":
    main()
