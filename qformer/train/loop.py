"""A training run: cards and files first, weights after, then steps until the last."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from qformer import cards, config, keyed, loading, saved, vlm, weights
from qformer.config import RunConfig
from qformer.data.batch import StepData, StepMaker, mixture_of, open_sources, told_groups
from qformer.data.index import Index
from qformer.data.proof import LabelProof, lossy_targets
from qformer.errors import ConfigError, TrainingError, did_you_mean
from qformer.processes import PATIENCE, Processes
from qformer.rollcall import roll_call
from qformer.sample import Batch, row_length
from qformer.train import caching, checkpoint, compiling, monitors
from qformer.train.lock import locked
from qformer.train.optim import learning_rate, optimizer_for
from qformer.train.step import NotFiniteError, StepReport, rehearse, train_step

CONFIG_FILE, METRICS_FILE, MIXTURE_FILE, BROKEN_FILE = "config.yaml", "metrics.jsonl", "mixture.json", "broken.jsonl"
VALIDATION = "validation"
"""The key of a validation's mean in metrics.jsonl; `validation/TASK` are its parts."""
DATA_FILE = "data.json"
"""What the run reads: by set, hashes of card and templates, and the number of records."""
MANY_STEPS, LONG_WAIT = 100, 0.03
"""A share of the time spent waiting for data that is worth a word, after so many steps."""
PROVEN_STEPS = 3
"""Steps at the start whose trained tokens are decoded and compared with their targets."""


Validate = Callable[[vlm.VLM, int], dict[str, float]]
"""Scores of a model after so many steps, by task; on all processes together, and without a trace in the training."""


def train(
    settings: RunConfig,
    *,
    validate: Validate | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Path:
    """Run, or go on with, the training that the settings describe; the run directory.

    Cards, files and settings are checked before any weight is read.  A run directory that holds checkpoints goes on
    from the last one, bit for bit as if it had never stopped.

    Args:
        settings: what to do.
        validate: gives the scores that `validation` asks for; the adapter with the best mean is kept beside the
            rolling checkpoints.
        say: is given every line meant for a person.
        quiet: no progress bars.

    Raises:
        ConfigError, DataError: the settings or the data are at fault.  TrainingError: a value that is not finite,
            labels that do not decode, a checkpoint that cannot be written, another run in the same directory, another
            process that is gone.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizers were used
    _check_place(settings.directory)
    check_trackers(settings.train.log_with)
    _check_engine()
    state = _join_processes(patient=validate is not None)
    processes = Processes(state.process_index, state.num_processes)
    with roll_call(processes), ExitStack() as held:
        return _train(settings, validate, say, quiet, processes, held)


def _train(
    settings: RunConfig,
    validate: Validate | None,
    say: Callable[[str], None],
    quiet: bool,
    processes: Processes,
    held: ExitStack,
) -> Path:
    """As `train`; the processes are joined, and `held` keeps the run directory's lock to the end."""
    run = settings.directory
    task_cards, multipliers = cards.mixture(settings.data)
    index = Index(Path(settings.data.root), settings.data.index, say=say)
    sources = processes.in_turn(
        lambda: open_sources(task_cards, Path(settings.data.root), on_error=settings.data.on_error, index=index)
    )
    mixture = processes.in_turn(lambda: mixture_of(sources, settings.data, multipliers, settings.seed, say))
    described = {key: source.described() for key, source in sources.items()}
    processes.agreed(lambda: held.enter_context(locked(run)) if processes.first else None)
    last = saved.checkpoints(run)[-1:]
    if (run / CONFIG_FILE).exists() and last:
        checkpoint.same_run(run / CONFIG_FILE, settings)
        checkpoint.same_data(run / DATA_FILE, described)
    if last:
        checkpoint.enough_steps(last[0], settings.train.steps)
    if settings.train.compile:
        processes.agreed(lambda: compiling.check("cuda" if torch.cuda.is_available() else "cpu"))

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if settings.train.precision == "bfloat16" else "no",
        log_with=list(settings.train.log_with) or None,
        project_dir=str(run),
    )
    first_process = accelerator.is_main_process
    say = say if first_process else lambda _: None
    model = loading.build(settings, report=say).settle(accelerator.device, processes)
    model.train_only(settings.train.only)
    model.train()
    optimizer = optimizer_for(model.trainable(), settings.train)
    start = checkpoint.restore(last[0], model, optimizer) if last else 0
    if settings.train.compile:
        say(compiling.compile_blocks(model))
    wrapped = accelerator.prepare_model(model, device_placement=False)
    kept = caching.opened(settings, model, say)
    maker = StepMaker(
        mixture,
        sources,
        model.assembler(training=True, cache=kept.cache if kept else None),
        batch_size=settings.train.batch_size,
        steps=settings.train.steps,
        soft_tokens=settings.qformer.queries,
        micro_batch_tokens=settings.train.micro_batch_tokens,
        packed=model.language.packs is not None,
        apart=model.language.is_encoder_decoder,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        on_error=settings.data.on_error,
    )
    if first_process:
        with _writing(run):
            run.mkdir(parents=True, exist_ok=True)
            with weights.whole_file(run / CONFIG_FILE) as file:
                config.save(settings, file)
            with weights.whole_file(run / DATA_FILE) as file:
                file.write_text(json.dumps(described, indent=2), encoding="utf-8")
            for lines_of_steps in (run / METRICS_FILE, *run.glob(f"{BROKEN_FILE}*")):
                checkpoint.cut_lines(lines_of_steps, start)
    accelerator.wait_for_everyone()
    if settings.train.log_with:
        accelerator.init_trackers(settings.name, config={"settings": json.dumps(asdict(settings))})
    proof = LabelProof(maker.assembler.joiner)
    trained = sum(parameter.numel() for parameter in model.trainable().values())
    say(
        f"{run}: steps {start} to {settings.train.steps}, {trained:,} trained parameters, "
        f"{accelerator.num_processes} process(es)"
    )
    if (groups := told_groups(mixture, settings.data.per_picture)) is not None:
        say(groups)
    if settings.language.packing and model.language.packs is None and not model.language.is_encoder_decoder:
        say(f"{settings.language.name}: its rows cannot be kept apart in one tensor row, so they are padded")
    if first_process:
        for line in lossy_targets(model.language.tokenizer, sources, settings.seed):
            say(line)
    if kept:
        processes.agreed(lambda: caching.announce(kept, maker, settings, start, say) if first_process else None)

    alarm = monitors.BlindnessAlarm()
    dummy = maker.assembler.dummy(model.vision.settings.size)
    rehearse(wrapped, dummy, accelerator)
    loader: DataLoader[StepData] = DataLoader(
        maker,
        batch_size=None,
        sampler=range(start, settings.train.steps),
        num_workers=settings.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with _bar(settings, start, shown=first_process and not quiet) as advance, _Lines(run, first_process) as lines:
        validation = _Validation(settings, validate, model, lines, accelerator, say)
        if start and validation.due(start):
            owed = torch.tensor(int(first_process and not validation.done(start)), device=accelerator.device)
            if int(accelerator.reduce(owed, "sum")):
                validation(start)  # it was cut off by whatever ended the run before
        began = time.perf_counter()
        supply = _Supply(loader)
        for data in supply:
            step = data.step
            if data.error is not None:
                raise data.error
            _note_broken(run, data, accelerator.process_index)
            if kept:
                data.batches = kept.complete(data.batches, data.tally)
            if step - start < PROVEN_STEPS:
                proof.check(maker, data)
            report = _one_step(step, settings, wrapped, model, data, dummy, optimizer, accelerator)
            done = step + 1
            seconds, began = time.perf_counter() - began, time.perf_counter()
            values: dict[str, Any] = {}
            if settings.train.monitor_every and done % settings.train.monitor_every == 0:
                with model.together():
                    if data.batches:
                        values |= monitors.readings(model, max(data.batches, key=lambda batch: batch.pictures))
                for warning in alarm(values) if values else ():
                    say(f"step {done}: {warning}")
                began = time.perf_counter()
            cut = int(accelerator.reduce(torch.tensor(data.truncations.texts, device=accelerator.device), "sum"))
            if values or cut or done % settings.train.log_every == 0 or done == settings.train.steps:
                values |= _readings(report, data, settings, seconds, accelerator.num_processes)
                values |= {"waited": supply.waited / seconds, "truncations": cut}
                lines.write({"step": done, **values})
                if settings.train.log_with:
                    accelerator.log(values, step=done)
            advance(report.loss, settings.train.batch_size / seconds)
            # A step that is validated has a checkpoint too: a run that is ended in between goes on with validating.
            if done % settings.train.checkpoint_every == 0 or done == settings.train.steps or validation.due(done):
                if kept:
                    kept.flush()
                if first_process:
                    checkpoint.save(run, done, model, optimizer, settings.train.keep_checkpoints)
                if validation.due(done):
                    validation(done)
                accelerator.wait_for_everyone()
                began = time.perf_counter()
    accelerator.wait_for_everyone()
    if kept:
        say(caching.summary(kept, accelerator))
    if first_process:
        write_mixture(run, maker)
        for line in (*_broken_summary(run), *_truncation_summary(run), *supply.summary(settings.data.workers)):
            say(line)
    if settings.train.log_with:
        accelerator.end_training()
    return run


def _check_engine() -> None:
    """Refuse engines of accelerate that would wrap the whole model, optimizer and all, in their own way.

    Raises:
        ConfigError: accelerate was configured to use one.
    """
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate is configured to use {name}, under which this trains nothing; configure it for several "
                f"GPUs alone (--multi_gpu), and set language.shard: true to hold the LLM in parts."
            )


def _join_processes(*, patient: bool) -> PartialState:
    """Joined before anything else, since their patience cannot be changed later: they may wait for a validation."""
    return PartialState(cpu=not torch.cuda.is_available(), **({"timeout": PATIENCE} if patient else {}))


class _Validation:
    """Scores a run at the steps that `validation.every` names, and keeps the adapter that does best."""

    def __init__(
        self,
        settings: RunConfig,
        validate: Validate | None,
        model: vlm.VLM,
        lines: _Lines,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ):
        self.settings, self.validate, self.model = settings, validate, model
        self.lines, self.accelerator, self.say = lines, accelerator, say

    def due(self, step: int) -> bool:
        """Whether the run is validated after so many steps."""
        return self.validate is not None and (
            step % self.settings.validation.every == 0 or step == self.settings.train.steps
        )

    def done(self, step: int) -> bool:
        """Whether it was, by the lines of metrics.jsonl."""
        lines = (self.settings.directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        told = map(json.loads, lines)
        return any(line["step"] == step and VALIDATION in line for line in told)

    def __call__(self, step: int) -> None:
        """Validate, all processes together; the first one keeps what did best, and says so."""
        if self.validate is None:
            return
        with monitors.undisturbed(self.model):
            scores = self.validate(self.model, step)
        if not self.accelerator.is_main_process:
            return
        mean = sum(scores.values()) / len(scores)
        best = checkpoint.keep_best(self.settings.directory, step, self.model, mean, scores)
        values = {VALIDATION: mean, **{f"{VALIDATION}/{task}": score for task, score in scores.items()}}
        self.lines.write({"step": step, **values})
        if self.settings.train.log_with:
            self.accelerator.log(values, step=step)
        listed = ", ".join(f"{task} {score:.4f}" for task, score in scores.items())
        self.say(
            f"step {step}: validation {mean:.4f} ({listed}); the best is {best['mean']:.4f} at step {best['step']}"
        )


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that would be passed over in silence.

    Raises:
        ConfigError: accelerate knows no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LoggerType, get_available_trackers

    for name in names:
        if name not in LoggerType.list() or name == "all":
            known = [each for each in LoggerType.list() if each != "all"]
            raise ConfigError(f"train.log_with: unknown tracker '{name}'.{did_you_mean(name, known)}")
        if name not in {str(each) for each in get_available_trackers()}:
            raise ConfigError(f"train.log_with: the package of '{name}' is not installed; run pip install {name}.")


class _Supply:
    """What each step is given, and the seconds that were waited for it: `waited` for the last one."""

    def __init__(self, loader: Iterable[StepData]):
        self.loader, self.waited = loader, 0.0
        self.steps, self.all_waited, self.began = 0, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[StepData]:
        steps = iter(self.loader)
        while True:
            began = time.perf_counter()
            data = next(steps, None)
            self.waited = time.perf_counter() - began
            if data is None:
                return
            self.steps, self.all_waited = self.steps + 1, self.all_waited + self.waited
            yield data

    def summary(self, workers: int) -> list[str]:
        """What may be done where steps waited long, if there are cores that would do it."""
        share = self.all_waited / max(1e-9, time.perf_counter() - self.began)
        if self.steps < MANY_STEPS or share < LONG_WAIT or (os.cpu_count() or 1) <= workers + 1:
            return []
        return [f"{100 * share:.0f} % of the time was spent waiting for data; raise data.workers, which is {workers}"]


def _one_step(
    step: int,
    settings: RunConfig,
    wrapped: torch.nn.Module,
    model: vlm.VLM,
    data: StepData,
    dummy: Batch,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> StepReport:
    """Seed dropout and set the rate by the step's number, then take the step; a value that is not finite is saved."""
    torch.manual_seed(keyed.keyed_hash(settings.seed, "dropout", step, accelerator.process_index) >> 1)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.train)
    try:
        return train_step(
            wrapped, model.objective, data.batches, dummy, optimizer, accelerator, settings.train.max_norm
        )
    except NotFiniteError as error:
        # An LLM in parts answers to all processes alone, and the others have no cause to run theirs again.
        found = None if settings.language.shard else _module_not_finite(model, data.batches)
        where = next(filter(None, gather_object([found])), error.where)  # all ranks are here, and know it of their own
        if accelerator.is_main_process:
            record = {"step": step + 1, "where": where, "samples": error.samples}
            with weights.whole_file(settings.directory / "not_finite.json") as file:
                file.write_text(json.dumps(record, indent=2), encoding="utf-8")
        raise NotFiniteError(f"{where} at step {step + 1}", error.samples) from None


def _module_not_finite(model: vlm.VLM, batches: list[Batch]) -> str | None:
    """The innermost module whose output is the first that is not finite, found by running the batches again."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not found and not torch.isfinite(output).all():
                found.append(f"the output of {name}")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with monitors.undisturbed(model):
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _readings(report: StepReport, data: StepData, settings: RunConfig, seconds: float, ranks: int) -> dict[str, Any]:
    positions = sum(row_length(row, settings.qformer.queries) for batch in data.batches for row in batch.rows)
    return {
        "loss": report.loss,
        "gradient_norm": report.gradient_norm,
        "learning_rate": learning_rate(data.step, settings.train),
        "samples_per_second": settings.train.batch_size / seconds,
        "tokens_per_second": positions * ranks / seconds,
    }


def write_mixture(run: Path, maker: StepMaker) -> None:
    """`mixture.json`: by set the share asked for, the draws it has had, its records, and its passes."""
    mixture = maker.mixture
    drawn = mixture.totals(maker.steps * maker.batch_size)
    shares = mixture.shares()
    table = {
        name: {
            "asked": shares[name],
            "drawn": drawn[name],
            "records": mixture.records[name],
            "passes": drawn[name] / mixture.records[name],
        }
        for name in mixture.names
    }
    with weights.whole_file(run / MIXTURE_FILE) as file:
        file.write_text(json.dumps(table, indent=2), encoding="utf-8")


def _check_place(run: Path) -> None:
    """Refuse a run directory that cannot be, before anything is loaded.

    Raises:
        TrainingError: a file stands in its way, or nothing may be written there.
    """
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise TrainingError(f"output is {run}, and {there} {what}; give another output.")


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    """What the file system refuses, as a sentence."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{run}: it cannot be written ({error.strerror or error}); make room or give another output, then start "
            f"the same command again."
        ) from None


def _note_broken(run: Path, data: StepData, rank: int) -> None:
    """Records that could not be read, each with its reason, in the run directory; a file for every process."""
    if not data.broken:
        return
    suffix = f".{rank}" if rank else ""
    with _writing(run), (run / f"{BROKEN_FILE}{suffix}").open("a", encoding="utf-8") as file:
        for task, record, reason in data.broken:
            line = {"step": data.step + 1, "task": task, "record": record, "reason": reason}
            file.write(json.dumps(line) + "\n")


def _broken_summary(run: Path) -> list[str]:
    """A line per set: which records were left out by any process, by the numbers that messages have."""
    files = sorted(run.glob(f"{BROKEN_FILE}*"))
    broken: dict[str, set[Any]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            broken.setdefault(told["task"], set()).add(told["record"])
    return [
        f"{task}: {len(numbers)} broken record(s) were skipped, number {_some(numbers)}; see "
        f"{', '.join(str(file) for file in files)}"
        for task, numbers in sorted(broken.items())
    ]


def _truncation_summary(run: Path) -> list[str]:
    """How many texts were cut in the whole run; steps that cut any are always in metrics.jsonl."""
    lines = (json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    total = sum(line.get("truncations", 0) for line in lines)
    return [f"{total} text(s) were cut to their limits (language.instruction_limit, target_limit)"] if total else []


def _some(numbers: set[Any], most: int = 20) -> str:
    in_order = sorted(
        numbers, key=lambda each: (not isinstance(each, int), each if isinstance(each, int) else str(each))
    )
    return ", ".join(map(str, in_order[:most])) + (" …" if len(numbers) > most else "")


class _Lines:
    """metrics.jsonl, a line at a time, each on disk before the next step; on other processes nothing is written."""

    def __init__(self, run: Path, active: bool):
        self.run = run
        with _writing(run):
            self.file = (run / METRICS_FILE).open("a", encoding="utf-8") if active else None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            with _writing(self.run):
                self.file.close()

    def write(self, values: dict[str, Any]) -> None:
        if self.file:
            with _writing(self.run):
                self.file.write(json.dumps(values) + "\n")
                self.file.flush()


@contextmanager
def _bar(settings: RunConfig, start: int, *, shown: bool) -> Iterator[Callable[[float, float], None]]:
    """A progress bar with loss, samples/s and time left; `advance(loss, samples_per_second)` moves it a step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:.1f} samples/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task(
            settings.name, total=settings.train.steps, completed=start, loss=float("nan"), speed=0.0
        )
        smooth: list[float] = []

        def advance(loss: float, speed: float) -> None:
            smooth[:] = (
                [loss, speed] if not smooth else [0.95 * smooth[0] + 0.05 * loss, 0.95 * smooth[1] + 0.05 * speed]
            )
            progress.update(task, advance=1, loss=smooth[0], speed=smooth[1])

        yield advance
