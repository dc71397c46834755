"""Tar shards of pictures with their captions, as img2dataset and WebDataset write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from qformer.data.pictures import Span, tar_members
from qformer.data.records import Records, Settings
from qformer.data.values import text
from qformer.errors import DataError
from qformer.sample import Sample

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
LONGEST = 1 << 20
"""Bytes of a caption's file beyond which it is refused."""


class Shards(Records):
    """A folder of tar archives in which `NAME.jpg` stands beside `NAME.txt` or `NAME.json`; nothing is unpacked.

    Option `caption`: `txt`, where the file is the caption, or `json`, where its field `caption` is.
    """

    name = "shards"
    roles = ("shards",)
    settings: ClassVar[Settings] = {"caption": "txt"}

    def _read(self) -> Iterator[tuple[Any, Any]]:
        kind = self.option("caption", ("txt", "json"))
        shards = sorted(self.file.glob("*.tar")) if self.file.is_dir() else [self.file]
        if not shards:
            raise DataError(f"{self.file}: there is no tar archive in it.")
        for shard in shards:
            try:
                yield from self._shard(shard, kind)
            except DataError as error:
                raise DataError(f"{error}.") from None

    def _shard(self, shard: Path, kind: str) -> Iterator[tuple[Any, Any]]:
        pictures: dict[str, tuple[str, int, int]] = {}
        captions: dict[str, Span] = {}
        members = dict(tar_members(shard))
        tar_members.cache_clear()  # of thousands of shards none is needed again
        for name, (start, size) in members.items():
            path = PurePosixPath(name)
            key = str(path.with_name(path.name.partition(".")[0]))
            if path.suffix.lower() in PICTURES:
                pictures[key] = (name, start, size)
            elif path.suffix == f".{kind}":
                captions[key] = Span(shard, name, start, size)
        for key, (name, start, size) in pictures.items():
            place = {"shard": shard.name, "name": name, "start": start, "size": size}
            yield f"{shard.stem}/{key}", place | {"caption": _caption(captions.get(key), kind)}

    def _sample(self, key: Any, row: Any) -> Sample:
        if row["start"] < 0:
            raise DataError(
                f"'{row['name']}' in {row['shard']} is a link, and is not followed; pack the picture itself"
            )
        shard = self.file / row["shard"] if self.file.is_dir() else self.file
        picture = Span(shard, row["name"], row["start"], row["size"])
        caption = text(row["caption"], "its caption")
        return Sample(self.id(key), self.task, (picture,), {"image_id": key}, references=(caption,))

    def looks_at(self, key: Any, row: Any) -> Any:
        """As `Records.looks_at`: each caption stands beside a picture of its own."""
        return key


def _caption(found: Span | None, kind: str) -> Any:
    """What a caption's file says; null where it says nothing that can be read, so that its record is named later."""
    if found is None or found.start < 0 or found.size > LONGEST:
        return None
    try:
        content = found.read().decode("utf-8-sig")
        return content if kind == "txt" else json.loads(content)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
