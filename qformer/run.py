"""What the commands do, as functions: tune, score, ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qformer import cards, config, loading, vlm
from qformer.config import RunConfig
from qformer.errors import ConfigError, DataError
from qformer.exporting import LAVIS_FILE, to_lavis
from qformer.report import write_report

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
    run = train(settings, validate=_validation(settings, quiet), say=say, quiet=quiet)
    if not _is_first_process():
        return run
    if settings.evaluate.tasks:
        score_as_set(settings, run, say=say, quiet=quiet)
    else:
        say(f"report: {write_report(run)}")
    return run


def score_as_set(
    settings: RunConfig, source: str | Path, *, say: Callable[[str], None] = print, quiet: bool = False, **places: Any
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
    seed: int = 0,
    on_error: Literal["fail", "skip"] = "fail",
    index: str | None = None,
    output: str | Path | None = None,
    vision: str | None = None,
    language: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score an adapter, with its baselines and intervals, on the `eval` sections of cards.

    A run directory gets a new report too, even where scoring fails.

    Args:
        source: a saved adapter, a run directory, or a loaded model.
        tasks: card names (`name`, `name:variant`, a YAML file), "held_in" or "held_out".
        data: the folder the cards' paths start from.
        limit: a seeded subset of this many samples per set; the score is marked as partial.
        index: where annotations are kept once they were read, as `data.index`.
        output: where predictions and scores go; by default `eval/` in the run directory.
        device: where the model is put; by default the accelerator, if there is one.

    Returns:
        By card: score, interval, baselines, recipe id; the same that `eval/TASK.json` holds.
    """
    from qformer.evaluate.run import check
    from qformer.evaluate.run import score as score_cards

    chosen = cards.load_all(tasks, "eval")
    if not chosen:
        raise ConfigError("no task to score; name cards, or 'held_in' or 'held_out'.")
    check(chosen, Path(data))
    if output is None:
        if isinstance(source, vlm.VLM):
            raise ConfigError("score: a loaded model has no directory of its own; give output.")
        output = run_directory(Path(source)) / "eval"
    if isinstance(source, vlm.VLM):
        model, run = source, None
    else:
        device = device or best_device()
        model = loading.load(source, vision=vision, language=language, device=device, report=say)
        run = run_directory(Path(source))
    try:
        return score_cards(
            model,
            chosen,
            Path(data),
            limit=limit,
            batch_size=batch_size,
            shuffled=shuffled,
            seed=seed,
            directory=Path(output),
            on_error=on_error,
            index=index,
            say=say,
            quiet=quiet,
        )
    finally:
        if run is not None and (run / METRICS_FILE).exists() and Path(output) == run / "eval":
            say(f"report: {write_report(run)}")


def _validation(settings: RunConfig, quiet: bool) -> Callable[[vlm.VLM, int], dict[str, float]] | None:
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
            say=lambda _: None,
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
        towers: `vision` and `language` for `load`, where the towers are needed and are elsewhere.

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


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
