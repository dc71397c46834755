"""A tuned Q-Former carried over to a second LLM, over several seeds: `python benchmarks/plug.py [--seeds 3]`.

For each seed: the demo as it is; its adapter in front of the other LLM, with a twentieth of the demo's steps for the
projection alone and a fifth for all, a quarter together; a fresh adapter with as many steps; and a fresh adapter with
all the demo's steps.  What counts is the gain over the most frequent answer: carried over, the adapter is to have 90 %
of the fresh one's in a quarter of its steps.  What is done is not done again, and a run that was interrupted goes on.
Ends with two tables in Markdown, also in `table.md`: scores, as means over seeds with the least and the greatest, and
the shares of the gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from qformer import run as pipeline
from qformer.comparison import PLUG_FILE, ROWS
from qformer.demo.run import demo, demo_settings
from qformer.stages import Stages, carry

TASKS = ("gqa", "vsr", "iconqa", "nocaps")
SHARES = ("gqa", "vsr", "iconqa")
"""Tasks whose scores are shares of one, so that their gains add up."""
COLUMNS = {**ROWS, "frequent": "most frequent answer", "whole": "fresh adapter, all steps"}
SHOWN = ("frequent", "before", "warmup", "tuned", "fresh", "whole", "source")
WANTED = 0.9
UNSHUFFLED = "evaluate.shuffled=false"
"""Shuffled pictures tell nothing of what is carried over, and cost as much as the scores."""

Scores = dict[str, dict[str, float]]
"""By column and task."""


def measure(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Scores]:
    """The scores of one seed, by start of the projection; made unless they are there."""
    source, whole = folder / f"source-{seed}", folder / f"whole-{seed}"
    ending = ".partial.json" if options.limit else ".json"
    if not all((source / "eval" / f"{task}{ending}").exists() for task in TASKS):
        demo(source, seed=seed, steps=options.steps, limit=options.limit, overrides=(UNSHUFFLED,))
    if not all((whole / "eval" / f"{task}{ending}").exists() for task in TASKS):
        changes = (
            f"language.name={options.language}",
            f"data.root={source / 'data'}",
            f"name=whole-{seed}",
            UNSHUFFLED,
        )
        pipeline.fit(demo_settings(whole, seed, options.steps, options.limit, changes))
    found = {}
    for start in options.starts:
        place = folder / f"{start}-{seed}"
        stages = Stages(start, options.warmup_steps, options.warmup_rate, options.tuning_steps, options.rate)
        carry(source, options.language, stages, output=place, limit=options.limit, overrides=(UNSHUFFLED,))
        rows = json.loads((place / PLUG_FILE).read_text(encoding="utf-8"))["rows"]
        scores: Scores = {name: {task: row["scores"][task]["score"] for task in TASKS} for name, row in rows.items()}
        scores["whole"], scores["frequent"] = {}, {}
        for task in TASKS:
            result: dict[str, Any] = json.loads((whole / "eval" / f"{task}{ending}").read_text(encoding="utf-8"))
            scores["whole"][task] = result["score"]
            scores["frequent"][task] = result["most_frequent"]["score"]
        found[start] = scores
    return found


def share(scores: Scores, column: str, tasks: tuple[str, ...]) -> float:
    """Of the gain over the most frequent answer that the fresh adapter has with all its steps."""
    gains = {name: sum(scores[name][task] - scores["frequent"][task] for task in tasks) for name in (column, "whole")}
    return gains[column] / gains["whole"] if gains["whole"] > 0 else float("nan")


def spread(values: list[float]) -> str:
    """Mean, least and greatest, in hundredths (CIDEr is printed so too)."""
    mean, low, high = (100 * each for each in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def tables(start: str, seeds: list[Scores]) -> str:
    """Both tables of one start, in Markdown."""
    lines = [f"Projection {start}.", "", "| | " + " | ".join(TASKS) + " |", "|---|" + "---:|" * len(TASKS)]
    for name in SHOWN:
        cells = [spread([scores[name][task] for scores in seeds]) for task in TASKS]
        lines.append(f"| {COLUMNS[name]} | " + " | ".join(cells) + " |")
    heads = [*SHARES, "together"]
    lines += [
        "",
        "| share of the fresh adapter's gain, % | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name in ("before", "warmup", "tuned", "fresh"):
        chosen = [*((task,) for task in SHARES), SHARES]
        cells = [spread([share(scores, name, tasks) for scores in seeds]) for tasks in chosen]
        lines.append(f"| {COLUMNS[name]} | " + " | ".join(cells) + " |")
    reached = [share(scores, "tuned", SHARES) for scores in seeds]
    verdict = "reached" if statistics.mean(reached) >= WANTED else "not reached"
    lines += ["", f"{WANTED:.0%} of the gain in a quarter of the steps: {verdict} ({spread(reached)} %)."]
    return "\n".join(lines)


def main() -> None:
    """All seeds, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/plug"))
    parser.add_argument("--language", default="demo:other")
    parser.add_argument("--starts", nargs="+", choices=("mapped", "random"), default=["mapped", "random"])
    parser.add_argument("--steps", type=int, help="of the demo and the fresh adapter, instead of the demo's own number")
    parser.add_argument("--warmup-steps", type=int)
    parser.add_argument("--warmup-rate", type=float)
    parser.add_argument("--tuning-steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    found: dict[str, list[Scores]] = {start: [] for start in options.starts}
    for seed in range(options.seeds):
        began = time.perf_counter()
        for start, scores in measure(options.output, seed, options).items():
            found[start].append(scores)
            done = share(scores, "tuned", SHARES)
            seconds = time.perf_counter() - began
            print(f"seed {seed}, {start}: {done:.1%} of the gain ({seconds:.0f} s)", flush=True)
        page = "\n\n".join(tables(start, seeds) for start, seeds in found.items())
        (options.output / "table.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
