"""Where the time of a training step goes: `python benchmarks/spans.py [--plot docs/step.svg]`.

The step is that of `benchmarks/speed.py`, 14 rows on 14 pictures.  The clock is read where the parts begin and end: the
image encoder, the connector (the norm behind the encoder, the Q-Former and the projection), the LLM's blocks, its
output layer with the loss; backwards where a gradient arrives at what the output layer read and at the soft tokens; and
around AdamW.  On a CPU, where an operation ends before the next one begins, that is all there is to it.  Prints a table
of medians, and draws it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import speed
import torch
from torch import Tensor

from qformer.train.step import train_step

PARTS = (
    "image encoder", "Q-Former", "LLM", "output layer and loss", "backward: output layer", "backward: LLM",
    "backward: Q-Former", "AdamW", "all else",
)  # fmt: skip
REST = PARTS[-1]
WIDTH, LINE, LEFT, RIGHT = 640, 24, 160, 110
STYLE = "text{font:12px sans-serif;fill:#222} .forward{fill:#26c} .backward{fill:#c62} .other{fill:#999}"


class Stopwatch:
    """Seconds by part: each mark gives the time since the one before to the part that it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def ends(self, part: str) -> None:
        """What ran until now was this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


@contextmanager
def marked(both: speed.Both, optimizer: torch.optim.Optimizer, watch: Stopwatch) -> Iterator[None]:
    """Every step within is told to the stopwatch, part by part."""
    model, llm = both.ours, both.ours.language.model
    backward: Any = Tensor.backward

    def around(part: str, arrived: str | None) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: Any) -> None:
            watch.ends(REST)

        def after(_module: Any, _given: Any, made: Any) -> None:
            watch.ends(part)
            states = getattr(made, "last_hidden_state", made)
            if arrived and states.requires_grad:
                states.register_hook(lambda _: watch.ends(arrived))

        return before, after

    def back(loss: Tensor, *given: Any, **named: Any) -> None:
        watch.ends("output layer and loss")
        backward(loss, *given, **named)
        watch.ends("backward: Q-Former")

    with ExitStack() as held:
        for module, part, arrived in (
            (model.vision, "image encoder", None),
            (model.connector, "Q-Former", "backward: LLM"),
            (llm.model, "LLM", "backward: output layer"),
        ):
            before, after = around(part, arrived)
            held.callback(module.register_forward_pre_hook(before).remove)
            held.callback(module.register_forward_hook(after).remove)
        held.enter_context(patch.object(Tensor, "backward", back))
        held.callback(optimizer.register_step_pre_hook(lambda *_: watch.ends(REST)).remove)
        held.callback(optimizer.register_step_post_hook(lambda *_: watch.ends("AdamW")).remove)
        yield


def measured(both: speed.Both, repeats: int) -> dict[str, float]:
    """Median seconds of each part, after an untimed step."""
    given = speed.batch(speed.SHAPES, len(speed.SHAPES))
    mine, _ = both.optimizers()
    steps: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        watch = Stopwatch()
        with marked(both, mine, watch):
            train_step(both.ours, both.ours.objective, [given], given, mine, both.accelerator, None)
        watch.ends(REST)
        steps.append(watch.seconds)
    return {part: statistics.median(step[part] for step in steps[1:]) for part in PARTS}


def draw(seconds: dict[str, float], file: Path) -> None:
    """A bar a part, from the first to the last of a step."""
    whole, longest = sum(seconds.values()), max(seconds.values())
    lines = []
    for place, (part, taken) in enumerate(seconds.items()):
        top, long = LINE * place, (WIDTH - LEFT - RIGHT) * taken / longest
        kind = "backward" if part.startswith("backward") else "other" if part in ("AdamW", REST) else "forward"
        lines.append(f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(part)}</text>')
        lines.append(f'<rect class="{kind}" x="{LEFT}" y="{top + 4}" width="{long:.1f}" height="{LINE - 8}"/>')
        lines.append(f'<text x="{LEFT + long + 6:.1f}" y="{top + 16}">{taken:.2f} s, {taken / whole:.0%}</text>')
    size = f'width="{WIDTH}" height="{LINE * len(seconds)}" viewBox="0 0 {WIDTH} {LINE * len(seconds)}"'
    page = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(lines)}</svg>'
    file.write_text(page + "\n", encoding="utf-8")


def main() -> None:
    """Print the table in Markdown, and draw it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measured(speed.Both(Path(folder)), options.repeats)
    print(speed.machine(options.repeats).replace("pairs", "steps"))
    print("| part | seconds | share |")
    print("|---|---:|---:|")
    for part, taken in seconds.items():
        print(f"| {part} | {taken:.2f} | {taken / sum(seconds.values()):.1%} |")
    if options.plot:
        draw(seconds, options.plot)


if __name__ == "__main__":
    main()
