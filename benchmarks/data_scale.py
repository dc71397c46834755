"""What large data sets cost: `python benchmarks/data_scale.py`.

Writes files of the real shape into a temporary folder (some 5 GB), then measures in processes of their own:

- `qformer data index` on VQA questions and annotations with ten answers each, and on a list of captions: wall time of
  the whole command, and the most memory it ever held;
- the start of training on the captions: from the start of the process to the first step's batches out of the data
  workers, and each worker's own memory after many steps, beside that of the same workers over a thousand captions;
- draws of the mixture at any k.

Prints a Markdown table; medians over the repeats, the load of the machine beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = [
    "red", "green", "blue", "white", "black", "kite", "dog", "cat", "man", "woman",
    "child", "table", "street", "window", "left", "right", "standing", "sitting", "holding", "two",
    "three", "large", "small", "wooden", "metal", "umbrella", "surfboard", "train", "bus", "beach",
    "field", "kitchen", "looking", "at", "the", "of", "in", "on", "with",
]  # fmt: skip
CARDS = {
    "vqa": (
        "reader: vqa, files: {questions: vqa/questions.json, annotations: vqa/annotations.json, images: pictures}, "
        "options: {image: '%012d.jpg'}, template: vqa"
    ),
    "captions": "reader: caption_list, files: {captions: captions.json, images: pictures}, template: caption",
    "few": "reader: caption_list, files: {captions: few.json, images: pictures}, template: caption",
}
PICTURES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--captions", type=int, default=14_000_000)
    parser.add_argument("--records", type=int, default=25_000_000, help="of the thirteen sets that draws are made from")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="of 128 samples, before memory is read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the files go (a temporary folder)")
    parser.add_argument("--start", nargs=2, metavar=("CARD", "BEGAN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(Path(options.folder), *options.start, options.workers, options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for line in measure(Path(folder), options):
            print(line, flush=True)


def measure(root: Path, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table."""
    write_files(root, options.questions, options.captions)
    yield machine()
    yield ""
    yield "| what | asked | measured |"
    yield "|---|---|---|"
    for name, count, asked in (
        ("vqa", options.questions, "60 s, 1.5 GB"),
        ("captions", options.captions, "–"),
    ):
        size = sum(file.stat().st_size for file in sources(root, name))
        runs = [index(root, name) for _ in range(options.repeats)]
        kept = sum(file.stat().st_size for file in (root / ".qformer-index").glob("*.arrow"))
        what = "questions with ten answers each" if name == "vqa" else "captions"
        yield (
            f"| `qformer data index`: {count:,} {what}, {size / 1e9:.2f} GB of JSON | {asked} | "
            f"{spread([each.seconds for each in runs])} s, of the processor {spread([each.busy for each in runs])} s; "
            f"peak {max(each.peak for each in runs) / 1e9:.2f} GB; index {kept / 1e9:.2f} GB |"
        )
        if name == "vqa":
            shutil.rmtree(root / ".qformer-index")
    index(root, "few")
    starts = [started(root, "captions", options) for _ in range(options.repeats)]
    few = started(root, "few", options)
    yield (
        f"| training over {options.captions:,} indexed captions: process start to the first step's batches, "
        f"{options.workers} workers | 10 s | {spread([each['first'] for each in starts])} s, of the processor "
        f"{spread([each['busy'] for each in starts])} s before workers start |"
    )
    yield (
        f"| of that, finding the records | – | {spread([each['opened'] for each in starts])} s, and "
        f"{few['opened']:.2f} s with {few['records']:,} captions |"
    )
    yield (
        f"| own memory (USS) of a worker after {options.steps} steps, the largest | 200 MB | "
        f"{max(each['own'] for each in starts) / 1e6:.0f} MB, and {few['own'] / 1e6:.0f} MB with "
        f"{few['records']:,} captions |"
    )
    yield (
        f"| of that, written pages; the rest are clean pages of the index that no other process has touched | – | "
        f"{max(each['written'] for each in starts) / 1e6:.0f} MB, and {few['written'] / 1e6:.0f} MB |"
    )
    micros, most, held = draws(options.records)
    yield (
        f"| a draw at any k over {options.records:,} records of 13 sets | 1 ms, 1 MB | {micros:.0f} µs, the slowest of "
        f"10,000 {most:.0f} µs; {held / 1e6:.3f} MB |"
    )


# -- files ------------------------------------------------------------------------------------------------------------


def write_files(root: Path, questions: int, captions: int) -> None:
    from PIL import Image

    dice = random.Random(0)
    for name, section in CARDS.items():
        (root / f"{name}.yaml").write_text(f"name: {name}\nversion: 1\ntrain: {{{section}}}\n")
    write_vqa(root / "vqa", questions, dice)
    write_captions(root / "captions.json", captions, dice)
    write_captions(root / "few.json", min(captions, 1000), dice)
    for number in range(PICTURES):
        file = root / "pictures" / picture(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number % 256, number // 4, 90)).save(file)


def picture(number: int) -> str:
    number %= PICTURES
    return f"{number // 100:05d}/{number:09d}.jpg"


def write_vqa(folder: Path, count: int, dice: random.Random) -> None:
    """The two files of VQAv2: question_id is the picture's number and the question's place in its last three digits."""
    folder.mkdir()
    head = '{"info": {"year": 2017}, "license": {"name": "none"}, "data_type": "mscoco", "data_subtype": "train2014", '
    with (folder / "questions.json").open("w") as asked, (folder / "annotations.json").open("w") as said:
        asked.write(head + '"task_type": "Open-Ended", "questions": [')
        said.write(head + '"annotations": [')
        for number in range(count):
            comma, image = ", " if number else "", number // 4 + 1
            name = image * 1000 + number % 4
            words = dice.choices(WORDS, k=16)
            question = f"What is the {' '.join(words[:4])} {words[4]}?"
            asked.write(f'{comma}{{"image_id": {image}, "question": "{question}", "question_id": {name}}}')
            answers = ", ".join(
                f'{{"answer": "{word}", "answer_confidence": "{"yes" if place % 3 else "maybe"}", '
                f'"answer_id": {place + 1}}}'
                for place, word in enumerate(words[5:15])
            )
            said.write(
                f'{comma}{{"question_type": "what is the", "multiple_choice_answer": "{words[5]}", '
                f'"answers": [{answers}], "image_id": {image}, "answer_type": "other", "question_id": {name}}}'
            )
        asked.write("]}")
        said.write("]}")


def write_captions(file: Path, count: int, dice: random.Random) -> None:
    with file.open("w") as out:
        out.write("[")
        for number in range(count):
            caption = " ".join(dice.choices(WORDS, k=9))
            out.write(f'{", " if number else ""}{{"image": "{picture(number)}", "caption": "a {caption} {number}"}}')
        out.write("]")


def sources(root: Path, name: str) -> list[Path]:
    return list((root / "vqa").iterdir()) if name == "vqa" else [root / f"{name}.json"]


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one command: seconds by the clock and of the processor, and the most bytes it held."""

    seconds: float
    busy: float
    peak: int


def index(root: Path, name: str) -> Cost:
    """What the command costs where nothing was indexed before.

    Linux counts the memory that this process holds when it forks into the command's peak, so nothing heavy is imported
    here.
    """
    for older in (root / ".qformer-index").glob(f"*-{'questions' if name == 'vqa' else name}-*"):
        older.unlink()
    command = [sys.executable, "-m", "qformer", "data", "index", "--data", root, "--tasks", root / f"{name}.yaml"]
    began = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{name}: the command failed")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(time.perf_counter() - began, used.ru_utime + used.ru_stime, peak)


def started(root: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `start` finds in a process of its own."""
    command = [
        sys.executable, __file__, "--folder", root, "--workers", options.workers, "--steps", options.steps,
        "--start", name, time.time(),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout)


def start(root: Path, name: str, began: str, workers: int, steps: int) -> dict[str, Any]:
    """Training's own way from a config to batches, without a model: seconds, and the workers' memory at the end."""
    import psutil
    import torch
    from torch.utils.data import DataLoader

    from qformer import cards, config
    from qformer.assemble import Assembler
    from qformer.data.batch import StepMaker, mixture_of, open_sources
    from qformer.data.index import Index
    from qformer.images import ImageTransform
    from qformer.render import joiner_of

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    card = str(root / f"{name}.yaml")
    settings = config.load("demo", [f"data.root={root}", f"data.tasks={{{card}: 1.0}}"])
    opening = time.perf_counter()
    sources = open_sources(cards.load_all([card], "train"), root, index=Index(root))
    opened = time.perf_counter() - opening
    mixture = mixture_of(sources, settings.data, {}, settings.seed)
    transform = ImageTransform(settings.vision.train_transform, 64, (0.5,) * 3, (0.5,) * 3, "bilinear")
    assembler = Assembler(joiner_of(settings), transform, settings.data.max_pixels, root=root)
    maker = StepMaker(mixture, sources, assembler, batch_size=128, steps=steps, soft_tokens=32)
    torch.set_num_threads(1)
    busy = time.process_time()
    batches = iter(DataLoader(maker, batch_size=None, sampler=range(steps), num_workers=workers))
    first = 0.0
    for data in batches:
        if not data.batches:
            raise SystemExit(str(data.error))
        first = first or time.time() - float(began)
        if data.step == steps - workers - 1:  # while all of them still live
            break
    own, written = [], []
    for worker in batches._workers:  # type: ignore[attr-defined]
        process = psutil.Process(worker.pid)
        own.append(process.memory_full_info().uss)
        written.append(sum(each.private_dirty for each in process.memory_maps()))
    return {
        "first": first,
        "busy": busy,
        "opened": opened,
        "records": len(sources[name].records),
        "own": max(own),
        "written": max(written),
    }


def draws(records: int) -> tuple[float, float, int]:
    """Median and greatest microseconds of a draw at random k, and the bytes that mixture and draws ever took."""
    from qformer import cards
    from qformer.data.mixture import Mixture

    shares = [567, 13873, 110, 444, 9, 17, 802, 444, 9, 17, 57, 23, 77]
    sizes = {f"set{place}": max(1, records * share // sum(shares)) for place, share in enumerate(shares)}
    dice = random.Random(0)
    numbers = [dice.randrange(10 ** dice.randrange(1, 13)) for _ in range(10_000)]
    tracemalloc.start()
    mixture = Mixture(cards.probabilities(sizes, {}), sizes, seed=0)
    for number in numbers[:1000]:
        mixture.draw(number)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = []
    for number in numbers:
        began = time.process_time()  # of the processor, which others may be given in the middle of a draw
        mixture.draw(number)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds) * 1e6, max(seconds) * 1e6, held


# -- words ------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """The median, and least and greatest where there are several."""
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}–{max(values):.1f})"


def machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pyarrow", "orjson", "torch"))
    load = f"load {os.getloadavg()[0]:.1f} before the first measurement" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; {load}."


if __name__ == "__main__":
    main()
