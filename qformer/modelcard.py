"""The model card that goes with a saved adapter: its towers, what it was tuned on and how, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qformer.config import LanguageConfig, RunConfig, VisionConfig
from qformer.errors import DataError
from qformer.nn.qformer import QFormerSize


def trained(settings: RunConfig) -> dict[str, Any]:
    """What a run's settings say of data and recipe; nothing where there is no mixture."""
    if not settings.data.tasks:
        return {}
    return {
        "tasks": {Path(name).name: weight for name, weight in settings.data.tasks.items()},
        **({"variant": settings.data.variant} if settings.data.variant else {}),
        "sampling": settings.data.sampling,
        **({"per_picture": settings.data.per_picture} if settings.data.per_picture else {}),
        "steps": settings.train.steps,
        "batch_size": settings.train.batch_size,
        "rate": settings.train.rate,
        "precision": settings.train.precision,
        "seed": settings.seed,
    }


def read_scores(run: Path) -> list[dict[str, Any]]:
    """What a run directory's `eval/TASK.json` files say, by name; none where nothing was scored.

    Raises:
        DataError: one of them is not JSON.
    """
    scores = []
    for file in sorted((run / "eval").glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: cannot be read as JSON ({error}); score the run again.") from None
        if isinstance(found, dict) and isinstance(found.get("score"), int | float):
            scores.append({"task": file.stem, **found})
    return scores


def text(settings: RunConfig, size: QFormerSize, recipe: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """The card in Markdown, with the hub's front matter."""
    towers: dict[str, VisionConfig | LanguageConfig] = {
        "image encoder": settings.vision,
        "language model": settings.language,
    }
    on_hub = [tower.name for tower in towers.values() if _is_hub_id(tower.name)]
    front = ["library_name: qformer", "tags: [q-former, vision-language]"]
    front += [f"base_model: [{', '.join(on_hub)}]"] if on_hub else []
    reads = "the picture and the instruction" if size.instruction else "the picture"
    parts = [
        "\n".join(["---", *front, "---"]),
        "# Q-Former adapter",
        f"{size.queries} queries read {reads}; their outputs stand in front of the language model's words.  The towers "
        f"are named, not copied.",
        "```python\nimport qformer\n\nmodel = qformer.load(DIRECTORY_OR_HUB_ID)\n"
        'model.generate(["picture.jpg"], ["what is in the picture?"])\n```',
        "## Towers",
        _table(("tower", "name", "revision"), [(kind, t.name, t.revision or "") for kind, t in towers.items()]),
    ]
    if recipe:
        mixture = [(name, f"{weight:g}") for name, weight in recipe["tasks"].items()]
        settled = [(name.replace("_", " "), str(value)) for name, value in recipe.items() if name != "tasks"]
        parts += ["## Data", _table(("task", "weight"), mixture), "## Recipe", _table(("setting", "value"), settled)]
    head = ("set", "metric", "score", "95 %", "samples", "recipe id")
    held_in = [score.get("role") == "held_in" for score in scores]
    for heading, partial in (("## Scores", False), ("## Scores on parts of sets", True)):
        for kind, inside in (("held-out", False), ("held-in", True)):
            rows = [
                _score_row(score)
                for score, own in zip(scores, held_in, strict=True)
                if own is inside and bool(score.get("partial")) is partial
            ]
            apart = f", {kind}" if len(set(held_in)) > 1 else ""
            parts += [f"{heading}{apart}", _table(head, rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _score_row(score: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(score.get("title", score["task"])),
        str(score.get("metric", "")),
        f"{score['score']:.4f}",
        _interval(score.get("interval")),
        f"{score.get('samples', '')} of {score.get('of', '')}",
        str(score.get("recipe", "")),
    )


def _interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None or None in pair else f"{pair[0]:.4f} to {pair[1]:.4f}"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
