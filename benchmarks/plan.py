"""How near `qformer plan` comes to what a run takes here: `python benchmarks/plan.py`.

Three sizes of towers with random weights, records of mixed length and drawn pictures.  Each is planned in one process
and trained in another, through the same settings: `qformer.train` for some steps, whose time is the median and whose
memory is the most that the process held, less what one holds that has only imported the same libraries.  Prints a
Markdown table with the errors of the plan in per cent; `--clock cpu` counts seconds of the processor, which a machine
that does other work leaves alone (OMP_NUM_THREADS=1 beside it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
T5 = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = ((12, 2), (12, 2), (12, 2), (6, 12), (6, 12), (6, 12), (40, 100))
"""Words of prompts and answers, in equal parts: of fourteen rows six, six and two."""


@dataclass(frozen=True)
class Size:
    """Towers and settings of one run."""

    what: str
    language: dict[str, Any]
    vision: str
    qformer: dict[str, Any] = field(default_factory=dict)
    batch: int = 14
    room: int | None = None


SIZES = {
    "small": Size(
        "Llama of 8 × 256, ViT-tiny, Q-Former of 6 × 384",
        {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4,
         "vocab_size": 8000},
        "vit_tiny_patch16_224",
        {"hidden": 384, "layers": 6, "heads": 6},
        batch=28,
    ),
    "middle": Size(
        "T5 of (8 + 8) × 512, ViT-small, Q-Former of 6 × 512, two micro-batches",
        {**T5, "d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 8, "num_heads": 6, "vocab_size": 32128},
        "vit_small_patch16_224",
        {"hidden": 512, "layers": 6, "heads": 8},
        room=800,
    ),
    "large": Size(
        "SmolLM2-135M, ViT-small, Q-Former of BERT-base",
        {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152},
        "vit_small_patch16_224",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=8, help="of each run; the first two are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="plans and runs in turn; medians are told")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "CONFIG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](options.child[1], options.clock)))
        return
    print(machine())
    print()
    print("| size | | planned | measured | error |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            for line in measure(SIZES[name], Path(folder) / name, options):
                print(line, flush=True)


def measure(size: Size, folder: Path, options: argparse.Namespace) -> list[str]:
    """The lines of one size."""
    child("write", folder / "config.json", options, json.dumps([size.__dict__, options.steps]))
    planned, taken = [], []
    for number in range(options.repeats):
        planned.append(child("plan", folder / "config.json", options))
        taken.append(child("train", folder / "config.json", options, str(folder / f"run{number}")))
    empty = child("empty", folder / "config.json", options)["peak"]
    seconds = [statistics.median(each["seconds"] for each in both) for both in (planned, taken)]
    memory = [planned[0]["bytes"], statistics.median(each["peak"] for each in taken) - empty]
    spread = [min(each["seconds"] for each in taken), max(each["seconds"] for each in taken)]
    return [
        f"| {size.what}, {size.batch} rows | a step | {seconds[0]:.3g} s | {seconds[1]:.3g} s "
        f"({spread[0]:.3g} to {spread[1]:.3g}) | {seconds[0] / seconds[1] - 1:+.0%} |",
        f"| | memory | {memory[0] / 1e9:.3g} GB | {memory[1] / 1e9:.3g} GB | {memory[0] / memory[1] - 1:+.0%} |",
    ]


def child(what: str, config: Path, options: argparse.Namespace, more: str = "") -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, __file__, "--child", what, str(config), "--clock", options.clock]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": places, "MORE": more, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def machine() -> str:
    """Processor, cores, versions, and how busy it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "timm"))
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, {versions}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    )


# -- in processes of their own ----------------------------------------------------------------------------------------


def write(config: str, clock: str) -> dict[str, Any]:
    """Towers without weights, their tokenizers, records and pictures, and the settings of a run."""
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    given, steps = json.loads(os.environ["MORE"])
    size, folder, dice = Size(**given), Path(config).parent, random.Random(0)
    for name in ("language", "bert", "data/pictures"):
        (folder / name).mkdir(parents=True)
    words = size.language["vocab_size"]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / "language")
    (folder / "language/config.json").write_text(json.dumps(size.language))
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(4, 30521))]
    (folder / "bert/vocab.txt").write_text("\n".join(bert))
    BertTokenizer(vocab=str(folder / "bert/vocab.txt")).save_pretrained(folder / "bert")
    records = []
    for number in range(size.batch * 4):
        Image.effect_noise((96, 96), 60).convert("RGB").save(folder / f"data/pictures/{number}.jpg")
        asked, answered = (
            " ".join(f"w{dice.randrange(4, words)}" for _ in range(count)) for count in KINDS[number % len(KINDS)]
        )
        record = {"id": str(number), "image": f"pictures/{number}.jpg", "instruction": asked, "target": answered}
        records.append(json.dumps(record))
    (folder / "data/records.jsonl").write_text("\n".join(records))
    (folder / "mine.yaml").write_text(
        "name: mine\nversion: 1\n"
        "train: {reader: jsonl, files: {records: records.jsonl, images: .}, template: instruction}\n"
    )
    settings = {
        "vision": {"name": size.vision, "pretrained": False, "train_transform": {"mode": "squash"}},
        "language": {"name": str(folder / "language"), "pretrained": False},
        "qformer": {**size.qformer, "tokenizer": str(folder / "bert")},
        "data": {"root": str(folder / "data"), "tasks": {str(folder / "mine.yaml"): 1.0}},
        "train": {
            "steps": steps, "batch_size": size.batch, "micro_batch_tokens": size.room, "log_every": 1,
            "monitor_every": 0, "checkpoint_every": 1000, "keep_checkpoints": 1,
        },
    }  # fmt: skip
    Path(config).with_suffix(".yaml").write_text(json.dumps(settings))
    return {}


def plan(config: str, clock: str) -> dict[str, Any]:
    import torch

    from qformer import config as settings_files
    from qformer.planning import plan as planning

    settings = settings_files.load(Path(config).with_suffix(".yaml"))
    sizes = planning.sizes(settings)
    steps = planning.look(settings, sizes).steps
    device = torch.device("cpu")
    speed = planning.speed_of(settings, sizes, steps, "here", None, device, CLOCKS[clock])
    made = planning.reckon(settings, sizes, steps, speed, on_cpu=True)
    told = {"seconds": made.step, "bytes": made.bytes, "moment": made.moment, "held": made.held}
    return {**told, "parts": made.seconds, "work": made.work}


def train(config: str, clock: str) -> dict[str, Any]:
    from qformer import config as settings_files
    from qformer.train import loop

    time.perf_counter = CLOCKS[clock]
    run = Path(os.environ["MORE"])
    settings = settings_files.load(Path(config).with_suffix(".yaml"), [f"output={run}"])
    loop.train(settings, say=str, quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = [settings.train.batch_size / line["samples_per_second"] for line in lines[2:]]
    return {"seconds": statistics.median(taken), **empty(config, clock)}


def empty(config: str, clock: str) -> dict[str, Any]:
    """The most memory that this process has held, the libraries of a run among it."""
    import resource

    from qformer.train import loop  # noqa: F401

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak * (1 if sys.platform == "darwin" else 1024)}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CHILDREN = {"write": write, "plan": plan, "train": train, "empty": empty}


if __name__ == "__main__":
    main()
