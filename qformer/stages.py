"""An adapter carried over to another LLM: a new projection, its warm-up alone, a short joint tuning, one table.

Everything stands in one run directory: `before/` (nothing tuned yet), `warmup/` and `fresh/` are runs of their own, the
tuning is the directory's own run, and `plug.json` holds what was asked for and every score of the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qformer import cards, config, loading, plugging, run, saved, weights
from qformer.comparison import PLUG_FILE, ROWS, table
from qformer.config import RunConfig, check_numbers
from qformer.errors import ConfigError, did_you_mean
from qformer.plugging import Start
from qformer.report import write_report
from qformer.vlm import ADAPTER_FILE, TOKENIZER_FOLDER

Number = TypeVar("Number", int, float)

KEPT = ("score", "interval", "shuffled", "most_frequent", "chance", "samples", "of", "partial", "recipe")
"""What `plug.json` keeps of a score file."""
WARMUP_SHARE, TUNING_SHARE = 0.05, 0.2
"""Of the source's steps, unless others are given: a quarter in all."""
WARMUP_RATE = 5.0
"""Of the source's rate: a projection alone bears more than the whole (VPGTrans, Zhang and others 2023)."""


@dataclass(frozen=True)
class Stages:
    """What is done with the adapter; null: a share of what the source's run did.  A stage of 0 steps is left out."""

    start: Start = "mapped"
    warmup_steps: int | None = None
    warmup_rate: float | None = None
    steps: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        check_numbers("plug", self, "warmup_steps", "steps")
        check_numbers("plug", self, "warmup_rate", "rate", above=True)

    def after(self, settings: RunConfig) -> Plan:
        """Every number filled in from the source's settings."""
        train = settings.train
        return Plan(
            warmup_steps=_or(self.warmup_steps, max(1, round(WARMUP_SHARE * train.steps))),
            warmup_rate=_or(self.warmup_rate, WARMUP_RATE * train.rate),
            steps=_or(self.steps, max(1, round(TUNING_SHARE * train.steps))),
            rate=_or(self.rate, train.rate),
        )


@dataclass(frozen=True)
class Plan:
    """How long and at which rates the projection is warmed up and all is tuned."""

    warmup_steps: int
    warmup_rate: float
    steps: int
    rate: float


def _or(given: Number | None, otherwise: Number) -> Number:
    return otherwise if given is None else given


def carry(
    source: str | Path,
    language: str,
    stages: Stages = Stages(),
    *,
    tasks: Sequence[str] | None = None,
    data: str | Path | None = None,
    output: str | Path | None = None,
    limit: int | None = None,
    without: Sequence[str] = (),
    overrides: Sequence[str] = (),
    vision: str | None = None,
    own_language: str | None = None,
    instruction_tokenizer: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Path:
    """Put another LLM under an adapter, tune it in stages, and compare; what `qformer plug` does.

    What is done is not done again: the same command goes on where it was stopped, in the middle of a stage too.

    Args:
        source: a run directory, or an adapter in any form that `load` takes (then `overrides` say what to tune on).
        language: the new LLM.
        stages: the start of the projection, and how long and at which rates it is warmed up and all is tuned.
        tasks: cards to score; by default those of the source's run.
        data: the data root; by default that of the source's run.
        output: the run directory; by default beside the source's, NAME-on-LLM.
        limit: score a seeded subset of this many samples per set; by default as the source's run.
        without: columns of the table to leave out: "before", "warmup", "tuned", "fresh", "source".
        overrides: `key=value` changes to the source's settings of data, training, evaluation, and to `language`.
        vision: where the image encoder is, if it moved.
        own_language: where the source's own LLM is, if it moved.
        instruction_tokenizer: what the Q-Former reads with, where the source does not bring it.
        say: is given every line meant for a person.
        quiet: no progress bars.

    Returns:
        The run directory.

    Raises:
        ConfigError, DataError, TrainingError: as `plug`, `fit` and `score`; or the directory holds another carrying
            over.
    """
    from qformer.evaluate.tables import as_text
    from qformer.train.checkpoint import same_run
    from qformer.train.loop import train

    for row in without:
        if row not in ROWS:
            raise ConfigError(f"plug: unknown column '{row}' to leave out.{did_you_mean(row, ROWS)}")
    settings = _settings(source, language, overrides, tasks=tasks, data=data, limit=limit)
    plan = stages.after(settings)
    directory = Path(output) if output is not None else _beside(source, language)
    chosen = cards.load_all(settings.evaluate.tasks, "eval")
    if not chosen:
        raise ConfigError("plug: there is no task to score; name cards with --tasks (tasks=), or 'held_out'.")
    if (plan.warmup_steps or plan.steps) and not settings.data.tasks:
        raise ConfigError(
            f"{source}: it is no run, so nothing says what to tune on; add data.tasks={{CARD: 1.0}}, or leave both "
            f"stages out (steps 0)."
        )
    ledger = _Ledger(directory / PLUG_FILE, {"source": str(source), "language": language, "start": stages.start})

    first = _is_first_process()
    before = directory / "before" / "checkpoints" / "step-0"
    if first:
        if not (before / ADAPTER_FILE).is_file():
            named = settings.language if _is_run(source) or _speaks(overrides) else language
            model = plugging.plug(
                source,
                named,
                start=stages.start,
                own_language=own_language,
                vision=vision,
                instruction_tokenizer=instruction_tokenizer,
                seed=settings.seed,
                report=lambda told: ledger.note(told=told),
            )
            model.save(before)
        say(ledger.content["told"])
    _together()
    described = loading.saved_settings(before)
    settings = dataclasses.replace(
        settings, vision=described.vision, language=described.language, qformer=described.qformer
    )
    runs = _runs(settings, directory, plan, before, fresh="fresh" not in without)
    for name, each in runs.items():
        if (each.directory / "checkpoints" / f"step-{each.train.steps}" / ADAPTER_FILE).is_file():
            same_run(each.directory / run.SETTINGS_FILE, each)
            continue
        if first:
            parts = ", ".join(each.train.only) or "all"
            say(f"{ROWS[name]}: {each.train.steps} steps at a rate of {each.train.rate:g}; trained: {parts}")
        train(each, say=say, quiet=quiet)
    if not first:
        return directory

    compared: dict[str, str | Path] = {"before": directory / "before"}
    compared |= {name: each.directory for name, each in runs.items()} | {"source": source}
    ledger.note(
        steps={name: each.train.steps for name, each in runs.items()},
        own_language=own_language or _own_language(source),
    )
    for name in ROWS:
        if name in compared and name not in without:
            own = {"vision": vision, "language": own_language, "instruction_tokenizer": instruction_tokenizer}
            towers = own if name == "source" else {}
            where = (directory / "source" if name == "source" else Path(compared[name])) / "eval"
            _score(ledger, name, compared[name], settings, where, towers, say=say, quiet=quiet)
    if (directory / run.SETTINGS_FILE).exists():
        say(f"report: {write_report(directory)}")
    say(as_text(table(ledger.content, without)))
    last = "warmup" if plan.warmup_steps else "before"
    say(f"the adapter: {directory if plan.steps else directory / last}")
    return directory


def _runs(settings: RunConfig, directory: Path, plan: Plan, before: Path, *, fresh: bool) -> dict[str, RunConfig]:
    """The runs that are made, by row: warm-up of the projection, tuning, and a fresh adapter with as many steps."""
    runs: dict[str, RunConfig] = {}
    start, words = before, before / TOKENIZER_FOLDER
    if plan.warmup_steps:
        place = directory / "warmup"
        runs["warmup"] = _stage(
            settings, place, plan.warmup_steps, plan.warmup_rate, ["projection"], start=start, words=words
        )
        start = place / "checkpoints" / f"step-{plan.warmup_steps}"
    every = settings.train.only
    if plan.steps:
        tuning = dataclasses.replace(settings, seed=settings.seed + 1)  # draws that the warm-up has not had
        runs["tuned"] = _stage(tuning, directory, plan.steps, plan.rate, every, start=start, words=words)
    if fresh and runs:
        together = plan.warmup_steps + plan.steps
        runs["fresh"] = _stage(settings, directory / "fresh", together, settings.train.rate, every)
    return runs


# -- settings ---------------------------------------------------------------------------------------------------------


def _is_run(source: str | Path) -> bool:
    return (run.run_directory(Path(source)) / run.SETTINGS_FILE).is_file()


def _speaks(overrides: Sequence[str]) -> bool:
    return any(each.startswith("language.") for each in overrides)


def _settings(
    source: str | Path,
    language: str,
    overrides: Sequence[str],
    *,
    tasks: Sequence[str] | None,
    data: str | Path | None,
    limit: int | None,
) -> RunConfig:
    """The source's settings of seed, data, training and evaluation, and the new LLM's."""
    for each in overrides:
        section = each.partition("=")[0].partition(".")[0]
        if section in ("vision", "qformer", "name", "output"):
            raise ConfigError(
                f"plug: '{each}' would change what is carried over as it is; only settings of data, train, evaluate "
                f"and language, and the seed, may change."
            )
    own = config.load(run.run_directory(Path(source)) / run.SETTINGS_FILE) if _is_run(source) else RunConfig()
    spoken = plugging.spoken_by(language, own.language)
    settings = config.changed(dataclasses.replace(own, language=spoken, output=None), overrides)
    root = dataclasses.replace(settings.data, root=str(data)) if data is not None else settings.data
    scored = settings.evaluate
    if tasks is not None:
        scored = dataclasses.replace(scored, tasks=list(tasks))
    if limit is not None:
        scored = dataclasses.replace(scored, limit=limit)
    return dataclasses.replace(settings, data=root, evaluate=scored)


def _own_language(source: str | Path) -> str:
    """The name of the LLM that an adapter was trained with; a whole model has its own inside."""
    try:
        return loading.saved_settings(saved.adapter_directory(Path(source))).language.name
    except ConfigError:
        return str(source)


def _beside(source: str | Path, language: str) -> Path:
    """`runs/demo` and `demo:other` make `runs/demo-on-other`."""
    place = run.run_directory(Path(source))
    parent = place.parent if place.exists() else Path("runs")
    return parent / f"{place.name}-on-{Path(language.rpartition(':')[2]).name}"


def _stage(
    settings: RunConfig,
    directory: Path,
    steps: int,
    rate: float,
    only: Sequence[str],
    *,
    start: Path | None = None,
    words: Path | None = None,
) -> RunConfig:
    """Settings of one stage: its warm-up of the rate is as large a share of it as of the source's run.

    Args:
        settings: of the source, with the new LLM.
        directory: where it is run.
        steps: how many.
        rate: the greatest.
        only: the parts that are trained.
        start: the adapter it starts from; None: as the source's run did.
        words: the Q-Former's tokenizer, where the adapter has one.
    """
    train = settings.train
    train = dataclasses.replace(
        train,
        steps=steps,
        rate=rate,
        warmup_steps=round(train.warmup_steps * steps / train.steps),
        only=list(only),
    )
    qformer = settings.qformer
    if start is not None:
        qformer = dataclasses.replace(qformer, init=[{"from": str(start)}])
    if words is not None and words.is_dir():
        qformer = dataclasses.replace(qformer, tokenizer=str(words))
    return dataclasses.replace(settings, name=directory.name, output=str(directory), train=train, qformer=qformer)


# -- scores -----------------------------------------------------------------------------------------------------------


class _Ledger:
    """`plug.json`: what was asked for, and every score, written after each.

    Raises:
        ConfigError: the file is of another carrying over, or broken.
    """

    def __init__(self, file: Path, asked: Mapping[str, Any]):
        self.file = file
        self.content: dict[str, Any] = {**asked, "rows": {}}
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            other = {name: found[name] for name in asked if found[name] != asked[name]}
            found["rows"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: it cannot be read ({error}); remove it, or give another output.") from None
        if other:
            listed = "; ".join(f"{name} was {value!r} and is {asked[name]!r}" for name, value in other.items())
            raise ConfigError(f"{file}: this directory holds another carrying over: {listed}. Give another output.")
        self.content = found

    def note(self, **values: Any) -> None:
        self.content |= values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with weights.whole_file(self.file) as work:
            work.write_text(json.dumps(self.content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _score(
    ledger: _Ledger,
    name: str,
    source: str | Path,
    settings: RunConfig,
    where: Path,
    towers: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    quiet: bool,
) -> None:
    """Score one adapter, unless just this was done before, and note it."""
    asked = {
        "evaluate": dataclasses.asdict(settings.evaluate),
        "root": settings.data.root,
        "seed": settings.seed,
        "adapter": _hash(source),
    }
    if ledger.content["rows"].get(name, {}).get("asked") == asked:
        return
    found = run.score_as_set(
        settings,
        source,
        output=where,
        say=lambda _: None,  # one table at the end
        quiet=quiet,
        **towers,
    )
    scores = {
        key: {"title": result["title"], "metric": result["metric"], **{each: result[each] for each in KEPT}}
        for key, result in found.items()
    }
    ledger.note(rows={**ledger.content["rows"], name: {"asked": asked, "scores": scores}})
    for key, result in found.items():
        if result["broken"]:
            say(f"{ROWS[name]}: {key}: {result['broken']} broken records left out; {where} says why.")
    numbers = {key: result["score"] for key, result in found.items() if result["score"] is not None}
    told = ", ".join(f"{key} {number:.3f}" for key, number in numbers.items())
    say(f"{ROWS[name]}: {told}")


def _hash(source: str | Path) -> str:
    """Of the adapter's own file; of what has no such file, its name."""
    place = Path(source)
    try:
        file = saved.adapter_directory(place) / ADAPTER_FILE
    except ConfigError:
        file = place
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(source)


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _together() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
