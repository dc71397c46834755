"""What `qformer data` does: looks through a data root and says what is missing, and puts annotations into the index."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qformer import config
from qformer.cards import Download, TaskCard
from qformer.config import DataConfig
from qformer.data.check import Found, Section, Track, check, chosen, indexed, sections_of
from qformer.data.index import Index
from qformer.errors import ConfigError, DataError

Say = Callable[[str], None]
SHOWN = 5
"""Broken records or pictures of a set that are told one by one."""


def look_through(
    root: Path, tasks: Sequence[str], console: Console, *, every: bool = False, seed: int = 0, index: str | None = None
) -> int:
    """Print what is there of each card and what is to be done; 0, or 1 where something is missing or broken."""
    kept = Index(root, index)
    with _bars(console) as track:
        all_found = [
            check(card, root, kept, every=every, seed=seed, max_pixels=DataConfig().max_pixels, track=track)
            for card in chosen(tasks)
        ]
    console.print(_table(all_found, root))
    for found in all_found:
        console.print(_page(found), soft_wrap=True, end="")
    console.print(f"\n{_summary(all_found, root)}", soft_wrap=True, markup=False)
    return 0 if all(found.sound for found in all_found) else 1


def put_into_index(
    root: Path | None, tasks: Sequence[str], settings: str | None, changes: Sequence[str], index: str | None, say: Say
) -> int:
    """Index what a config names, or cards, or all cards whose files are there; 0, or 1 where something is missing."""
    wanted: list[tuple[TaskCard, str]]
    if settings is not None:
        if tasks:
            raise ConfigError("data index: give a config or --tasks, not both.")
        run = config.load(settings, changes)
        root, index = root or Path(run.data.root), index or run.data.index
        wanted = [(card, "train") for card in chosen(list(run.data.tasks))] if run.data.tasks else []
        wanted += [(card, "eval") for card in chosen(run.evaluate.tasks)] if run.evaluate.tasks else []
    else:
        wanted = [(card, name) for card in chosen(tasks) for name, _ in sections_of(card)]
    root = root or Path()
    if not root.is_dir():
        raise DataError(f"data.root is '{root}', and there is no such folder; `qformer data check` says what it takes.")
    kept = Index(root, index, always=True)
    done, missing = 0, 0
    for card, name in wanted:
        section = dict(sections_of(card)).get(name)
        if section is None:
            raise ConfigError(f"the card '{card.key}' has no '{name}' section.")
        began = time.perf_counter()
        try:
            rows = indexed(card, name, section, root, kept)
        except DataError as error:
            missing += 1
            say(str(error))
            continue
        done += 1
        where = rows.source if isinstance(rows.source, Path) else "held by the hub's client"
        broken = f", {len(rows.broken):,} of them broken" if rows.broken else ""
        say(f"{card.key} {name}: {len(rows):,} records{broken}, {time.perf_counter() - began:.1f} s, {where}")
    if missing:
        say(f"{missing} not indexed; `qformer data check --data {root}` says what is missing and where it belongs.")
    named = bool(tasks) or settings is not None
    return 1 if missing and (named or not done) else 0


def _table(all_found: Sequence[Found], root: Path) -> Table:
    shown = Table(title=f"data sets under {root}", title_justify="left")
    for column in ("card", "files", "train records", "eval records", "pictures", "to download"):
        shown.add_column(column, justify="left" if column == "card" else "right", no_wrap=True)
    for found in all_found:
        sections = {section.name: section for section in found.sections}
        looked = sum(section.looked for section in found.sections)
        bad = sum(len(section.pictures) for section in found.sections)
        size = sum(each.gigabytes for each in found.downloads)
        shown.add_row(
            found.card.key,
            f"{len(found.files) - len(found.missing)} of {len(found.files)}",
            _records(sections.get("train")),
            _records(sections.get("eval")),
            f"{looked - bad:,} of {looked:,}" if looked else "–",
            f"{size:,.1f} GB" if found.downloads else "–",
        )
    return shown


def _records(section: Section | None) -> str:
    if section is None:
        return "–"
    if section.error is not None:
        return "cannot be read"
    return "not there" if section.records is None else f"{section.records:,}"


def _page(found: Found) -> Text:
    """A card in full: its files, its records and pictures, and what brings the files that are missing."""
    card, page = found.card, Text()
    page.append(f"\n{card.key}", style="bold")
    page.append(f"  {card.title or card.name} ({card.role.replace('_', '-')})\n")
    page.append(f"  Licence: {card.licence or 'the card does not say'}.\n")
    for file in found.files:
        mark, style = ("there  ", "green") if file.there else ("missing", "red")
        if file.elsewhere and not file.there:
            mark, style = "hub    ", "yellow"
        page.append(f"  {mark}  ", style=style)
        page.append(f"{file.path}  ({file.role})\n")
    for section in found.sections:
        for line in _section(section):
            page.append(f"  {line}\n")
    if found.lacking:
        page.append("  To do: ", style="bold")
        page.append(_to_do(found) + "\n")
    for each in found.downloads:
        page.append(f"    {each.what}, from {each.source}: into {found.root / each.into} ({each.gigabytes:g} GB)\n")
    return page


def _to_do(found: Found) -> str:
    if not found.downloads:
        source = f" They come from {found.card.source}." if found.card.source else ""
        return f"put the missing files where they are named above.{source}"
    size = sum(each.gigabytes for each in found.downloads)
    return f"download {_count(len(found.downloads), 'file')}, {size:,.1f} GB on disk:"


def _section(section: Section) -> Iterator[str]:
    """What is to be said of a section's records and pictures."""
    if section.error is not None:
        yield f"{section.name}: {section.error}"
        return
    if section.records is None:
        yield f"{section.name}: no record was read, since its files are not all there."
        return
    published = f", {section.published:,} published" if section.published else ""
    pictures = "none of its pictures was looked at"
    if section.unlooked:
        pictures = f"no picture was opened, since {section.unlooked}"
    elif section.looked:
        pictures = f"{section.looked - len(section.pictures):,} of {_count(section.looked, 'picture')} could be opened"
    yield f"{section.name}: {_count(section.records, 'record')}{published}; {pictures}."
    for what, problems in (("record", section.broken), ("picture", section.pictures)):
        for problem in problems[:SHOWN]:
            yield f"  {problem}"
        if len(problems) > SHOWN:
            yield f"  and {_count(len(problems) - SHOWN, f'more broken {what}')}."


def _summary(all_found: Sequence[Found], root: Path) -> str:
    """What is left to do for all cards together; a download that several cards share counts once."""
    lacking = [found for found in all_found if found.lacking]
    broken = [found.card.key for found in all_found if not found.lacking and not found.sound]
    lines = []
    if lacking:
        downloads: dict[tuple[str, str], Download] = {
            (each.what, each.into): each for found in lacking for each in found.downloads
        }
        needed = sum(each.gigabytes for each in downloads.values())
        there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free / 1e9
        lines.append(
            f"Of {_count(len(all_found), 'card')} {len(lacking)} lack files. To get them: "
            f"{_count(len(downloads), 'download')}, {needed:,.1f} GB on disk, shared ones counted once; "
            f"{free:,.1f} GB are free at {there}{'' if free > needed else ', which is too little'}."
        )
        if not root.is_dir():
            lines.append(f"There is no folder {root}: make it, or name another with --data.")
        lines.append(
            "Unpack archives where they are to go; one of pictures may stay packed, as coco/train2014.zip in the place "
            "of coco/train2014. Then run the same command again."
        )
    if broken:
        lines.append(f"Broken records or pictures: {', '.join(broken)}.")
    return "\n".join(lines) or f"All files of {_count(len(all_found), 'card')} are there."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@contextmanager
def _bars(console: Console) -> Iterator[Track]:
    """A bar for each set that is looked through, gone when all are; none where nobody is looking."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def track(what: str, total: int) -> Callable[[int], None]:
            bar = progress.add_task(what, total=total)
            return lambda count: progress.update(bar, advance=count)

        yield track
