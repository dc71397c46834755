"""What a run survives, tried out: `make drill`, or `python -m benchmarks.drill [--kills 100] [--only kills,ranks]`.

Small runs are trained, and what befalls real ones befalls them: SIGKILL at any moment and while a checkpoint is being
written, a process of four that is lost, or that hangs, a full disk, data that were replaced, a picture without end, two
runs in one directory, a value that is not finite.  Each part ends in a line, with its counts, or in an error; where
the system forbids one (mounting a small disk), the line says that it was not tried.

A restart is a process forked off this one, which has everything imported; only the parts with several processes start
Python anew.  `--set KEY=VALUE` changes every run's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = "checkpoints/.step-*"
"""What stands in a run directory while a checkpoint is being written."""
STILL = ("vision.train_transform.mode=squash", "vision.train_transform.flip=0")
"""What a cache of features asks for: one view of each picture."""
MINUTE = 60.0
PAGE = 4096
"""Bytes of which a disk in memory gives a file some."""


@dataclass
class World:
    """Where runs are, and how they are made."""

    folder: Path
    seed: int
    changes: list[str] = field(default_factory=list)
    made: int = 0

    def run(self, name: str, *changes: str) -> tuple[Path, list[str]]:
        """A run's directory, and the command line that trains it."""
        from tests import world

        data = self.folder / "data"
        if not data.exists():
            world.write_pictures(data)
        given = ["qformer.dropout=0.1", *changes, *self.changes]
        settings = world.settings(self.folder / "towers", data, self.folder / "runs" / name, *given)
        return settings.directory, ["train", f"{settings.directory}.yaml", *given]

    def start(self, command: Sequence[str], prepare: Callable[[], object] | None = None) -> Child:
        """A process that does what `qformer COMMAND` does."""
        self.made += 1
        return Child(command, self.folder / f"said-{self.made}.txt", prepare)


class Child:
    """A forked process that runs a command, and what it said."""

    def __init__(self, command: Sequence[str], said: Path, prepare: Callable[[], object] | None):
        self.file = said
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                told = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
                os.dup2(told, 1)
                os.dup2(told, 2)
                from qformer import cli

                if prepare is not None:
                    prepare()
                code = cli.main(command)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def alive(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def kill(self) -> None:
        """SIGKILL, to it and to its data workers."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 1800) -> int:
        """Its exit code."""
        latest = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > latest:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds:.0f} s: {self.said()[-2000:]}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def well(self) -> None:
        """It must end well."""
        code = self.wait()
        assert code == 0, f"exit code {code}: {self.said()[-2000:]}"

    def said(self) -> str:
        """What it has written."""
        return self.file.read_text(encoding="utf-8", errors="replace")

    def refused(self, words: str, code: int = 1) -> None:
        """It must end with a sentence, and no traceback."""
        assert self.wait() == code, f"exit code {self.code}: {self.said()[-2000:]}"
        said = " ".join(self.said().split())
        assert re.search(words, said), f"'{words}' is not in: {said[-2000:]}"
        assert "Traceback" not in said, said[-2000:]


def progress(run: Path) -> int:
    """The last step that a run has told of."""
    try:
        return int(json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def reach(child: Child, run: Path, step: int) -> None:
    """Wait until a run has done a step."""
    while progress(run) < step:
        assert child.alive(), f"it ended before step {step}: {child.said()[-2000:]}"
        time.sleep(0.002)


def check_equal(one: Path, other: Path) -> None:
    """Weights, optimizer and losses of two runs must be equal, to the bit."""
    import torch

    from qformer import saved
    from qformer.weights import load_tensors

    last = [saved.last_checkpoint(run) for run in (one, other)]
    assert last[0].name == last[1].name, last
    first, second = (load_tensors(each / "adapter.safetensors") for each in last)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "the weights differ"
    states = [torch.load(each / "optimizer.pt", weights_only=True)["state"] for each in last]
    for number, values in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(values[name]), torch.as_tensor(states[1][number][name])) for name in values
        )
    told = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    losses = [[(line["step"], line["loss"]) for line in lines] for lines in told]
    assert losses[0] == losses[1], "the losses differ"


# -- kills ------------------------------------------------------------------------------------------------------------


def kills(world: World, count: int) -> str:
    """SIGKILL so many times, restarted each time."""
    whole, _ = world.run("whole")
    told = killed(world, count, whole, "killed", written=lambda run: set(run.glob(WORK)))
    return f"{told} a checkpoint being written"


def cache(world: World, count: int) -> str:
    """The same while features are kept on disk, of which a part is removed before each start."""
    from qformer.config import VisionConfig

    if "cache" not in VisionConfig.__dataclass_fields__:
        return "a cache of features: not tried, since there is none"
    chance = random.Random(world.seed + 1)
    folder = world.folder / "features"

    def forget() -> None:
        for file in sorted(folder.glob("*/[0-9a-f][0-9a-f]/*")):
            if chance.random() < 0.5:
                file.unlink()

    def slowly() -> None:  # a file of a kilobyte or two would be there before anything could hit it
        write = Path.write_bytes

        def halves(self: Path, content: bytes) -> int:
            if "unfinished" not in self.parts:
                return write(self, content)
            with self.open("wb", buffering=0) as file:
                file.write(content[: len(content) // 2])
                time.sleep(0.01)
                file.write(content[len(content) // 2 :])
            return len(content)

        Path.write_bytes = halves  # type: ignore[method-assign, assignment]

    settings = [(*STILL, f"vision.cache={place}") for place in (world.folder / "features-whole", folder)]
    whole, _ = world.run("cached", *settings[0])
    told = killed(
        world, count, whole, "cached-killed", settings[0], settings[1], forget, slowly, ahead=1,
        written=lambda run: set(folder.glob("*/unfinished/*")),
    )  # fmt: skip
    return f"with a cache of features that is filled meanwhile: {told} a file of it being written"


def killed(
    world: World,
    count: int,
    whole: Path,
    name: str,
    undisturbed: Sequence[str] = (),
    disturbed: Sequence[str] = (),
    prepare: Callable[[], object] = str,
    inside_it: Callable[[], object] | None = None,
    *,
    ahead: int = 6,
    written: Callable[[Path], set[Path]],
) -> str:
    """Kill a run so many times, and compare it with one that was left alone.

    `prepare` is done before each start, `inside_it` in the process that is started; `written`: what stands there while
    something is being written; `ahead`: how many steps a run is let go on at most before what it writes is aimed at.
    """
    chance = random.Random(world.seed)
    steps = 8 * count + 20
    changes = (f"train.steps={steps}", "train.checkpoint_every=2", "train.keep_checkpoints=2")
    _, command = world.run(whole.name, *changes, *undisturbed)
    world.start(command).well()
    run, command = world.run(name, *changes, *disturbed)
    done = inside = early = aimed = 0
    while done < count:
        prepare()
        before, left = progress(run), written(run)  # what earlier kills left is none of this one's
        child = world.start(command, inside_it)
        way = chance.random()
        if way < 0.2:  # at any moment of the start
            latest = time.monotonic() + chance.random() * 1.5
            while time.monotonic() < latest and child.alive():
                time.sleep(0.001)
        elif way < 0.6:  # while it writes
            aimed += 1
            step = min(steps - 4, before + chance.randint(1, ahead))
            reach(child, run, step)
            while child.alive() and not written(run) - left and progress(run) < step + 3:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.01)
        else:  # at any moment of a step
            reach(child, run, min(steps - 4, before + chance.randint(1, 6)))
            time.sleep(chance.random() * 0.1)
        if not child.alive():
            assert child.code == 0, child.said()[-2000:]
            break  # it was faster than expected, and is done
        child.kill()
        done += 1
        inside += bool(written(run) - left)
        early += progress(run) <= before
    assert done == count, f"the run was done after {done} of {count} kills"
    assert inside or aimed < 8, f"{aimed} kills were aimed at what is being written, and none hit"
    world.start(command).well()
    check_equal(whole, run)
    return (
        f"{done} SIGKILLs over {steps} steps, {early} of them before any new step: weights, optimizer and losses "
        f"equal an undisturbed run's, to the bit; {aimed} were aimed at, and {inside} hit,"
    )


# -- several processes ------------------------------------------------------------------------------------------------


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ranks(parent: int) -> dict[int, int]:
    """Process ids of torchrun's children by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                given = dict(each.split("=", 1) for each in (folder / "environ").read_text().split("\0") if "=" in each)
                found[int(given["RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


def ranks(world: World) -> str:
    """One of four processes is killed: once the first, once another."""
    changes = ("train.steps=24", "train.batch_size=8", "train.checkpoint_every=4")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "-m", "qformer"]

    def command(given: Sequence[str]) -> list[str]:
        return [*launch[:-2], f"--master_port={_port()}", *launch[-2:], *given]

    whole, given = world.run("four", *changes)
    ran = subprocess.run(command(given), env=_environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    longest = 0.0
    for lost in (2, 0):
        run, given = world.run(f"four-without-{lost}", *changes)
        started = subprocess.Popen(
            command(given), env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while progress(run) < 6:
            assert started.poll() is None, started.communicate()[0][-3000:]
            time.sleep(0.01)
        found = _ranks(started.pid)
        assert sorted(found) == [0, 1, 2, 3], found
        os.kill(found[lost], signal.SIGKILL)
        began = time.monotonic()
        while any(_lives(pid) for pid in found.values()):
            assert time.monotonic() - began < MINUTE, f"others live a minute after process {lost} was killed"
            time.sleep(0.05)
        longest = max(longest, time.monotonic() - began)
        said = started.communicate(timeout=MINUTE)[0]
        assert started.returncode != 0 and f"qformer: process {lost} of 4" in said, said[-3000:]
        assert "is gone without a word" in said, said[-3000:]
        ran = subprocess.run(command(given), env=_environment(), capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        check_equal(whole, run)
    return (
        f"process 2, and then 0, of 4 killed: the others named it and had stopped after {longest:.1f} s at most; "
        f"restarted, the runs equal an undisturbed one, to the bit"
    )


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def hangs(world: World) -> str:
    """One of two processes, started by hand as srun starts them, stops answering and does not die."""
    run, given = world.run("hangs", "train.steps=100000", "train.checkpoint_every=50")
    port = str(_port())
    started = []
    for rank in ("0", "1"):
        more = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "qformer", *given], env=_environment(**more), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        while progress(run) < 3:
            assert all(each.poll() is None for each in started), started[0].communicate()[0][-3000:]
            time.sleep(0.01)
        started[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        said = started[0].communicate(timeout=MINUTE)[0]
        took = time.monotonic() - began
        assert started[0].returncode == 1 and "qformer: process 1 of 2" in said, said[-3000:]
    finally:
        for each in started:
            each.kill()
            each.wait()
    return (
        f"one of 2 processes hung (SIGSTOP), no torchrun around them: the other named it and ended after {took:.0f} s"
    )


# -- files ------------------------------------------------------------------------------------------------------------


def full_disk(world: World) -> str:
    """A disk that fills up, in a name space of its own; see `inside_full_disk`."""
    mount = ["unshare", "--user", "--mount", "--map-root-user"]
    may = subprocess.run([*mount, "mount", "-t", "tmpfs", "none", str(world.folder)], capture_output=True, check=False)
    if may.returncode:
        return f"a full disk: not tried, since no disk can be mounted here ({may.stderr.decode().strip()})"
    given = [sys.executable, "-m", "benchmarks.drill", "--inside-full-disk", "--folder", str(world.folder)]
    given += [each for change in world.changes for each in ("--set", change)]
    ran = subprocess.run([*mount, *given], env=_environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout.strip().splitlines()[-1]


def inside_full_disk(world: World) -> str:
    """Checkpoints and predictions on a disk of a few megabytes, which then is made larger."""
    changes = ("train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=20")
    whole, command = world.run("roomy", *changes)
    world.start(command).well()
    written = sum(file.stat().st_size for file in (whole / "checkpoints" / "step-2").rglob("*") if file.is_file())
    run, command = world.run("full", *changes)
    run.mkdir(parents=True)
    size = written * 5 // 2 >> 10

    def mount(kilobytes: int, *options: str) -> None:
        how = ",".join([f"size={kilobytes}k", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", str(run)], check=True)

    mount(size)
    world.start(command).refused("cannot be written .*No space left on device.* what was there before is whole")

    from qformer import saved

    assert [each.name for each in saved.checkpoints(run)] == ["step-2", "step-4"]
    mount(16 * size, "remount")
    world.start(command).well()
    check_equal(whole, run)

    predictions = world.folder / "predictions"
    data = world.folder / "data"
    asked = ["eval", str(whole), "--tasks", str(data / "colours.yaml"), "--data", str(data)]
    world.start([*asked, "--output", str(world.folder / "scored")]).well()
    predictions.mkdir()
    tight = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(predictions)]
    subprocess.run(tight, check=True)
    world.start([*asked, "--output", str(predictions)]).refused("(kept|written) .*No space left on device.*; make room")
    subprocess.run([*tight[:4], "remount,size=4m", *tight[5:]], check=True)
    world.start([*asked, "--output", str(predictions)]).well()
    for file in ("colours.predictions.jsonl", "colours.json"):
        one, other = ((place / file).read_text() for place in (world.folder / "scored", predictions))
        assert one == other, file
    kept = _full_cache(world, changes)
    return (
        f"a disk that filled up while a checkpoint was written, one while answers were, {kept}: a sentence each, what "
        f"was there stayed whole, and with room runs and scores equal undisturbed ones, to the bit"
    )


def _full_cache(world: World, changes: Sequence[str]) -> str:
    from qformer.config import VisionConfig

    if "cache" not in VisionConfig.__dataclass_fields__:
        return "(no cache of features: there is none)"
    from qformer.features import Filler

    folders = [world.folder / name for name in ("features", "features-full")]
    whole, command = world.run("cached", *changes, *STILL, f"vision.cache={folders[0]}")
    world.start(command).well()
    pages = [-(-file.stat().st_size // PAGE) for file in folders[0].rglob("*") if file.is_file()]
    size = (sum(pages) - 2) * PAGE >> 10  # room for what is tried out before the first step, and not for all
    folders[1].mkdir()
    tight = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(folders[1])]
    subprocess.run(tight, check=True)
    run, command = world.run("cached-full", *changes, *STILL, f"vision.cache={folders[1]}")

    def roomy() -> None:  # as when others fill the disk after the start, which refuses a cache that does not fit
        Filler.free = property(lambda self: 1 << 40)  # type: ignore[assignment, method-assign]

    world.start(command, roomy).refused("cannot be written .*No space left on device.*; make room there")
    subprocess.run([*tight[:4], f"remount,size={16 * size}k", *tight[5:]], check=True)
    world.start(command).well()
    check_equal(whole, run)
    return "and one while features were"


def replaced(world: World) -> str:
    """The file of records is replaced while a run reads it, by one of the same size and time."""
    changes = ("train.steps=40", "train.checkpoint_every=2")
    whole, command = world.run("kept", *changes)
    world.start(command).well()
    run, command = world.run("replaced", *changes)
    child = world.start(command)
    reach(child, run, 5)
    child.kill()
    records = world.folder / "data" / "records.jsonl"
    before, state = records.read_bytes(), records.stat()
    _put(records, before.replace(b"it is green", b"it is white", 1), state)
    assert records.stat().st_size == state.st_size
    world.start(command).refused("cannot go on with other data: content of 'colours' was", code=2)
    _put(records, before, state)
    child = world.start(command)
    reach(child, run, 12)
    _put(records, b"no records at all\n", state)  # under a run that goes on: it has read them
    child.well()
    _put(records, before, state)
    check_equal(whole, run)
    return (
        "records replaced by others of the same size and time: refused at the next start, by their content; under a "
        "run that has read them, harmless"
    )


def _put(file: Path, content: bytes, state: os.stat_result) -> None:
    work = file.with_suffix(".work")
    work.write_bytes(content)
    os.utime(work, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(work, file)


def endless(world: World) -> str:
    """A pipe in a picture's place, which gives nothing and never ends."""
    from qformer import images

    def hasty() -> None:
        images.PATIENCE = 1.0

    world.run("endless")
    picture = world.folder / "data" / "pictures" / "5.png"
    kept = picture.read_bytes()
    picture.unlink()
    os.mkfifo(picture)
    try:
        for workers in (0, 2):
            changes = ("train.steps=8", f"data.workers={workers}")
            _, command = world.run(f"endless-{workers}", *changes)
            world.start(command, hasty).refused("5.png is not open after 1 seconds; check the file")
            run, command = world.run(f"endless-skipped-{workers}", *changes, "data.on_error=skip")
            world.start(command, hasty).well()
            assert "is not open after" in (run / "broken.jsonl").read_text()
    finally:
        picture.unlink()
        picture.write_bytes(kept)
    return "a picture that takes for ever to open, in the process and in a data worker: a broken record, named"


def twice(world: World) -> str:
    """Two runs in one directory at once."""
    changes = ("train.steps=60", "train.checkpoint_every=5")
    whole, command = world.run("once", *changes)
    world.start(command).well()
    run, command = world.run("twice", *changes)
    first = world.start(command)
    reach(first, run, 3)
    world.start(command).refused(r"another run is writing there \(process \d+ on .*\); wait until it has ended")
    first.well()
    check_equal(whole, run)
    return "a second run in the same directory: refused, and the first one was not disturbed"


def not_finite(world: World) -> str:
    """A loss that is not a number, at one step."""
    from qformer import vlm

    changes = ("train.steps=12", "train.checkpoint_every=2")
    whole, command = world.run("finite", *changes)
    world.start(command).well()

    def spoil() -> None:
        passes: list[object] = []
        forward = vlm.VLM.forward

        def spoiled(self: Any, batch: Any) -> Mapping[str, Any]:
            passes.append(batch)
            return {
                name: each * float("nan") if len(passes) == 7 else each for name, each in forward(self, batch).items()
            }

        vlm.VLM.forward = spoiled  # type: ignore[method-assign, assignment]

    run, command = world.run("not-finite", *changes)
    world.start(command, spoil).refused("a value that is not finite in .* at step 7, with the samples .*r[0-9]")
    assert len(json.loads((run / "not_finite.json").read_text())["samples"]) == 6
    world.start(command).well()
    check_equal(whole, run)
    return (
        "a loss that is not a number at step 7: it stopped, named the samples, and went on from step 6 to the same end"
    )


KILLS: dict[str, Callable[[World, int], str]] = {
    "kills": kills,
    "cache": lambda world, count: cache(world, max(1, count // 4)),
}
PARTS: dict[str, Callable[[World], str]] = {
    "disk": full_disk,
    "replaced": replaced,
    "endless": endless,
    "twice": twice,
    "not_finite": not_finite,
    "hangs": hangs,
    "ranks": ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help=f"parts, comma-separated: {', '.join((*KILLS, *PARTS))}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in every run")
    parser.add_argument("--folder", help="where the runs go (a temporary folder)")
    parser.add_argument("--inside-full-disk", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch

    import qformer.run
    import qformer.train.loop  # noqa: F401 (so that a forked process has it)

    torch.set_num_threads(1)
    folder = Path(options.folder) if options.folder else Path(tempfile.mkdtemp(prefix="qformer-drill-"))
    if options.inside_full_disk:
        small = World(folder / "disk", options.seed, options.set)
        small.folder.mkdir()
        print(inside_full_disk(small))
        return
    world = World(folder, options.seed, options.set)
    chosen = [name for name in options.only.split(",") if name] or [*KILLS, *PARTS]
    for name in chosen:
        if name not in KILLS and name not in PARTS:
            parser.error(f"--only: '{name}' is no part; there are {', '.join((*KILLS, *PARTS))}")
    began = time.monotonic()
    for name in chosen:
        start = time.monotonic()
        told = KILLS[name](world, options.kills) if name in KILLS else PARTS[name](world)
        print(f"{name} ({time.monotonic() - start:.0f} s): {told}.", flush=True)
    print(f"drill: {len(chosen)} parts in {(time.monotonic() - began) / 60:.1f} minutes.")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
