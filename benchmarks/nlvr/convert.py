"""NLVR's files as the records of the `jsonl` reader: `python convert.py NLVR_FOLDER OUT`.

NLVR (Suhr et al., ACL 2017, CC BY 4.0; github.com/lil-lab/nlvr): sentences that people wrote about three boxes of
coloured shapes, true or false of the picture.  Reads `SPLIT/SPLIT.json` (one JSON object a line) and the pictures below
`SPLIT/images/`; writes `OUT/SPLIT.jsonl`, a record for each picture of a sentence that is there (up to six, with the
boxes in another order), with picture paths relative to NLVR_FOLDER.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures of a split by their sentence's identifier, in order of permutation."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.png")):
        _, scene, pair, _ = path.stem.split("-")
        found[f"{scene}-{pair}"].append(path)
    return found


def convert(root: Path, split: str) -> list[dict[str, object]]:
    """The records of a split."""
    known = pictures(root / split / "images")
    records: list[dict[str, object]] = []
    for line in (root / split / f"{split}.json").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for number, path in enumerate(known[row["identifier"]]):
            records.append(
                {
                    "id": f"{split}-{row['identifier']}-{number}",
                    "image": str(path.relative_to(root)),
                    "instruction": f"True or false: {row['sentence'].strip()}",
                    "target": row["label"],
                    "candidates": ["true", "false"],
                }
            )
    return records


def main() -> None:
    """Convert the splits that are there."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for split in ("dev", "test"):
        records = convert(root, split)
        (out / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        print(f"{out / split}.jsonl: {len(records)} records")


if __name__ == "__main__":
    main()
