"""Answers of an evaluation that is not done yet, on disk as they come: a kill loses a batch, no more.

While an evaluation runs there is, under its directory of scores, `.unfinished/TASK-ID/` with a file for each process
and a line for each answer.  ID is a hash of everything that answers depend on but the questions; a line names its
question by a hash of its own.  So what another model or another decoding answered is never taken, and what this one
answered is found again whatever number of processes there were.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qformer.errors import DataError
from qformer.evaluate.outcome import Answer
from qformer.evaluate.recipe import recipe_id
from qformer.processes import ALONE, Processes

FOLDER = ".unfinished"


class Unfinished:
    """The kept answers of one task."""

    def __init__(self, directory: Path, name: str, asked: Mapping[str, Any], process: int = 0):
        self.folder = directory / FOLDER / f"{name}-{recipe_id(asked)}"
        self.file = self.folder / f"{process}.jsonl"
        self.found: dict[str, dict[str, Any]] = {}

    def take_up(self, processes: Processes = ALONE) -> int:
        """Go on with what earlier evaluations left, on the disks of all machines; how many answers there are."""
        for file in sorted(self.folder.glob("*.jsonl")):
            whole = whole_lines(file)
            if file == self.file:
                with file.open("r+b") as stream:
                    stream.truncate(len(whole))  # a line that a kill cut short would swallow the next one
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line that something else spoilt
                    entry = json.loads(line)
                    self.found[entry["question"]] = entry
        everywhere = set.intersection(*processes.gathered([set(self.found)]))
        lacking = {name: entry for name, entry in self.found.items() if name not in everywhere}
        for found in processes.gathered([lacking]):  # on one disk none is
            self.found |= found
        return len(self.found)

    def kept(self, question: str, candidates: Sequence[str]) -> Answer | None:
        """The answer to a question, with its candidates, if there is one."""
        entry = self.found.get(question)
        if entry is None:
            return None
        places = entry.get("places", range(len(entry["likelihoods"])))
        chosen = tuple(candidates[place] for place in places)
        return Answer(entry["text"], chosen, tuple(entry["likelihoods"]), entry["cut"])

    def add(self, questions: Sequence[str], candidates: Sequence[Sequence[str]], answers: Sequence[Answer]) -> None:
        """Write a batch of answers at once.

        Raises:
            DataError: they cannot be written.
        """
        lines = []
        for question, choices, answer in zip(questions, candidates, answers, strict=True):
            entry: dict[str, Any] = {
                "question": question,
                "text": answer.text,
                "likelihoods": list(answer.likelihoods),
                "cut": answer.cut,
            }
            if len(answer.candidates) < len(choices):
                places = _places(tuple(choices))
                entry["places"] = [places[candidate] for candidate in answer.candidates]
            lines.append(json.dumps(entry, ensure_ascii=True) + "\n")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as stream:
                stream.write("".join(lines).encode())
        except OSError as error:
            raise DataError(
                f"{self.file}: answers cannot be kept ({error}); make room, or name another place."
            ) from None


@functools.lru_cache(8)
def _places(choices: tuple[str, ...]) -> dict[str, int]:
    """The first place of each candidate."""
    return {candidate: place for place, candidate in reversed(list(enumerate(choices)))}


def forget(directory: Path, name: str) -> None:
    """Remove all answers that are kept of a task, of other models too: its score is whole now."""
    parent = directory / FOLDER
    with suppress(OSError):  # it holds those of other tasks, or another process was faster, at any of these lines
        for folder in list(parent.iterdir()):
            if folder.name.startswith(f"{name}-") and folder.name.removeprefix(f"{name}-").isalnum():
                shutil.rmtree(folder, ignore_errors=True)
        parent.rmdir()


def whole_lines(file: Path) -> bytes:
    """A file up to its last end of line."""
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1]
