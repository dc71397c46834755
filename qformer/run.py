"""What the commands do, as functions: tune, score, ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qformer import cards, config, loading, saved, vlm
from qformer.config import RunConfig
from qformer.errors import ConfigError, DataError
from qformer.exporting import LAVIS_FILE, to_lavis
from qformer.origin import origin
from qformer.processes import ALONE, Processes, joined
from qformer.report import write_report
from qformer.rollcall import roll_call

METRICS_FILE, SETTINGS_FILE = "metrics.jsonl", "config.yaml"
"""Are in every run directory."""


def fit(
    settings: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> Path:
    """Tune a Q-Former as the settings say, score what `evaluate.tasks` names, and write the report.

    Args:
        settings: a `RunConfig`, a shipped config's name, or a YAML file.
        overrides: `key=value` changes to a named config.
        say: is given every line meant for a person.
        quiet: no progress bars.

    Returns:
        The run directory.
    """
    from qformer.evaluate.run import check
    from qformer.train.loop import train

    if not isinstance(settings, RunConfig):
        settings = config.load(settings, overrides)
    # A wrong name or a missing file fails before an hour of training.
    check(cards.load_all(settings.evaluate.tasks, "eval"), Path(settings.data.root))
    processes = joined()
    run = train(settings, validate=_validation(settings, quiet, processes), say=say, quiet=quiet)
    if settings.evaluate.tasks:
        score_as_set(settings, run, processes=processes, say=say, quiet=quiet)
    elif processes.first:
        say(f"report: {write_report(run)}")
    return run


def score_as_set(
    settings: RunConfig,
    source: str | Path,
    *,
    processes: Processes = ALONE,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **places: Any,
) -> dict[str, dict[str, Any]]:
    """What `score` does, as a run's settings say; `places`: its `output`, `vision` and `language`."""
    return score(
        source,
        settings.evaluate.tasks,
        settings.data.root,
        limit=settings.evaluate.limit,
        batch_size=settings.evaluate.batch_size,
        shuffled=settings.evaluate.shuffled,
        seed=settings.seed,
        on_error=settings.data.on_error,
        index=settings.data.index,
        processes=processes,
        say=say,
        quiet=quiet,
        **places,
    )


def score(
    source: str | Path | vlm.VLM,
    tasks: Sequence[str],
    data: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    shuffled: bool = True,
    seed: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    index: str | None = None,
    output: str | Path | None = None,
    vision: str | None = None,
    language: str | None = None,
    instruction_tokenizer: str | None = None,
    device: str | None = None,
    decoding: str | None = None,
    prompt_sweep: bool = False,
    against: str | None = None,
    processes: Processes | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score an adapter, with its baselines and intervals, on the `eval` sections of cards.

    A run directory gets a new report too, even where scoring fails.  The same call goes on where it was interrupted.
    Under torchrun or accelerate all processes call this and share the questions; each is given all scores.

    Args:
        source: a saved adapter, a run directory, or a loaded model.
        tasks: card names (`name`, `name:variant`, a YAML file), "held_in" or "held_out".
        data: the folder the cards' paths start from.
        limit: a seeded subset of this many samples per set; the score is marked as partial.
        seed: of subset, shuffling and intervals; by default the run's own, or 0 where there is no run.
        index: where annotations are kept once they were read, as `data.index`.
        output: where predictions and scores go; by default `eval/` in the run directory.
        instruction_tokenizer: what the Q-Former reads with, where the source does not bring it.
        device: where the model is put; by default the accelerator, if there is one.
        decoding: ask and decode as another code base does ("lavis"), instead of as the cards say.
        prompt_sweep: score each card with each prompt that its template lists; returns those scores by card.
        against: say too how far the scores are from published ones: a table's name ("paper"), or its and its row's
            ("paper:vicuna7b").
        processes: those that share the work; by default all that this command was started as.

    Returns:
        By card: score, interval, baselines, recipe id; the same that `eval/TASK.json` holds.
    """
    from qformer.evaluate import habits, published, sweep
    from qformer.evaluate.run import check
    from qformer.evaluate.run import score as score_cards
    from qformer.evaluate.tables import as_text

    chosen = cards.load_all(tasks, "eval")
    if not chosen:
        raise ConfigError("no task to score; name cards, or 'held_in' or 'held_out'.")
    check(chosen, Path(data))
    kept = habits.load(decoding) if decoding is not None else None
    table, row = None, ""
    if against is not None:
        name, _, row = against.partition(":")
        table = published.load(name)
        if row:
            table.row(row, "")  # one that is not there is refused before the model is loaded
    if prompt_sweep:
        sweep.check(chosen)
        if against is not None:
            raise ConfigError("eval: a prompt sweep gives many scores of a set, and one is put beside a published one.")
    if output is None:
        if isinstance(source, vlm.VLM):
            raise ConfigError("score: a loaded model has no directory of its own; give output.")
        _check_own(source)
        output = run_directory(Path(source)) / "eval"
    output = Path(output)
    processes = joined() if processes is None else processes
    say = say if processes.first else _silent
    if isinstance(source, vlm.VLM):
        model, run = source, None
    else:
        device = device or best_device()
        named: dict[str, Any] = {
            "vision": vision, "language": language, "instruction_tokenizer": instruction_tokenizer,
        }  # fmt: skip
        model = loading.load(source, **named, device=device, report=say, processes=processes)
        run = run_directory(Path(source))
    if kept is not None:
        speaks = model.language.profile.encoder_decoder
        overruled = habits.overruled(chosen.values(), kept, encoder_decoder=speaks)
        alike = [habits.with_habits(card, kept, encoder_decoder=speaks) for card in chosen.values()]
        chosen = {card.key: card for card in alike}
        for line in (*habits.unlike(alike, kept), *overruled):
            say(line)
    if prompt_sweep:
        for line in sweep.check(chosen):  # the prompts may have become others
            say(line)
    if table is not None:
        row = table.row(row, model.settings.language.name)
    about = origin(model, None if isinstance(source, vlm.VLM) else source)
    seed = seed if seed is not None else own_seed(run)

    def scored(
        chosen: Mapping[str, cards.TaskCard], wordings: Mapping[str, str] | None, directory: Path, **options: Any
    ) -> dict[str, dict[str, Any]]:
        return score_cards(
            model,
            chosen,
            Path(data),
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            directory=directory,
            on_error=on_error,
            index=index,
            origin=about,
            wordings=wordings,
            features=model.filler,
            processes=processes,
            quiet=quiet,
            **options,
        )

    try:
        with roll_call(processes):
            if prompt_sweep:
                if model.filler is not None:
                    say(model.filler.told())

                def one(
                    chosen: Mapping[str, cards.TaskCard], wordings: Mapping[str, str], where: Path
                ) -> dict[str, Any]:
                    return scored(chosen, wordings, where, shuffled=False, finish=False, say=say)

                found = sweep.sweep(chosen, one, output, processes)
                for shown in sweep.tables(found):
                    say(as_text(shown))
                return found
            results = scored(chosen, None, output, shuffled=shuffled, say=say)
            if table is not None:
                beside, left_out = published.compared(results, table, row)
                for line in (*left_out, *map(as_text, beside), *published.remarks(table, row)):
                    say(line)
            return results
    finally:
        if processes.first and run is not None and (run / METRICS_FILE).exists() and output == run / "eval":
            say(f"report: {write_report(run)}")


def compare(
    one: str | Path,
    other: str | Path,
    *,
    tasks: Sequence[str] = (),
    despite: bool = False,
    output: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Compare two runs' scores sample by sample, from the files they have.

    Args:
        one: a run directory, or a directory of scores.
        other: another.
        tasks: cards to compare, or "held_in" or "held_out"; by default all that both were scored on.
        despite: whether scores of different recipes are compared.
        output: a directory that `comparison.json` is written to.

    Returns:
        By card: both scores, and their difference with its interval.

    Raises:
        ConfigError: two scores are of different recipes.  DataError: there is nothing to compare.
    """
    from qformer.evaluate import compare as paired
    from qformer.evaluate.files import write_json
    from qformer.evaluate.tables import as_text

    found, notes = paired.compare(_scores_of(Path(one)), _scores_of(Path(other)), tasks=list(tasks), despite=despite)
    for line in (*notes, *map(as_text, paired.tables(found, str(one), str(other))), *paired.apart(found)):
        say(line)
    if output is not None:
        content = {"one": str(one), "other": str(other), "tasks": found}
        write_json(Path(output) / "comparison.json", content)
    return found


def _scores_of(source: Path) -> Path:
    """Where a run's scores are; a directory of scores is its own."""
    inside = run_directory(source) / "eval"
    return inside if inside.is_dir() else source


def _check_own(source: str | Path) -> None:
    """Refuse, before anything is loaded, a source that scores would not lie beside: a folder made for them under the
    name of a hub id would be taken for an adapter by the next call.
    """
    try:
        saved.adapter_directory(Path(source))
    except ConfigError:
        raise ConfigError(
            f"{source}: no adapter there; give a directory written by save() or a run directory with a checkpoint, or "
            f"say with --output where the scores of a published model go."
        ) from None


def own_seed(run: Path | None) -> int:
    """The seed of a run's settings; 0 where there is no run."""
    if run is None or not (run / SETTINGS_FILE).is_file():
        return 0
    seed = config.read_yaml(run / SETTINGS_FILE).get("seed", 0)
    return seed if isinstance(seed, int) else 0


def _silent(line: str) -> None:
    """Says nothing."""


def _validation(
    settings: RunConfig, quiet: bool, processes: Processes = ALONE
) -> Callable[[vlm.VLM, int], dict[str, float]] | None:
    """What scores a model in the midst of its training, as `validation` says; None where nothing is to be scored.

    Predictions and scores of a step go to `validation/step-N` in the run directory.

    Raises:
        ConfigError, DataError: a wrong card or missing files, before any training.
    """
    from qformer.evaluate.run import check
    from qformer.evaluate.run import score as score_cards

    chosen = cards.validated(settings)
    if not chosen:
        return None
    root = Path(settings.data.root)
    check(chosen, root)

    def validate(model: vlm.VLM, step: int) -> dict[str, float]:
        results = score_cards(
            model,
            chosen,
            root,
            limit=settings.validation.limit,
            batch_size=settings.validation.batch_size,
            shuffled=False,
            seed=settings.seed,
            directory=settings.directory / "validation" / f"step-{step}",
            on_error=settings.data.on_error,
            index=settings.data.index,
            origin=origin(model, step=step),
            processes=processes,
            say=_silent,
            quiet=quiet,
        )
        for task, result in results.items():
            if result["score"] is None:
                raise DataError(
                    f"validation: '{task}' has no {result['metric']} over the {result['samples']} samples chosen; "
                    f"raise validation.limit, or leave the task out."
                )
        return {task: result["score"] for task, result in results.items()}

    return validate


def best_device() -> str:
    """The accelerator of this process, or the CPU."""
    from accelerate import PartialState

    return str(PartialState().device)


def export(source: str | Path, directory: str | Path, to: Literal["transformers", "lavis"], **towers: Any) -> list[str]:
    """Write an adapter in the form of others.

    Args:
        source: whatever `load` takes.
        directory: where it goes: a whole model (transformers), or `adapter.pth` in it (lavis), which takes no tower.
        to: the form.
        towers: `vision`, `language` and `instruction_tokenizer` for `load`, where they are needed and are elsewhere.

    Returns:
        What was written, and what the other library will do otherwise, in sentences.

    Raises:
        ConfigError: the other form cannot express the adapter; says why.
    """
    directory = Path(directory)
    if to == "transformers":
        return [str(directory), *loading.load(source, **towers).export_transformers(directory)]
    if to != "lavis":
        raise ConfigError(f"export: '{to}' is not known; it takes 'transformers' or 'lavis'.")
    tensors, size, projection, eps = loading.read_adapter(source)
    file = directory / LAVIS_FILE
    return [str(file), *to_lavis(tensors, size, projection, eps, file)]


def run_directory(source: Path) -> Path:
    """The run that an adapter belongs to: three folders up from `runs/NAME/checkpoints/step-N`, else itself."""
    return source.parent.parent if source.parent.name == "checkpoints" else source
