"""What an evaluation harness asks, in this package's terms: prompts, pictures, decoding, losses.

Nothing of a harness is imported here, so that all of it is tried where none is installed; `qformer.lmms` is what
lmms-eval finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from qformer import config
from qformer.assemble import Item, Pixels
from qformer.cards import Decoding
from qformer.errors import ConfigError, DataError
from qformer.sample import Row, row_length
from qformer.text import IMAGE_MARK, Joiner, Rendered
from qformer.vlm import VLM

NEW_TOKENS = 1024
"""Written at most where a task sets no limit: what lmms-eval's own InstructBLIP takes."""
TAKEN = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
"""Settings that mean here what they mean there."""
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
STOPS = ("until", "stop_sequences", "stop")
WITHOUT_EFFECT = {
    "best_of": 1, "diversity_penalty": 0, "min_p": 0, "n": 1, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_return_sequences": 1, "penalty_alpha": 0, "typical_p": 1, "frequency_penalty": 0, "presence_penalty": 0,
}  # fmt: skip
"""Settings that would change what is written, and the values at which they do not: others are refused."""


# -- translation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request; its document is opened when its turn comes."""

    where: str
    """Task, split and document: what messages say, and what tells prompts apart."""
    context: str
    wish: Any
    """Of an answer the settings, of a likelihood the continuation or what makes it of the document."""
    document: Callable[[], Any] | None = None
    look: Callable[[Any], Any] | None = None
    """Gives the document's pictures."""

    def pictures(self) -> tuple[Any, ...]:
        """The pictures it is asked about, none where there is no document.

        Raises:
            DataError: something among them is no picture.
        """
        if self.document is None or self.look is None:
            return ()
        return pictures(self.look(self.document()), self.where)

    def continuation(self) -> str:
        """The text whose likelihood is asked for.

        Raises:
            DataError: it is no text.
        """
        found = self.wish(self.document()) if callable(self.wish) and self.document is not None else self.wish
        if not isinstance(found, str):
            raise DataError(
                f"{self.where}: its target is a {type(found).__name__} ({found!r}), and a likelihood is of a text; let "
                f"the task's doc_to_target give the words."
            )
        return found


def asked(arguments: Sequence[Any], documents: Mapping[str, Any]) -> Asked:
    """A request of lmms-eval's simple interface.

    Args:
        arguments: (context, wish, doc_to_visual, doc_id, task, split); or (context, continuation), which asks for a
            likelihood without any document.
        documents: by task, split and doc_id.

    Raises:
        DataError: the context is no text.
    """
    context, wish, *rest = arguments
    if not rest:
        made = Asked("a request without a document", context, wish)
    else:
        look, number, task, split = rest
        made = Asked(f"{task}: {split} {number}", context, wish, lambda: documents[task][split][number], look)
    if not isinstance(context, str):
        raise DataError(
            f"{made.where}: its prompt is a {type(context).__name__}; let the task's doc_to_text give one text."
        )
    return made


def pictures(found: Any, where: str) -> tuple[Any, ...]:
    """What doc_to_visual gives, in order: a picture, any nesting of lists of them, or nothing.

    Raises:
        DataError: something among it is no picture.
    """
    if found is None:
        return ()
    if isinstance(found, list | tuple):
        return tuple(picture for each in found for picture in pictures(each, where))
    if not isinstance(found, Image | str | Path | bytes):
        raise DataError(
            f"{where}: doc_to_visual gives a {type(found).__name__}; qformer takes PIL images, paths and the bytes of "
            f"picture files."
        )
    return (found,)


def instruction(context: str, count: int) -> str:
    """A prompt for so many pictures: its `<image>` marks stay if they are as many, otherwise they go."""
    return context if context.count(IMAGE_MARK) in (0, count) else context.replace(IMAGE_MARK, "")


@dataclass(frozen=True)
class Writing:
    """How an answer is written."""

    decoding: Decoding
    stops: tuple[str, ...] = ()
    """Texts that end an answer and are no part of it."""
    unknown: tuple[str, ...] = ()
    """Names of settings that mean nothing here."""


def writing(given: Mapping[str, Any], where: str) -> Writing:
    """A task's generation_kwargs; null is no setting.

    A temperature decides whether words are drawn, as in lmms-eval's own models, unless do_sample is false.

    Raises:
        ConfigError: a value out of range, or a setting that would change the answer and that is not to be had.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values = {"max_new_tokens": NEW_TOKENS, **{name: given[name] for name in TAKEN if name in given}}
    for name, neutral in WITHOUT_EFFECT.items():
        if name in given and given[name] != neutral:
            raise ConfigError(
                f"{where}: generation_kwargs.{name} is {given[name]!r}, which qformer does not do; take it out of the "
                f"task, or give --gen_kwargs {name}={neutral}."
            )
    if _draws(given, where):
        values["do_sample"] = True
        values |= {name: float(given[name]) for name in ("temperature", "top_p") if name in given}
    stops = tuple(stop for name in STOPS for stop in _texts(given.get(name, ()), f"{where}: generation_kwargs.{name}"))
    known = {*TAKEN, *SAMPLING, *STOPS, *WITHOUT_EFFECT}
    decoding = config.structured(Decoding, [(f"{where}: generation_kwargs", values)])
    return Writing(decoding, stops, tuple(sorted(set(given) - known)))


def _draws(given: Mapping[str, Any], where: str) -> bool:
    for name in ("temperature", "top_p", "top_k"):
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int | float)):
            raise ConfigError(f"{where}: generation_kwargs.{name} is {given[name]!r}; it takes a number.")
    asks = given.get("do_sample")
    draws = given["temperature"] > 0 if "temperature" in given else bool(asks)
    if asks is False or not draws or given.get("top_k") == 1:  # the likeliest word of one is no draw
        return False
    if given.get("top_k", 0) > 0:
        raise ConfigError(
            f"{where}: generation_kwargs.top_k is {given['top_k']}, and qformer draws from all words or from top_p of "
            f"them; give --gen_kwargs top_k=0."
        )
    return True


def _texts(given: Any, where: str) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where} is {given!r}; it takes a text or a list of texts.")
    return [text for text in texts if text]


def stopped(answer: str, stops: Sequence[str]) -> str:
    """An answer up to the first stop in it."""
    for stop in stops:
        answer = answer.split(stop)[0]
    return answer.strip()


def batches(kinds: Sequence[Hashable], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of requests that go together: of one kind, of like length, the longest first."""
    order = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    numbers = sorted(range(len(kinds)), key=lambda number: (order[kinds[number]], -lengths[number]))
    part: list[int] = []
    for number in numbers:
        if part and (len(part) == size or kinds[number] != kinds[part[0]]):
            yield part
            part = []
        part.append(number)
    if part:
        yield part


# -- answering --------------------------------------------------------------------------------------------------------


class Answerer:
    """Answers requests in batches; says once what it leaves out."""

    def __init__(self, vlm: VLM, batch_size: int, once: Callable[[str, str], None]):
        """`once` is given what a message is about, and the message."""
        self.vlm, self.batch_size, self.once = vlm, batch_size, once
        self.assembler = vlm.eval().assembler(training=False)
        self.queries = vlm.connector.size.queries

    @torch.inference_mode()
    def generate(self, requests: Sequence[Asked], done: Callable[[int], Any] = bool) -> list[str]:
        """One answer per request; `done` is told how many more are there.

        Raises:
            ConfigError: a setting that is not to be had.
            DataError: a picture cannot be opened, or a prompt is too long for the LLM.
        """
        wanted = [writing(each.wish or {}, each.where) for each in requests]
        for name in sorted({name for each in wanted for name in each.unknown}):
            self.once(name, f"generation_kwargs.{name} means nothing to qformer and is left out.")
        answers = [""] * len(requests)
        with self._counting_cuts():
            lengths = [len(each.context) for each in requests]
            for numbers in batches([each.decoding for each in wanted], lengths, self.batch_size):
                decoding = wanted[numbers[0]].decoding
                for places, soft, rows in self._read([requests[number] for number in numbers]):
                    settings = dataclasses.asdict(self._fitted(decoding, rows))
                    for place, text in zip(places, self.vlm.language.generate(soft, rows, **settings), strict=True):
                        answers[numbers[place]] = stopped(text, wanted[numbers[place]].stops)
                done(len(numbers))
        return answers

    @torch.inference_mode()
    def losses(
        self,
        requests: Sequence[Asked],
        normalize: str = "mean",
        end: bool = True,
        done: Callable[[int], Any] = bool,
    ) -> list[tuple[float, bool]]:
        """Minus log-likelihoods of continuations, and whether greedy decoding writes them.

        Lower is better: lmms-eval's scorer takes the choice of the least value, since its own models give their loss.
        Requests about one prompt are scored together.

        Args:
            requests: with continuations as their wishes.
            normalize: as in `VLM.rank`; "mean" is what a model's own loss is.
            end: whether the end mark is part of a continuation.
            done: is told how many more are there.

        Raises:
            ConfigError: an unknown `normalize`, or "pmi" without a picture.
            DataError: a picture cannot be opened, a continuation is no text, or a row is too long for the LLM.
        """
        prompts: dict[tuple[str, str], list[int]] = {}
        for number, each in enumerate(requests):
            prompts.setdefault((each.where, each.context), []).append(number)
        members = list(prompts.values())
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        lengths = [len(context) for _, context in prompts]
        with self._counting_cuts():
            for numbers in batches([None] * len(members), lengths, self.batch_size):
                part = [members[number] for number in numbers]
                choices = [[requests[each].continuation() for each in group] for group in part]
                for places, soft, rows in self._read([requests[group[0]] for group in part]):
                    if normalize == "pmi" and not len(soft):
                        raise ConfigError(
                            f"{requests[part[places[0]][0]].where}: normalize=pmi compares an answer with and without "
                            f"the picture, and there is none; use normalize=mean or sum."
                        )
                    mine = [choices[place] for place in places]
                    scores = self.vlm.language.rank(soft, rows, mine, normalize=normalize, end=end)
                    greedy = self._greedy(soft, rows, mine, end)
                    for place, values, flags in zip(places, scores, greedy, strict=True):
                        for number, value, flag in zip(part[place], values, flags, strict=True):
                            found[number] = (-value, flag)
                done(sum(map(len, part)))
        return found

    def _read(self, requests: Sequence[Asked]) -> Iterator[tuple[list[int], Tensor, list[Row]]]:
        """Places of requests, soft tokens and prompts: first of those with pictures, then of those without, which are
        put to the LLM alone.
        """
        pixels: Pixels = {}
        prepared = []
        for each in requests:
            seen = each.pictures()
            words = instruction(each.context, len(seen))
            if words != each.context:
                self.once(
                    IMAGE_MARK,
                    f"{each.where} has {each.context.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(seen)} pictures: "
                    f"such marks are left out, and the pictures stand in front.",
                )
            prepared.append(self.assembler.prepare(Item(each.where, seen, Rendered(words)), pixels, answered=False))
        seeing = [place for place, each in enumerate(prepared) if each.pictures]
        if seeing:
            batch = self.assembler.batch([prepared[place] for place in seeing], pixels)
            soft, rows = self.vlm.seen(batch)
            yield seeing, soft, list(rows)
        blind = [place for place, each in enumerate(prepared) if not each.pictures]
        if blind:
            nothing = torch.zeros(0, self.queries, self.vlm.language.width, device=self.vlm.device)
            yield blind, nothing, [prepared[place].row for place in blind]

    def _fitted(self, decoding: Decoding, rows: Sequence[Row]) -> Decoding:
        """As much as the LLM has room for; tasks ask for 49,152 tokens."""
        language = self.vlm.language
        if language.positions is None:
            return decoding
        if language.is_encoder_decoder:
            taken = 1 + len(language.profile.decoder_opening)
        else:
            taken = max(row_length(row, self.queries) for row in rows)
        room = language.positions - taken
        if not 1 <= room < decoding.max_new_tokens:
            return decoding
        self.once(
            "max_new_tokens",
            f"a task asks for up to {decoding.max_new_tokens} new tokens, and the LLM has {language.positions} "
            f"positions: such answers end where these do.",
        )
        return dataclasses.replace(decoding, max_new_tokens=room, min_new_tokens=min(decoding.min_new_tokens, room))

    def _greedy(
        self, soft: Tensor, rows: Sequence[Row], choices: Sequence[Sequence[str]], end: bool
    ) -> list[list[bool]]:
        """Whether greedy decoding behind each row writes each of its choices."""
        language = self.vlm.language
        joiner = Joiner(language.tokenizer, language.profile, None)  # with a count of cuts of its own
        surplus = len(language.profile.end) - 1  # nothing is written behind the first end mark
        ids = [
            [joiner.target_ids(text)[: -surplus or None] if end else joiner.answer_ids(text) for text in texts]
            for texts in choices
        ]
        longest = max(len(each) for texts in ids for each in texts)
        written = language.write(soft, rows, max_new_tokens=longest, min_new_tokens=0).tolist()
        return [[tuple(row[: len(each)]) == each for each in texts] for row, texts in zip(written, ids, strict=True)]

    @contextmanager
    def _counting_cuts(self) -> Iterator[None]:
        """Says so where texts were cut meanwhile."""
        counted = self.vlm.language.truncations
        before = counted.texts
        yield
        if counted.texts > before:
            self.once(
                "cuts",
                f"{counted.texts - before} text(s) were cut to their limits (language.instruction_limit, "
                f"language.target_limit, qformer.instruction_limit).",
            )
