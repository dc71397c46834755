"""What evaluation writes, and reading it back: score files, JSON files and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qformer.errors import DataError


def score_files(directory: Path) -> list[Path]:
    """The `TASK.json` files of a directory of scores; what is for a test server stands beside them."""
    return [file for file in sorted(directory.glob("*.json")) if not file.name.endswith(".submission.json")]


def read_json(path: Path) -> dict[str, Any]:
    """The named values of a JSON file.

    Raises:
        DataError: it is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); score the run again to write it anew.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; it must hold named values.")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file; none if it is not there.  A last line cut off by a kill is left out.

    Raises:
        DataError: another line is not a JSON object.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").splitlines()
    records = []
    for place, text in enumerate(texts, start=1):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif place < len(texts):
            raise DataError(f"{path}:{place}: not a JSON object; delete the line, or the file.")
    return records


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Named values as a JSON file, in its folder, made if need be; it appears whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        raise DataError(f"{path}: it cannot be written ({error}); make room or name another place.") from None
    finally:
        if work.is_file():
            work.unlink()
