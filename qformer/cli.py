"""The command line.  Heavy imports wait until a command needs them, so that help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from qformer import __version__
from qformer.errors import QFormerError

INTERRUPTED = 130
TRAINING = ("train", "demo", "plug")
"""Commands that leave checkpoints to go on from."""
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
    command.add_argument("--output", default="runs/demo", help="the run directory (runs/demo)")
    command.add_argument("--steps", type=int, help="training steps, instead of the demo's own number")
    command.add_argument("--limit", type=int, help="score this many questions a set; scores are marked as partial")
    command.add_argument("--seed", type=int, default=0, help="of scenes, order and start")

    command = commands.add_parser("train", help="tune a Q-Former as a config says; goes on where it stopped")
    command.add_argument("config", help="a shipped config's name or a YAML file")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")

    command = commands.add_parser("eval", help="score a run or a saved adapter, with baselines and intervals")
    command.add_argument("source", help="a run directory or a saved adapter")
    command.add_argument("--tasks", required=True, help="cards, comma-separated; also held_in, held_out")
    command.add_argument("--data", required=True, help="the folder the cards' paths start from")
    command.add_argument("--limit", type=int, help="score a seeded subset of this many samples; marked as partial")
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--no-shuffled", action="store_true", help="skip the baseline with shuffled pictures")
    command.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what a broken record does")
    command.add_argument("--output", help="where scores go (default: eval/ in the run directory)")
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")
    command.add_argument("--device", help="cpu, cuda, cuda:1 … (the accelerator, if there is one)")

    command = commands.add_parser("ask", help="one picture, one instruction, one answer")
    command.add_argument("source", help="a run directory or a saved adapter")
    command.add_argument("picture")
    command.add_argument("instruction")
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--beams", type=int, default=1)
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")
    command.add_argument("--device", help="cpu, cuda, cuda:1 … (the accelerator, if there is one)")

    command = commands.add_parser("render", help="what the model would be shown, and which tokens are trained on")
    command.add_argument("config", help="a shipped config's name or a YAML file")
    command.add_argument("changes", nargs="*", metavar="key=value", help="settings to change")
    command.add_argument("-n", type=int, default=5, dest="count", help="how many samples")
    command.add_argument("--ids", action="store_true", help="every token with its id")

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
    command.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="key=value", help="settings to change"
    )

    command = commands.add_parser("export", help="write an adapter in the form of transformers or LAVIS")
    command.add_argument("source", help="a run, a saved adapter, a published model, or a .pth file of LAVIS")
    command.add_argument("directory", help="where it goes")
    command.add_argument("--to", required=True, choices=("transformers", "lavis"))
    command.add_argument("--vision", help="where the image encoder is now, if it moved")
    command.add_argument("--language", help="where the LLM is now, if it moved")

    command = commands.add_parser("tasks", help="the cards: role, size, reader, prompt, metric, p_d")
    command.add_argument("name", nargs="?", help="one card, whole")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a failure, 2 wrong usage, 130 interrupted."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    with _watching_for_ctrl_c() as interrupted:
        try:
            return int(COMMANDS[options.command](options) or 0)
        except (Exception, KeyboardInterrupt) as error:
            # A library that is being imported may turn the interruption into an error of its own.
            if interrupted() or isinstance(error, KeyboardInterrupt):
                goes_on = "; the last checkpoint is whole, the same command goes on from it"
                print(f"qformer: interrupted{goes_on if options.command in TRAINING else ''}.", file=sys.stderr)
                return INTERRUPTED
            if isinstance(error, BrokenPipeError):
                return 0
            if not isinstance(error, QFormerError):
                raise
            print(f"qformer: {error}", file=sys.stderr)
            return error.exit_code


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

    demo(output=options.output, seed=options.seed, steps=options.steps, limit=options.limit, say=_say)


def _train(options: argparse.Namespace) -> None:
    from qformer.run import fit

    fit(options.config, options.changes, say=_say)


def _eval(options: argparse.Namespace) -> None:
    from qformer.config import EvaluateConfig

    EvaluateConfig(limit=options.limit, batch_size=options.batch_size)  # refused before any library is loaded
    from qformer.run import score

    score(
        options.source,
        options.tasks.split(","),
        options.data,
        limit=options.limit,
        batch_size=options.batch_size,
        shuffled=not options.no_shuffled,
        on_error=options.on_error,
        output=options.output,
        vision=options.vision,
        language=options.language,
        device=options.device,
        say=_say,
    )


def _ask(options: argparse.Namespace) -> None:
    from qformer.cards import Decoding

    decoding = Decoding(max_new_tokens=options.max_new_tokens, num_beams=options.beams)
    from qformer.loading import load
    from qformer.run import best_device

    device = options.device or best_device()
    model = load(options.source, vision=options.vision, language=options.language, device=device)
    [answer] = model.generate([options.picture], [options.instruction], **dataclasses.asdict(decoding))
    cut = model.language.truncations
    if cut.texts:
        sys.stderr.write(f"qformer: the instruction was cut on the left to its limit, by {cut.ids} ids in all.\n")
    _say(answer)


def _render(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qformer import config
    from qformer.render import render

    console = Console(highlight=False, soft_wrap=True)
    for block in render(config.load(options.config, options.changes), options.count, ids=options.ids):
        console.print(block)


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
        say=_say,
    )


def _export(options: argparse.Namespace) -> None:
    from qformer.run import export

    towers = {"vision": options.vision, "language": options.language}
    for line in export(options.source, options.directory, options.to, **towers):
        _say(line)


def _tasks(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qformer.listing import card_page, table

    console = Console(highlight=False, soft_wrap=bool(options.name))
    console.width = max(console.width, NARROWEST_TABLE)
    console.print(card_page(options.name) if options.name else table(), markup=False)


def _say(line: object) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(line, markup=False)


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "ask": _ask,
    "render": _render,
    "plug": _plug,
    "export": _export,
    "tasks": _tasks,
}


if __name__ == "__main__":
    sys.exit(main())
