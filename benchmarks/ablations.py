"""The demo with one switch turned, over several seeds: `python benchmarks/ablations.py [--full] [--seeds 3]`.

Variants: the demo as it is; a Q-Former that reads no instruction; a mixture that draws every set alike instead of by
the square roots of their sizes, as `configs/no_balancing.yaml` does; records grouped by picture, up to four together
(`data.per_picture`); with `--full`, on all thirteen held-in sets, also inputs and outputs without templates
(InstructBLIP, table 2 and section 3.3).  A run that is done is not made again, and one that was interrupted goes on, so
the command can be stopped and started at will.  It ends with a table in Markdown: the mean over seeds, the spread of
the seeds, and the difference from the whole with a 95 % interval of the paired differences (Student's t over seeds).

`--only "grouped by picture"` makes that variant, and what it is compared with, alone; it may be given several times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from qformer import cards, config
from qformer.demo.run import demo, demo_settings
from qformer.evaluate.run import file_name

VARIANTS = {
    "as it is": (),
    "no instruction in the Q-Former": ("qformer.instruction=false",),
    "no balancing": ("data.sampling=uniform",),
    "grouped by picture": ("data.per_picture=4",),
    "no templates": ("data.variant=plain",),
}
UNSHUFFLED = "evaluate.shuffled=false"
"""Shuffled pictures tell nothing of the difference, and cost as much as the scores."""
STEPS = {False: 960, True: 900}
"""Of a run, of the demo and of the full one: within 8 and 12 minutes on two cores."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a 95 % interval, by number of seeds."""


def run(folder: Path, seed: int, overrides: tuple[str, ...], options: argparse.Namespace) -> dict[str, float]:
    """Scores of one demo by task, in per cent but for CIDEr; made unless they are there."""
    name, overrides = "demo_full" if options.full else "demo", (*overrides, UNSHUFFLED, *options.set)
    settings = demo_settings(folder, seed, options.steps, options.limit, overrides, name=name)
    here = (f"output={folder}", f"data.root={folder / 'data'}")
    if (saved := folder / "config.yaml").exists() and config.load(str(saved), here) != settings:
        raise SystemExit(f"{folder}: made with other settings; give those of its config.yaml, or another --output.")
    places, tasks = folder / "eval", settings.evaluate.tasks
    files = {c: places / f"{file_name(c, partial=bool(options.limit))}.json" for c in cards.load_all(tasks, "eval")}
    if not all(file.exists() for file in files.values()):
        demo(folder, full=options.full, seed=seed, steps=options.steps, limit=options.limit, overrides=overrides)
    found = {task: json.loads(file.read_text(encoding="utf-8")) for task, file in files.items()}
    return {task: each["score"] * (1 if each["metric"] == "cider" else 100) for task, each in found.items()}


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    if len(values) not in T_95:
        return f"{statistics.mean(values):+.2f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {half:.2f}"


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a variant, a column a task."""
    whole = scores["as it is"]
    tasks = list(whole[0])
    lines = ["| | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for name, runs in scores.items():
        cells = []
        for task in tasks:
            values = [each[task] for each in runs]
            cell = f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            if name != "as it is":
                cell += f"; {interval([a[task] - b[task] for a, b in zip(runs, whole, strict=True)])}"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """All variants over all seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the demo on all thirteen held-in sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[*VARIANTS][1:], help="this variant beside the whole")
    parser.add_argument("--output", type=Path, help="runs/ablations, or runs/ablations_full")
    parser.add_argument("--steps", type=int, help="of a run (960, with --full 900)")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    options = parser.parse_args()
    if "no templates" in (options.only or ()) and not options.full:
        parser.error("'no templates' is a variant of the demo on all thirteen sets; add --full")
    options.output = options.output or Path("runs", "ablations_full" if options.full else "ablations")
    options.steps = options.steps or STEPS[options.full]
    scores: dict[str, list[dict[str, float]]] = {}
    for name, overrides in VARIANTS.items():
        if name == "no templates" and not options.full:
            continue
        if options.only and name not in ("as it is", *options.only):
            continue
        scores[name] = []
        for seed in range(options.seeds):
            began = time.perf_counter()
            folder = options.output / f"{name.replace(' ', '_')}-{seed}"
            scores[name].append(run(folder, seed, overrides, options))
            print(f"{name}, seed {seed}: {scores[name][-1]} ({time.perf_counter() - began:.0f} s)", flush=True)
    page = table(scores)
    chosen = "_".join(["table", *(name.replace(" ", "_") for name in options.only or ())])
    (options.output / f"{chosen}.md").write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
