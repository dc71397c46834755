"""Several processes: the gradients, the order, the answers and the checkpoints of one, whoever holds the LLM."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qformer import cards, cli, images, loading, rollcall, saved
from qformer.backbones import sharding
from qformer.errors import ConfigError, DataError, TrainingError
from qformer.processes import ALONE, Processes
from qformer.rollcall import RollCall, roll_call
from qformer.train import loop
from qformer.train.step import train_step
from tests import world
from tests.test_spread import files, scored
from tests.test_train import TRAIN, maker_of

MANY_GPUS = Path(__file__).parent.parent / "docs" / "many_gpus.md"
KINDS = {
    "llama": ("llama", ()),
    "t5": ("t5", ()),
    "checkpointed": ("llama", ("language.gradient_checkpointing=true",)),
}
"""Family and settings of models that are compared; by two processes in the ordinary suite the first alone."""
STEPS = {"uneven": (7, 60), "empty": (1, None)}
"""Samples of a step and the budget of its micro-batches: unequal numbers of both, and ranks without any row."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data with a card that ranks and a variant that generates; towers beside it."""
    folder = tmp_path_factory.mktemp("many")
    card = world.write_pictures(folder, count=13)
    said = "{answer: generate, metric: exact_match, decoding: {max_new_tokens: 4, num_beams: 2}}"
    card.write_text(f"{card.read_text()}variants: {{said: {{eval: {said}}}}}\n")
    for family in ("llama", "t5"):
        world.towers(folder / "towers", family)
    return folder


def build(root: Path, kind: str, processes: Processes, *, shard: bool) -> Any:
    family, changes = KINDS[kind]
    name = root / f"{kind}-{shard}-{processes.count}-{processes.index}"
    given = world.settings(root / "towers", root, name, *changes, f"language.shard={str(shard).lower()}", family=family)
    return loading.build(given, report=str).settle(torch.device("cpu"), processes)


def one_step(model: Any, wrapped: Any, accelerator: Accelerator, number: int, budget: int | None) -> dict[str, Any]:
    """Gradients, loss and counts of a step, and what this process read for it; no weight is changed."""
    opened: list[str] = []
    load = images.load_image

    def watched(source: Any, *more: Any) -> Any:
        opened.append(Path(source).name)
        return load(source, *more)

    maker = maker_of(
        model.settings, model, batch_size=number, micro_batch_tokens=budget, rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )  # fmt: skip
    images.load_image = watched
    try:
        data = maker[0]
    finally:
        images.load_image = load
    kept: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None})
    )
    model.train()
    dummy = maker.assembler.dummy(model.vision.settings.size)
    report = train_step(wrapped, model.objective, data.batches, dummy, optimizer, accelerator, None)
    names = [name for batch in data.batches for name in batch.samples]
    return {
        "gradients": kept, "loss": report.loss, "counts": report.counts, "names": names, "opened": sorted(set(opened)),
        "passes": len(data.batches),
    }  # fmt: skip


def results(root: Path, accelerator: Accelerator, shard: bool, kinds: Sequence[str]) -> dict[str, Any]:
    """Of each kind of model its steps, and what it answers where processes ask it unlike often."""
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    found: dict[str, Any] = {}
    for kind in kinds:
        model = build(root, kind, processes, shard=shard)
        if shard:
            check_parts(model, processes)
        wrapped = accelerator.prepare_model(model, device_placement=False)
        for name, (number, budget) in STEPS.items():
            found[f"{kind} {name}"] = one_step(model, wrapped, accelerator, number, budget)
        if shard or processes.count == 1:
            with model.together():
                for _ in range(1 + processes.index):  # each a batch more than the one before it
                    found[f"{kind} answers"] = answers(root, model)
            with suppress(DataError), model.together():  # one that fails sees the others off
                if processes.index:
                    raise DataError("its picture is broken")
                assert answers(root, model) == found[f"{kind} answers"]
            chosen = cards.load_all([str(root / "colours.yaml"), str(root / "colours.yaml") + ":said"], "eval")
            where = f"scored-{kind}-{processes.count}"
            scored(root, model, where, cards=chosen, batch_size=5, processes=processes)  # three batches
    return found


def answers(root: Path, model: Any) -> list[Any]:
    """What a model says of two pictures, and how likely it finds what others say."""
    pictures = [str(root / "pictures" / f"{number}.png") for number in (1, 2)]
    said = model.generate(pictures, ["what colour is it", "say it, please"], max_new_tokens=6)
    return [said, model.rank(pictures, ["what colour is it"] * 2, ["it is red", "green", "it is indeed white"])]


def check_parts(model: Any, processes: Processes) -> None:
    """Blocks are in parts, all else is whole, and nothing of the LLM takes a gradient."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    parts = {name: each for name, each in model.language.named_parameters() if isinstance(each, DTensor)}
    blocks = [module for module in model.language.model.modules() if isinstance(module, FSDPModule)]
    assert len(parts) == sum(len(list(block.parameters())) for block in blocks) and len(blocks) in (2, 4)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    assert model.language.shards.mesh.size() == here and torch.distributed.get_world_size() == processes.count
    assert all(each.device_mesh.size() == here for each in parts.values())
    matrices = [each for each in parts.values() if each.ndim == 2]
    assert all(each.to_local().numel() * here == each.numel() for each in matrices)
    assert not any(isinstance(each, DTensor) for each in (*model.vision.parameters(), *model.connector.parameters()))
    assert not any(each.requires_grad for each in model.language.parameters())


MANY = """
import os, sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from tests.test_many import results

root, out, *kinds = sys.argv[1:]
root, out = Path(root), Path(out)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) > 1
found = {shard: results(root, accelerator, shard, kinds) for shard in (False, True)}
torch.save(found, out / f"{accelerator.process_index}.pt")
"""


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def launch(script: str, folder: Path, *given: object, options: Sequence[str]) -> subprocess.Popen[str]:
    """torchrun, on one thread a process."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "script.py"
    if not file.exists():  # another node is reading it
        file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(file), *map(str, given)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(*started: subprocess.Popen[str]) -> list[str]:
    """What they said; all must end well."""
    said = [each.communicate(timeout=500)[0] for each in started]
    for each, words in zip(started, said, strict=True):
        assert each.returncode == 0, words
    return said


def check_equal(alone: dict[str, Any], ranks: Sequence[dict[bool, dict[str, Any]]], kinds: Sequence[str]) -> None:
    """Gradients, loss, counts, samples and answers of several processes against those of one."""
    for shard in (False, True):
        for kind in kinds:
            for name in STEPS:
                one, several = alone[f"{kind} {name}"], [rank[shard][f"{kind} {name}"] for rank in ranks]
                for what in ("names", "opened"):  # each sample, and each picture, by one process
                    assert sorted(chain.from_iterable(each[what] for each in several)) == sorted(one[what])
                if kind == "llama" or name == "empty":  # unlike numbers of micro-batches
                    assert len({each["passes"] for each in several}) > 1
                assert name != "empty" or several[-1]["names"] == []
                for each in several:
                    assert each["counts"] == one["counts"]
                    assert each["loss"] == pytest.approx(one["loss"], rel=1e-5)
                    assert each["gradients"].keys() == one["gradients"].keys()
                    for parameter, expected in one["gradients"].items():
                        if not parameter.endswith("key.bias"):
                            error = (each["gradients"][parameter] - expected).norm()
                            assert error <= 1e-4 * expected.norm(), (shard, kind, name, parameter)
    for kind in kinds:
        said, likelihoods = alone[f"{kind} answers"]
        for rank in ranks:
            assert rank[True][f"{kind} answers"][0] == said
            for mine, theirs in zip(rank[True][f"{kind} answers"][1], likelihoods, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4)
        for name in STEPS:  # in parts or not
            for rank in ranks:
                whole, parts = (rank[shard][f"{kind} {name}"]["gradients"] for shard in (False, True))
                for parameter in whole:
                    if not parameter.endswith("key.bias"):
                        assert (whole[parameter] - parts[parameter]).norm() <= 1e-5 * whole[parameter].norm()


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    return results(root, Accelerator(cpu=True), shard=False, kinds=[*KINDS])


def equal_to_one(
    root: Path, alone: dict[str, Any], out: Path, *options: Sequence[str], kinds: Sequence[str] = tuple(KINDS)
) -> None:
    """Torchrun once for each node, then compare."""
    finished(*(launch(MANY, out, root, out, *kinds, options=each) for each in options))
    ranks = [torch.load(file, weights_only=True) for file in sorted(out.glob("*.pt"))]
    check_equal(alone, ranks, kinds)
    for kind in kinds:
        assert files(root / f"scored-{kind}-{len(ranks)}") == files(root / f"scored-{kind}-1")


def test_two_processes_equal_one(root: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """gloo under torchrun, DDP with the LLM whole and in parts: unequal token counts, micro-batches and questions."""
    equal_to_one(root, alone, tmp_path, [f"--master_port={free_port()}", "--nproc_per_node=2"], kinds=("llama",))


@pytest.mark.slow
def test_four_processes_equal_one(root: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    equal_to_one(root, alone, tmp_path, [f"--master_port={free_port()}", "--nproc_per_node=4"])


@pytest.mark.slow
def test_two_processes_on_each_of_two_nodes_equal_one(root: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    """By the line of the SLURM script.  Blocks are in parts within a node; the gradients are those of all."""
    [script] = re.findall(r"^srun torchrun (.*?) -m qformer train", MANY_GPUS.read_text(), re.MULTILINE | re.DOTALL)
    given = {"$SLURM_NNODES": "2", "$SLURM_JOB_ID": "7", "$head:29500": f"127.0.0.1:{free_port()}", "node=8": "node=2"}
    for name, value in given.items():
        assert name in script
        script = script.replace(name, value)
    options = [each for each in shlex.split(script) if each.strip()]
    equal_to_one(root, alone, tmp_path, options, options)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_llm_is_not_held_in_parts_by_one_process(root: Path, tmp_path: Path) -> None:
    settings = world.settings(root / "towers", root, tmp_path / "run", "language.shard=true")
    with pytest.raises(ConfigError, match=r"language\.shard is true, and there is one process, .*; start several"):
        loop.train(settings, say=lambda _: None, quiet=True)


def test_an_llm_that_cannot_be_cut_is_refused(root: Path) -> None:
    tower = build(root, "llama", ALONE, shard=False).language
    tower.model._no_split_modules = None
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not say which of its modules are its blocks"):
        sharding.shard(tower, torch.device("cpu"))
    tower.model._no_split_modules, tower.model.quantization_method = {"LlamaDecoderLayer"}, "bitsandbytes"
    with pytest.raises(ConfigError, match="the LLM is quantised, which cannot be cut into parts"):
        sharding.shard(tower, torch.device("cpu"))


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_an_engine_that_would_wrap_the_whole_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, name: str
) -> None:
    monkeypatch.setenv(variable, "true")
    settings = world.settings(root / "towers", root, tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"accelerate is configured to use {name}.* set language\.shard: true"):
        loop.train(settings, say=lambda _: None, quiet=True)


# -- going on with other numbers of processes -------------------------------------------------------------------------

GOES_ON = (
    """
import json, os
from qformer.data.batch import StepMaker

make = StepMaker.__getitem__

def noted(self, step):
    data = make(self, step)
    names = [name for batch in data.batches for name in batch.samples]
    with open(f"{os.environ['NOTES']}.{self.rank}", "a") as file:
        file.write(json.dumps([step, names]) + "\\n")
    return data

StepMaker.__getitem__ = noted
"""
    + TRAIN
)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_with_one_or_four(root: Path, tmp_path: Path) -> None:
    """The same samples and the same losses as with two all along, with the LLM whole and in parts."""
    changes = ["train.batch_size=7", "train.micro_batch_tokens=60", "train.checkpoint_every=3"]

    def run(name: str, ranks: int, steps: int, *more: str) -> tuple[list[dict[str, Any]], dict[int, list[str]]]:
        settings = world.settings(root / "towers", root, tmp_path / name, *changes)
        notes = tmp_path / f"{name}.{ranks}.notes"
        os.environ["NOTES"] = str(notes)
        given = (f"{settings.directory}.yaml", *changes, *more, f"train.steps={steps}")
        options = [f"--master_port={free_port()}", f"--nproc_per_node={ranks}"]
        finished(launch(GOES_ON, tmp_path / "scripts", *given, options=options))
        lines = [json.loads(line) for line in (settings.directory / "metrics.jsonl").read_text().splitlines()]
        names: dict[int, list[str]] = {}
        for file in tmp_path.glob(f"{notes.name}.*"):
            for step, read in map(json.loads, file.read_text().splitlines()):
                names.setdefault(step, []).extend(read)
        return lines, {step: sorted(each) for step, each in names.items()}

    run("begun", 2, 3)
    for ranks in (1, 4):
        shutil.copytree(tmp_path / "begun", tmp_path / f"on{ranks}")
    wanted, names = run("begun", 2, 6, "language.shard=true")
    assert [line["step"] for line in wanted] == list(range(1, 7)) and set(names) == set(range(6))
    for ranks in (1, 4):
        found, read = run(f"on{ranks}", ranks, 6)
        assert read == {step: names[step] for step in (3, 4, 5)}
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert mine["learning_rate"] == theirs["learning_rate"]
    asked = ["eval", str(tmp_path / "begun"), "--tasks", str(root / "colours.yaml"), "--data", str(root)]
    options = [f"--master_port={free_port()}", "--nproc_per_node=2"]  # its language.shard is true
    given = [*asked, "--batch-size", "5", "--output", str(tmp_path / "two")]
    finished(launch(COMMAND, tmp_path / "command", *given, options=options))
    assert cli.main([*asked, "--batch-size", "5", "--output", str(tmp_path / "one")]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


COMMAND = "import sys; from qformer import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    """Of two under torchrun; `make drill` does it with four, and more."""
    changes = ("train.steps=400", "train.checkpoint_every=2")
    directory = world.settings(root / "towers", root, tmp_path / "lost", *changes).directory
    options = [f"--master_port={free_port()}", "--nproc_per_node=2"]
    started = launch(COMMAND, tmp_path / "scripts", "train", f"{directory}.yaml", *changes, options=options)
    while not saved.checkpoints(directory):
        assert started.poll() is None, started.communicate()[0]
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    [second] = [each for each in children if b"\0RANK=1\0" in Path(f"/proc/{each}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    said = started.communicate(timeout=60)[0]
    assert re.search(r"^qformer: process 1 of 2 on \S+ is gone without a word", said, re.MULTILINE), said
    done = int(saved.last_checkpoint(directory).name.removeprefix("step-"))
    given = ("train", f"{directory}.yaml", "train.checkpoint_every=2", f"train.steps={done + 2}")
    finished(launch(COMMAND, tmp_path / "scripts", *given, options=options))
    assert saved.last_checkpoint(directory).name == f"step-{done + 2}"


# -- a process that is gone -------------------------------------------------------------------------------------------


class Call(RollCall):
    """One that notes its last words instead of ending the test, and is quick."""

    def __init__(self, store: Any, index: int, count: int = 3, **more: Any):
        self.said: list[str] = []
        self.codes: list[int] = []
        quick = {"beat": 0.02, "silence": 0.6, "alarmed": 0.2, **more}
        super().__init__(Processes(index, count), store, end=self.codes.append, write=self.said.append, **quick)

    def ended(self) -> list[int]:
        """Its exit codes, waited for."""
        self.thread.join(20)
        return self.codes


def begin(*calls: Call) -> None:
    """Not in the main thread, whose signals are one call's alone."""
    for call in calls:
        thread = threading.Thread(target=call.start)
        thread.start()
        thread.join()


def several(count: int = 3, **more: Any) -> list[Call]:
    store = torch.distributed.HashStore()
    return [Call(store, index, count, **more) for index in range(count)]


def test_processes_that_live_and_end_say_nothing() -> None:
    calls = several()
    begin(*calls)
    time.sleep(0.8)
    for call in reversed(calls):  # the first one leaves last: the store is its own
        call.leave()
        call.stop()
    assert [call.said + call.codes for call in calls] == [[], [], []]


def test_a_process_that_falls_silent_is_named_and_ends_the_others() -> None:
    calls = several()
    begin(calls[0], calls[2])
    assert calls[0].ended() == calls[2].ended() == [1]
    for call in (calls[0], calls[2]):
        assert call.said[0].startswith("qformer: process 1 of 3 on ") and "is gone without a word" in call.said[0]
        assert "What was written is whole; the same command goes on from it." in call.said[0]
        call.stop()


def test_a_process_that_stopped_is_quoted() -> None:
    calls = several()
    begin(calls[0], calls[2])
    calls[1].leave("the file is cut short.")
    assert calls[0].ended() == [1]
    assert calls[2].ended() == [1]
    for call in (calls[0], calls[2]):  # the second one to end repeats it, and quotes no one who only ended with it
        assert re.fullmatch(r"qformer: process 1 of 3 on \S+ has stopped: the file is cut short\.\n", call.said[0])
        call.stop()


def test_without_its_store_the_first_process_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = several()

    def closed(*_: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    lost = SimpleNamespace(set=closed, multi_get=closed, get=closed)
    calls[1].store = lost
    begin(calls[1])
    assert calls[1].ended() == [1] and "process 0 of 3 is gone without a word" in calls[1].said[0]
    assert "process 0 of 3 is gone" in str(calls[1].missing())
    calls[1].stop()


@pytest.mark.parametrize("dead", [False, True])
def test_sigterm_is_answered_while_the_process_waits(dead: bool) -> None:
    calls = several(silence=60.0)
    before = signal.getsignal(signal.SIGTERM)
    begin(calls[2], *(() if dead else calls[:1]))
    calls[1].start()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls[1].ended() == ([1] if dead else [143])
    finally:
        calls[1].stop()
    assert signal.getsignal(signal.SIGTERM) == before
    assert ("process 0 of 3" if dead else "it was stopped from outside (SIGTERM). What was") in calls[1].said[0]
    if not dead:
        assert calls[0].ended() == [1] and "process 1 of 3" in calls[0].said[0] and "from outside" in calls[0].said[0]
        calls[0].stop()
    calls[2].stop()


@pytest.mark.parametrize("dead", [False, True])
def test_what_a_lost_connection_raises_names_who_is_gone(monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    store = torch.distributed.HashStore()
    other = Call(store, 1, 2)
    monkeypatch.setattr(rollcall, "_store", lambda processes: store)
    for name, value in {"BEAT": 0.02, "ALARMED": 0.2}.items():
        monkeypatch.setitem(RollCall.__init__.__kwdefaults__, name.lower(), value)
    monkeypatch.setattr(Processes, "gathered", lambda self, values: list(values))
    if not dead:
        begin(other)
    error, words = (TrainingError, "process 1 of 2 .* is gone") if dead else (RuntimeError, "a bug of our own")
    with pytest.raises(error, match=words), roll_call(Processes(0, 2)):
        raise RuntimeError("a bug of our own")
    with pytest.raises(DataError, match="cut short"), roll_call(Processes(0, 2)):
        raise DataError("cut short")
    assert store.get("0") == b"left cut short"
    if not dead:
        other.stop()


def test_one_process_calls_no_roll() -> None:
    before = threading.active_count()
    with roll_call(ALONE):
        assert threading.active_count() == before
