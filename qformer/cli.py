"""The command line.  Heavy imports wait until a command needs them, so that help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qformer import __version__
from qformer.errors import ConfigError, QFormerError

INTERRUPTED = 130
TRAINING = ("train", "demo", "plug")
"""Commands that go on from the last checkpoint."""
NARROWEST_TABLE = 130
"""Columns a table is given at least: it reads better cut off on the right than folded into slivers."""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="qformer", description="Instruction-aware Q-Formers between any frozen image encoder and any frozen LLM."
    )
    top.add_argument("--version", action="version", version=f"qformer {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="the whole pipeline on the embedded default, then a report")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    command.add_argument("--full", action="store_true", help="all 26 sets; takes twice as long")
    command.add_argument("--output", help="the run directory (runs/demo, or runs/demo_full)")
    command.add_argument("--steps", type=int, help="training steps, instead of the demo's own number")
    command.add_argument("--limit", type=int, help="score this many questions a set; scores are marked as partial")
    command.add_argument("--seed", type=int, default=0, help="of scenes, order and start")

    command = commands.add_parser("train", help="tune a Q-Former as a config says; goes on where it stopped")
    command.add_argument("config", help="a shipped config's name or a YAML file")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    told = "say what would be done, weights unread: settings, parameters, mixture, ten samples of each set"
    command.add_argument("--dry-run", action="store_true", help=told)

    command = commands.add_parser("eval", help="score a run or a saved adapter, or compare two scored runs")
    command.add_argument("source", nargs="+", help="a run directory or a saved adapter; two runs are compared")
    command.add_argument("--last", action="store_true", help="of a run its last checkpoint, not its best")
    told = "cards, comma-separated; also held_in, held_out; of two runs also pairs, as gqa=gqa:as_lavis"
    command.add_argument("--tasks", default="", help=told)
    command.add_argument("--data", help="the folder the cards' paths start from")
    command.add_argument("--limit", type=int, help="score a seeded subset of this many samples; marked as partial")
    command.add_argument("--seed", type=int, help="of subset, shuffling and intervals (the run's own, or 0)")
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--no-shuffled", action="store_true", help="skip the baseline with shuffled pictures")
    command.add_argument("--decoding", metavar="NAME", help="ask and decode as another code base does: lavis")
    command.add_argument("--prompt-sweep", action="store_true", help="score each listed prompt: best, median, worst")
    told = "print ours beside published scores: paper, or paper:ROW"
    command.add_argument("--against", metavar="TABLE", help=told)
    told = "compare two runs' scores though their recipes differ"
    command.add_argument("--different-recipes", action="store_true", help=told)
    command.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what a broken record does")
    command.add_argument("--index", help="where annotations are kept once they were read, as data.index")
    command.add_argument("--output", help="where scores go (default: eval/ in the run directory)")
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")
    command.add_argument("--instruction-tokenizer", help="what the Q-Former reads with, where the source lacks it")
    command.add_argument("--device", help="cpu, cuda, cuda:1 … (the accelerator, if there is one)")

    command = commands.add_parser("ask", help="one picture or video, one instruction, one answer")
    command.add_argument("source", help="a run directory or a saved adapter")
    command.add_argument("picture", help="a picture, a video, or a folder of frames")
    command.add_argument("--last", action="store_true", help="of a run its last checkpoint, not its best")
    command.add_argument("instruction")
    command.add_argument("--frames", type=int, help="frames of a video that are looked at (4)")
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--beams", type=int, default=1)
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")
    command.add_argument("--instruction-tokenizer", help="what the Q-Former reads with, where the source lacks it")
    command.add_argument("--device", help="cpu, cuda, cuda:1 … (the accelerator, if there is one)")

    command = commands.add_parser("render", help="what the model would be shown, and which tokens are trained on")
    command.add_argument("config", help="a shipped config's name or a YAML file")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    command.add_argument("-n", type=int, default=5, dest="count", help="how many samples")
    command.add_argument("--ids", action="store_true", help="every token with its id")

    command = commands.add_parser("plan", help="what a run would take: parameters, memory, time, disk; nothing loaded")
    command.add_argument("config", help="a shipped config's name or a YAML file")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    command.add_argument("--gpu", default="here", help="a known GPU, such as h200 (this machine, timed)")
    command.add_argument("--gpus", type=int, default=1, help="how many work together (1)")
    told = "share of a known GPU's peak that every part reaches, above 0 and at most 1 (by part)"
    command.add_argument("--efficiency", type=float, help=told)

    command = commands.add_parser(
        "plug", help="another LLM under the same Q-Former: new projection, short tuning, a table"
    )
    command.add_argument("source", help="a run directory, or whatever else can be loaded")
    command.add_argument("--language", required=True, help="the new LLM")
    command.add_argument("--start", choices=("mapped", "random"), default="mapped", help="of the projection (mapped)")
    command.add_argument("--warmup-steps", type=int, help="of the projection alone (a twentieth of the source's steps)")
    command.add_argument("--warmup-rate", type=float, help="(five times the source's)")
    command.add_argument("--steps", type=int, help="of joint tuning (a fifth of the source's steps)")
    command.add_argument("--rate", type=float, help="of joint tuning (the source's)")
    command.add_argument("--tasks", help="cards to score, comma-separated (the source's)")
    command.add_argument("--data", help="the folder the cards' paths start from (the source's)")
    command.add_argument("--limit", type=int, help="score a seeded subset of this many samples; marked as partial")
    command.add_argument("--without", default="", help="columns to leave out: before,warmup,tuned,fresh,source")
    command.add_argument("--output", help="the run directory (beside the source's: NAME-on-LLM)")
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--own-language", help="where the source's own LLM is now, if it moved")
    command.add_argument("--instruction-tokenizer", help="what the Q-Former reads with, where the source lacks it")
    command.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="key=value", help="settings to change"
    )

    command = commands.add_parser("export", help="write an adapter in the form of transformers or LAVIS")
    command.add_argument("source", help="a run, a saved adapter, a published model, or a .pth file of LAVIS")
    command.add_argument("directory", help="where it goes")
    command.add_argument("--last", action="store_true", help="of a run its last checkpoint, not its best")
    command.add_argument("--to", required=True, choices=("transformers", "lavis"))
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")
    command.add_argument("--instruction-tokenizer", help="what the Q-Former reads with, where the source lacks it")

    command = commands.add_parser("data", help="what of the data sets is there, and putting it into the index")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser(
        "check", help="files, records and pictures of every card; what to download, and where to"
    )
    action.add_argument("--data", default=".", help="the folder the cards' paths start from (the current one)")
    action.add_argument("--tasks", default="", help="cards, comma-separated; also held_in, held_out (all shipped ones)")
    action.add_argument("--all", action="store_true", help="open every picture, instead of a sample")
    action.add_argument("--seed", type=int, default=0, help="of the sample")
    action.add_argument("--index", help="where annotations are kept once they were read, as data.index")
    action = actions.add_parser("index", help="read annotations once, so that training starts from a memory map")
    action.add_argument(
        "config", nargs="?", help="a shipped config's name or a YAML file: what it trains and scores on"
    )
    action.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    action.add_argument("--data", help="the folder the cards' paths start from (the config's, or the current one)")
    action.add_argument(
        "--tasks", default="", help="cards, comma-separated; also held_in, held_out (all that are there)"
    )
    action.add_argument("--index", help="where the index is kept (the config's data.index, or under the data folder)")

    command = commands.add_parser("tasks", help="the cards: role, size, reader, prompt, metric, p_d")
    command.add_argument("name", nargs="?", help="one card, whole")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a failure, 2 wrong usage, 130 interrupted."""
    try:
        options = _parsed(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    with _watching_for_ctrl_c() as interrupted:
        try:
            return int(COMMANDS[options.command](options) or 0)
        except (Exception, KeyboardInterrupt) as error:
            # A library that is being imported may turn the interruption into an error of its own.
            if interrupted() or isinstance(error, KeyboardInterrupt):
                print(f"qformer: interrupted{_going_on(options)}.", file=sys.stderr)
                return INTERRUPTED
            if isinstance(error, BrokenPipeError):
                return 0
            if not isinstance(error, QFormerError):
                raise
            print(f"qformer: {error}", file=sys.stderr)
            return error.exit_code


def _going_on(options: argparse.Namespace) -> str:
    """What an interruption has left, of commands that go on where they were interrupted."""
    if options.command == "eval" and (isinstance(options.source, str) or len(options.source) == 1):  # two: compared
        return "; the answers given so far are kept, the same command goes on from them"
    if options.command in TRAINING and not getattr(options, "dry_run", False):
        return "; the last checkpoint, if there is one yet, is whole: the same command goes on from it"
    return ""


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; changes to settings may stand behind a flag too, where argparse by itself takes no more of them."""
    top = parser()
    options, left = top.parse_known_args(arguments)
    if left and (not hasattr(options, "changes") or any(each.startswith("-") for each in left)):
        top.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.changes = [*options.changes, *left]
    return options


@contextmanager
def _watching_for_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Remembers that Ctrl-C was pressed; where Python does not answer to it (nohup, a thread), nothing changes."""
    pressed = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, remember)
    try:
        yield pressed.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _demo(options: argparse.Namespace) -> None:
    from qformer.demo.run import demo

    size = {"steps": options.steps, "limit": options.limit}
    overrides = tuple(options.changes)
    demo(output=options.output, full=options.full, seed=options.seed, **size, overrides=overrides, say=_say)


def _train(options: argparse.Namespace) -> None:
    if options.dry_run:
        return _dry_run(options)
    from qformer.run import fit

    fit(options.config, options.changes, say=_say)


def _dry_run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from qformer import config
    from qformer.dryrun import dry_run

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, NARROWEST_TABLE)
    for shown in dry_run(config.load(options.config, options.changes)):
        console.print(shown, soft_wrap=not isinstance(shown, Table))


def _eval(options: argparse.Namespace) -> None:
    from qformer.config import EvaluateConfig

    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if len(options.source) > 1:
        return _compare(options, tasks)
    if not options.data:
        raise ConfigError("eval: --data is missing; name the folder that the cards' paths start from.")
    EvaluateConfig(limit=options.limit, batch_size=options.batch_size)  # refused before any library is loaded
    from qformer.run import score

    options.source = options.source[0]
    score(
        _source(options),
        tasks,
        options.data,
        limit=options.limit,
        batch_size=options.batch_size,
        shuffled=not options.no_shuffled,
        seed=options.seed,
        on_error=options.on_error,
        index=options.index,
        output=options.output,
        **_towers(options),
        device=options.device,
        decoding=options.decoding,
        prompt_sweep=options.prompt_sweep,
        against=options.against,
        say=_say,
    )


def _compare(options: argparse.Namespace, tasks: list[str]) -> None:
    if len(options.source) > 2:
        raise ConfigError(f"eval: {len(options.source)} runs are named; it scores one, or compares two.")
    if options.data:
        raise ConfigError(
            "eval: two runs are compared by the scores they have; score each alone, then leave out --data."
        )
    from qformer.run import compare

    one, other = options.source
    compare(one, other, tasks=tasks, despite=options.different_recipes, output=options.output, say=_say)


def _ask(options: argparse.Namespace) -> None:
    from qformer import config
    from qformer.cards import Decoding
    from qformer.sample import Video

    config.check_numbers("ask", options, "frames", least=1)
    decoding = Decoding(max_new_tokens=options.max_new_tokens, num_beams=options.beams)
    picture = options.picture if options.frames is None else Video(Path(options.picture), options.frames)
    from qformer.loading import load
    from qformer.run import best_device

    model = load(_source(options), **_towers(options), device=options.device or best_device())
    [answer] = model.generate([picture], [options.instruction], **dataclasses.asdict(decoding))
    cut = model.language.truncations
    if cut.texts:
        sys.stderr.write(f"qformer: the instruction was cut on the left to its limit, by {cut.ids} ids in all.\n")
    _say(answer)


def _render(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qformer import config

    config.check_numbers("render", options, "count", least=1)
    from qformer.render import render

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for block in render(config.load(options.config, options.changes), options.count, ids=options.ids):
        console.print(block)


def _plan(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from qformer import config
    from qformer.planning.plan import plan

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, NARROWEST_TABLE)
    settings = config.load(options.config, options.changes)
    for shown in plan(settings, gpu=options.gpu, gpus=options.gpus, efficiency=options.efficiency):
        console.print(shown, soft_wrap=not isinstance(shown, Table))


def _plug(options: argparse.Namespace) -> None:
    from qformer.stages import Stages, carry

    carry(
        options.source,
        options.language,
        Stages(options.start, options.warmup_steps, options.warmup_rate, options.steps, options.rate),
        tasks=options.tasks.split(",") if options.tasks else None,
        data=options.data,
        output=options.output,
        limit=options.limit,
        without=[row for row in options.without.split(",") if row],
        overrides=options.set,
        vision=options.vision,
        own_language=options.own_language,
        instruction_tokenizer=options.instruction_tokenizer,
        say=_say,
    )


def _export(options: argparse.Namespace) -> None:
    from qformer.run import export

    for line in export(_source(options), options.directory, options.to, **_towers(options)):
        _say(line)


def _tasks(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qformer.listing import card_page, table

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=bool(options.name))
    console.width = max(console.width, NARROWEST_TABLE)
    console.print(card_page(options.name) if options.name else table())


def _towers(options: argparse.Namespace) -> dict[str, Any]:
    """What is loaded with an adapter, where the command says where it is."""
    return {name: getattr(options, name) for name in ("vision", "language", "instruction_tokenizer")}


def _source(options: argparse.Namespace) -> str:
    """What is to be loaded: with --last a run's last checkpoint."""
    if not options.last:
        return str(options.source)
    from qformer.saved import last_checkpoint

    return str(last_checkpoint(options.source))


def _data(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qformer.dataroot import look_through, put_into_index

    tasks = [name for name in options.tasks.split(",") if name]
    if options.action == "index":
        root = Path(options.data) if options.data else None
        return put_into_index(root, tasks, options.config, options.changes, options.index, _say)
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, NARROWEST_TABLE)
    return look_through(Path(options.data), tasks, console, every=options.all, seed=options.seed, index=options.index)


def _say(line: object) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True, emoji=False).print(line, markup=False)


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "ask": _ask,
    "render": _render,
    "plan": _plan,
    "plug": _plug,
    "export": _export,
    "data": _data,
    "tasks": _tasks,
}


if __name__ == "__main__":
    sys.exit(main())
