"""An adapter carried over to another LLM as a run: a new projection, its warm-up alone, a short joint tuning, one table.

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
from typing import TYPE_CHECKING, Any

from qformer import cards, config, loading, plugging, run, weights
from qformer.config import LanguageConfig, RunConfig, check_numbers
from qformer.errors import ConfigError, did_you_mean
from qformer.evaluate.metrics import METRICS
from qformer.plugging import Start
from qformer.report import PLUG_FILE, write_report
from qformer.vlm import ADAPTER_FILE, TOKENIZER_FOLDER

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {
    "before": "before tuning",
    "warmup": "after warm-up",
    "tuned": "after tuning",
    "fresh": "fresh adapter",
    "source": "source, its own LLM",
}
"""What is compared, and what the table calls it."""
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

    def after(self, settings: RunConfig) -> Stages:
        """Every number filled in from the source's settings."""
        train = settings.train

        def chosen(given: float | None, otherwise: float) -> Any:
            return otherwise if given is None else given

        return dataclasses.replace(
            self,
            warmup_steps=chosen(self.warmup_steps, max(1, round(WARMUP_SHARE * train.steps))),
            warmup_rate=chosen(self.warmup_rate, WARMUP_RATE * train.rate),
            steps=chosen(self.steps, max(1, round(TUNING_SHARE * train.steps))),
            rate=chosen(self.rate, train.rate),
        )


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
        without: rows of the table to leave out: "before", "warmup", "tuned", "fresh", "source".
        overrides: `key=value` changes to the source's settings of data, training, evaluation, and to `language`.
        vision: where the image encoder is, if it moved.
        own_language: where the source's own LLM is, if it moved.
        say: is given every line meant for a person.
        quiet: no progress bars.

    Returns:
        The run directory.

    Raises:
        ConfigError, DataError, TrainingError: as `plug`, `fit` and `score`; or the directory holds another carrying
            over.
    """
    from qformer.train.checkpoint import same_run
    from qformer.train.loop import train

    for row in without:
        if row not in ROWS:
            raise ConfigError(f"plug: unknown row '{row}' to leave out.{did_you_mean(row, ROWS)}")
    settings = _settings(source, language, overrides, tasks=tasks, data=data, limit=limit)
    stages = stages.after(settings)
    directory = Path(output) if output is not None else _beside(source, language)
    chosen = cards.load_all(settings.evaluate.tasks, "eval")
    if not chosen:
        raise ConfigError("plug: there is no task to score; name cards with --tasks (tasks=), or 'held_out'.")
    if (stages.warmup_steps or stages.steps) and not settings.data.tasks:
        raise ConfigError(
            f"{source}: it is no run, so nothing says what to tune on; add data.tasks={{CARD: 1.0}}, or leave both "
            f"stages out (steps 0)."
        )
    first = _is_first_process()
    ledger = _Ledger(directory / PLUG_FILE, {"source": str(source), "language": language, "start": stages.start})

    before = directory / "before" / "checkpoints" / "step-0"
    if first and not (before / ADAPTER_FILE).is_file():
        told: list[str] = []
        model = plugging.plug(
            source,
            settings.language if _is_run(source) or _speaks(overrides) else language,
            start=stages.start,
            own_language=own_language,
            vision=vision,
            seed=settings.seed,
            report=told.append,
        )
        model.save(before)
        ledger.note(told="\n".join(told))
        del model
    _together()
    if first:
        say(ledger.content.get("told", ""))
    described = loading.saved_settings(before)
    settings = dataclasses.replace(
        settings, vision=described.vision, language=described.language, qformer=described.qformer
    )

    runs: dict[str, RunConfig] = {}
    start = before
    if stages.warmup_steps:
        runs["warmup"] = _stage(
            settings, directory / "warmup", stages.warmup_steps, stages.warmup_rate, start, only=["projection"]
        )
        start = directory / "warmup" / "checkpoints" / f"step-{stages.warmup_steps}"
    if stages.steps:
        tuning = dataclasses.replace(settings, seed=settings.seed + 1)  # draws that the warm-up has not had
        runs["tuned"] = _stage(tuning, directory, stages.steps, stages.rate, start, only=settings.train.only)
    together = sum(each.train.steps for each in runs.values())
    if together and "fresh" not in without:
        runs["fresh"] = _stage(settings, directory / "fresh", together, settings.train.rate, None, settings.train.only)
    for name, each in runs.items():
        if (each.directory / "checkpoints" / f"step-{each.train.steps}" / ADAPTER_FILE).is_file():
            same_run(each.directory / run.CONFIG_FILE, each)
        else:
            say(f"{ROWS[name]}: {each.train.steps} steps at {each.train.rate:g}, of {', '.join(each.train.only) or 'all'}")
            train(each, say=say, quiet=quiet)
    if not first:
        return directory

    sources: dict[str, str | Path] = {"before": directory / "before"}
    sources |= {name: each.directory for name, each in runs.items()} | {"source": source}
    steps = {name: each.train.steps for name, each in runs.items()}
    ledger.note(steps=steps, own_language=_own_name(source, own_language))
    for name in ROWS:
        if name in sources and name not in without:
            towers = {"vision": vision, "language": own_language} if name == "source" else {}
            where = directory / "source" / "eval" if name == "source" else Path(sources[name]) / "eval"
            _score(ledger, name, sources[name], settings, where, towers, say=say, quiet=quiet)
    if (directory / run.CONFIG_FILE).exists():
        say(f"report: {write_report(directory)}")
    say(as_text(table(ledger.content, without)))
    say(f"the adapter: {directory if stages.steps else start}")
    return directory


def table(content: Mapping[str, Any], without: Sequence[str] = ()) -> Table:
    """What `plug.json` holds: a row a task, a column for each adapter, and the most frequent answer."""
    from rich.table import Table

    from qformer.evaluate.run import in_words

    rows = {name: content["rows"][name]["scores"] for name in ROWS if name in content["rows"] and name not in without}
    shown = Table(title=f"From '{content['own_language']}' to '{content['language']}', projection {content['start']}")
    for heading in ("task", "metric"):
        shown.add_column(heading)
    for name in rows:
        count = content["steps"].get(name)
        shown.add_column(ROWS[name] + (f", {count} steps" if count else ""), justify="right")
    for heading in ("most frequent", "n"):
        shown.add_column(heading, justify="right")
    for key in dict.fromkeys(key for scores in rows.values() for key in scores):
        found = {name: scores[key] for name, scores in rows.items() if key in scores}
        any_one = next(iter(found.values()))
        percent = METRICS[any_one["metric"]].percent
        cells = []
        for name in rows:
            entry = found.get(name)
            beside = f"\nshuffled {in_words(entry['shuffled'], percent)}" if entry and entry["shuffled"] else ""
            cells.append(in_words(entry, percent) + beside)
        number = f"{any_one['samples']:,}" + (f" of {any_one['of']:,}, partial" if any_one["partial"] else "")
        shown.add_row(key, any_one["metric"], *cells, in_words(any_one["most_frequent"], percent), number)
    return shown


def as_text(shown: Table) -> str:
    """A table as lines of plain text."""
    from qformer.evaluate.run import as_text

    return as_text(shown)


# -- settings ---------------------------------------------------------------------------------------------------------


def _is_run(source: str | Path) -> bool:
    return (run.run_directory(Path(source)) / run.CONFIG_FILE).is_file()


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
    own = config.load(run.run_directory(Path(source)) / run.CONFIG_FILE) if _is_run(source) else RunConfig()
    spoken = plugging.spoken(language, own.language)
    settings = config.changed(dataclasses.replace(own, language=spoken, output=None), overrides)
    root = dataclasses.replace(settings.data, root=str(data)) if data is not None else settings.data
    scored = settings.evaluate
    if tasks is not None:
        scored = dataclasses.replace(scored, tasks=list(tasks))
    if limit is not None:
        scored = dataclasses.replace(scored, limit=limit)
    return dataclasses.replace(settings, data=root, evaluate=scored)


def _beside(source: str | Path, language: str) -> Path:
    """`runs/demo` and `demo:other` make `runs/demo-on-other`."""
    place = run.run_directory(Path(source))
    parent = place.parent if place.exists() else Path("runs")
    return parent / f"{place.name}-on-{Path(language.rpartition(':')[2]).name}"


def _stage(
    settings: RunConfig, directory: Path, steps: int, rate: float | None, start: Path | None, only: Sequence[str]
) -> RunConfig:
    """Settings of one stage: its warm-up of the rate is as large a share of it as of the source's run."""
    train = settings.train
    assert rate is not None
    train = dataclasses.replace(
        train,
        steps=steps,
        rate=rate,
        warmup_steps=round(train.warmup_steps * steps / train.steps),
        only=list(only),
    )
    qformer = settings.qformer
    if start is not None:
        words = start / TOKENIZER_FOLDER
        known = start.parent.parent.parent / "before" / "checkpoints" / "step-0" / TOKENIZER_FOLDER
        qformer = dataclasses.replace(
            qformer,
            init=[{"from": str(start)}],
            tokenizer=str(words if words.is_dir() else known) if qformer.instruction else None,
        )
    return dataclasses.replace(settings, name=directory.name, output=str(directory), train=train, qformer=qformer)


def _own_name(source: str | Path, own_language: str | None) -> str:
    """What the source's own LLM is called."""
    return own_language or loading.language_name(source)


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
    towers: Mapping[str, str | None],
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
    found = run.score(
        source,
        settings.evaluate.tasks,
        settings.data.root,
        limit=settings.evaluate.limit,
        batch_size=settings.evaluate.batch_size,
        shuffled=settings.evaluate.shuffled,
        seed=settings.seed,
        on_error=settings.data.on_error,
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
    told = ", ".join(f"{key} {result['score']:.3f}" for key, result in found.items())
    say(f"{ROWS[name]}: {told}")


def _hash(source: str | Path) -> str:
    """Of the adapter's own file; of what has no such file, its name."""
    place = Path(source)
    try:
        file = loading.adapter_directory(place) / ADAPTER_FILE
    except ConfigError:
        file = place
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(source)


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _together() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
