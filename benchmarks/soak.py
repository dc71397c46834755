"""Whether a long run holds on to anything: `make soak`, or `python -m benchmarks.soak [--minutes 30]`.

A small run trains with data workers, checkpoints and validations, and is looked at from outside every few seconds: the
memory of all its processes (shared pages once), and their open files.  Behind a fifth of the time, in which libraries
fill their caches, memory may grow by 2 % and the number of open files not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.drill import World, progress

GROWTH = 0.02
WARM = 0.2
"""Share of the time after which memory has to be flat."""
EVERY = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings of the run")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = Path(tempfile.mkdtemp(prefix="qformer-soak-"))
    world = World(folder, 0, options.set)
    run, command = world.run(
        "soak", "train.steps=100000000", "train.checkpoint_every=50", "train.log_every=10", "train.monitor_every=20",
        f"data.workers={options.workers}", "validation.every=500",
        f"validation.tasks=[{folder / 'data' / 'colours.yaml'}]",
    )  # fmt: skip
    child = world.start(command)
    seen: list[tuple[float, int, int, int]] = []
    began = time.monotonic()
    try:
        while (passed := time.monotonic() - began) < 60 * options.minutes:
            assert child.alive(), child.said()[-2000:]
            if progress(run):
                memory, files = measured(child.pid)
                seen.append((passed, memory, files, progress(run)))
            time.sleep(min(EVERY, 60 * options.minutes / 40))
    finally:
        if child.alive():
            child.kill()
    flat = [each for each in seen if each[0] > WARM * 60 * options.minutes]
    part = max(1, len(flat) // 5)
    first, last = (statistics.median(each[1] for each in some) for some in (flat[:part], flat[-part:]))
    opened = [(min, max)[side](each[2] for each in some) for side, some in ((1, flat[:part]), (0, flat[-part:]))]
    growth = last / first - 1
    print(
        f"soak: {options.minutes:g} minutes, {seen[-1][3]:,} steps; memory of all processes {first / 1e6:.0f} MB after "
        f"{100 * WARM:.0f} % of the time and {last / 1e6:.0f} MB at the end ({100 * growth:+.2f} %); open files "
        f"{opened[0]} and {opened[1]}."
    )
    shutil.rmtree(folder)
    if growth > GROWTH or opened[1] > opened[0]:
        sys.exit(f"soak: memory may grow by {100 * GROWTH:.0f} %, and the number of open files not at all.")


def measured(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it, each shared page once, and the files that they have open."""
    memory = files = 0
    waiting = [pid]
    while waiting:
        here = Path(f"/proc/{waiting.pop()}")
        try:
            rolled = (here / "smaps_rollup").read_text()
            memory += 1024 * int(next(line.split()[1] for line in rolled.splitlines() if line.startswith("Pss:")))
            files += len(list((here / "fd").iterdir()))
            for thread in (here / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except OSError:  # it has ended meanwhile
            continue
    return memory, files


if __name__ == "__main__":
    main()
