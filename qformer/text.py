"""Words: templates, what is asked and answered for a sample, and how an LLM's rows are joined from token ids.

Prompt strings live in `templates/` and in the cards.  Ids are joined here piece by piece, so that no tokenizer's habits
(opening marks, end marks, truncation side) decide what the model is trained on.  No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qformer import config, keyed
from qformer.cards import EvalCard, TrainCard, check_template
from qformer.config import ProfileConfig
from qformer.errors import ConfigError, DataError, did_you_mean
from qformer.sample import Row, Sample, Slot, Text, Turn

IMAGE_MARK = "<image>"
"""Stands for the next picture inside an instruction."""


# -- templates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Templates:
    """Phrasings of one instruction; `{name}` is filled from the sample."""

    name: str
    version: int
    source: str
    templates: list[str]

    def __post_init__(self) -> None:
        for template in self.templates:
            check_template(template, "templates")


def load_templates(name: str) -> Templates:
    """A shipped templates file, or a YAML file of the same form.

    Raises:
        ConfigError: no such file, a wrong key or type, no template in it, or one that cannot be filled.
    """
    loaded = config.shipped(Templates, "templates", name, "template")
    if not loaded.templates:
        raise ConfigError(f"{name}: holds no template; give at least one under 'templates'.")
    return loaded


def lettered(options: Sequence[str]) -> str:
    """Options as the paper writes them: `(a) blue (b) yellow (c) pink`."""
    return " ".join(f"({letter(number)}) {option}" for number, option in enumerate(options))


def letter(number: int) -> str:
    """The letters a to z, then aa, ab, …"""
    letters = string.ascii_lowercase
    return (letter(number // 26 - 1) if number >= 26 else "") + letters[number % 26]


def fill(template: str, fields: Mapping[str, Any], where: str) -> str:
    """A template with its fields filled in.

    Raises:
        DataError: a field that the template names is not in the record; says which, and which there are.
    """
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    for name in wanted:
        if name not in fields:
            raise DataError(f"{where}: no field '{name}' for the template '{template}'.{did_you_mean(name, fields)}")
    return template.format_map({name: fields[name] for name in wanted})


def prefaced(preface: Sequence[str], fields: Mapping[str, Any], instruction: str) -> str:
    """An instruction behind the pieces of a preface; a piece that names an absent or empty field is left out whole."""
    pieces = []
    for piece in preface:
        wanted = [name for _, name, _, _ in string.Formatter().parse(piece) if name is not None]
        if all(fields.get(name) not in (None, "", (), []) for name in wanted):
            pieces.append(fill(piece, fields, "preface"))
    return joined(*pieces, instruction)


def joined(*pieces: str) -> str:
    """Pieces with a blank between them, but for what ends in a blank or a line break of its own."""
    given = [piece for piece in pieces if piece]
    return "".join((*(piece if piece[-1].isspace() else f"{piece} " for piece in given[:-1]), *given[-1:]))


# -- what is asked, and what is answered ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """One row in words.  `history` holds earlier turns of a dialogue, read and not trained on.

    `turns` is set instead of `target` where every answer of a dialogue is trained in one row.
    """

    instruction: str
    target: str = ""
    history: tuple[Turn, ...] = ()
    turns: tuple[Turn, ...] = ()


def render_train(card: TrainCard, templates: Templates, sample: Sample, seed: int, number: int) -> list[Rendered]:
    """The rows of a training sample in pass `number`: template and answer are functions of (seed, task, id, pass).

    Raises:
        DataError: a field that a template names is missing, or there is nothing to train on.
    """
    where = f"{sample.task}, sample '{sample.id}'"
    if sample.turns:
        turns = sample.turns
        if card.turns == "whole":
            opened = Turn(prefaced(card.preface, sample.fields, turns[0].instruction), turns[0].answer)
            return [Rendered(opened.instruction, turns=(opened, *turns[1:]))]
        return [
            Rendered(prefaced(card.preface, sample.fields, turn.instruction), turn.answer, history=turns[:place])
            for place, turn in enumerate(turns)
            if card.turns == "each" or place == len(turns) - 1
        ]
    key = (seed, sample.task, sample.id, number)
    answer = choose_answer(sample.references, card.answer, key)
    template = keyed.choose(templates.templates, *key, "template")
    fields = _fields(sample, sample.candidates, template)
    if answer is not None:
        fields["answer"] = answer
    instruction = prefaced(card.preface, fields, fill(template, fields, where))
    target = fill(card.target, fields, where)
    if not target.strip():
        raise DataError(f"{where}: the target is empty, so there is nothing to train on.")
    return [Rendered(instruction, target)]


def render_eval(card: EvalCard, templates: Templates, sample: Sample) -> Rendered:
    """What the model is asked about a sample, in the words of the card's first template.

    Raises:
        DataError: a field that the template names is missing.
    """
    if sample.turns:
        *history, last = sample.turns
        return Rendered(prefaced(card.preface, sample.fields, last.instruction), history=tuple(history))
    template = templates.templates[0]
    fields = _fields(sample, candidates_of(card, sample), template)
    filled = fill(template, fields, f"{sample.task}, sample '{sample.id}'")
    return Rendered(prefaced(card.preface, fields, filled))


def candidates_of(card: EvalCard, sample: Sample) -> tuple[str, ...]:
    """What a sample is asked to choose from: the card's candidates, or the record's where the card gives none."""
    return tuple(card.candidates) or sample.candidates


def _fields(sample: Sample, candidates: Sequence[str], template: str) -> dict[str, Any]:
    """What a template may name; options are written out only where it does, since there may be thousands."""
    options = {"options": lettered(candidates)} if "{options}" in template else {}
    return {**options, **sample.fields}


def choose_answer(
    references: Sequence[str], rule: Literal["most_frequent", "sampled", "uniform_distinct"], key: tuple[object, ...]
) -> str | None:
    """One of several reference answers: the most frequent (the first of equals), one drawn by count, or one drawn from
    the distinct ones.  Blanks count where there is nothing else.  None where there are no references.
    """
    if not references:
        return None
    said = [each for each in references if each.strip()] or references
    if rule == "most_frequent":
        return Counter(said).most_common(1)[0][0]
    return keyed.choose(said if rule == "sampled" else sorted(set(said)), *key, "answer")


# -- how an LLM is spoken to ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """How rows are joined for one LLM; data, saved with the adapter.

    A plain row is  [slots] opening prompt | separator target end  (slots behind the opening where `slots_first` is
    off).  A chat row is  head [slots] words | middle, target end between words …  with the literal texts of the chat
    template around the words, and `answer` behind the last middle.  An encoder–decoder reads  [slots] opening prompt
    closing  and writes  target end  behind its start id and `decoder_opening`.
    """

    layout: Literal["plain", "chat"]
    opening: tuple[int, ...]
    end: tuple[int, ...]
    """Ids behind a target, trained on; the first of them ends generation."""
    pad: int
    separator: str = ""
    closing: tuple[int, ...] = ()
    decoder_opening: tuple[int, ...] = ()
    """What an encoder–decoder's decoder is given behind its start id, before the target (BART's `<s>`)."""
    head: str = ""
    middle: str = ""
    between: str = ""
    answer: str = ""
    """What opens the last answer behind `middle`, read and not trained on (Qwen3's empty thought)."""
    system: str = ""
    stop: tuple[str, ...] = ()
    slots_first: bool = True
    encoder_decoder: bool = False
    instruction_limit: int = 128
    target_limit: int = 256

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Profile.from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """A profile from the values of `as_dict`, after a trip through JSON or YAML.

        Raises:
            TypeError, ValueError: the values are not those of a profile.
        """
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        made = cls(**{**values, **tuples})
        for each in dataclasses.fields(cls):
            value, inner = getattr(made, each.name), re.fullmatch(r"tuple\[(\w+), \.\.\.\]", str(each.type))
            wanted = {"int": int, "str": str, "bool": bool}.get(inner[1] if inner else str(each.type))
            items = value if inner and isinstance(value, tuple) else (value,)
            if wanted is not None and not all(type(item) is wanted for item in items):
                raise ValueError(f"profile.{each.name} is {value!r}")
        return made


@dataclass(frozen=True)
class NamedProfile:
    """A profile as a file has it: how an LLM was published to be spoken to, in words whose ids its tokenizer knows."""

    name: str
    version: int
    source: str
    layout: Literal["plain", "chat"]
    marks: list[str] = field(default_factory=list)
    """What the LLM's tokenizer must know as one id each."""
    opening: str | None = None
    """Marks before everything; null: what the tokenizer opens a text with."""
    end: str | None = None
    """Marks behind an answer; null: the tokenizer's end mark."""
    system: str = ""
    """The system text where the config gives none."""
    head: str = ""
    head_with_system: str | None = None
    """The head where there is a system text, `{system}` in it; null: there can be none."""
    middle: str = ""
    between: str = ""
    answer: str = ""
    stop: list[str] = field(default_factory=list)


def read_profile(name: str) -> NamedProfile:
    """A shipped profile, or a YAML file of the same form.

    Raises:
        ConfigError: no such file, a wrong key or type.
    """
    return config.shipped(NamedProfile, "profiles", name, "profile")


def profile_from_tokenizer(
    tokenizer: Any,
    overrides: ProfileConfig | None = None,
    *,
    encoder_decoder: bool = False,
    instruction_limit: int = 128,
    target_limit: int = 256,
) -> Profile:
    """The profile that is named, or that a tokenizer speaks for: its chat template if it has one, plain text otherwise.

    Raises:
        ConfigError: the tokenizer has no end mark, a chat layout is asked for and it has no chat template, or the
            profile that is named is not there or not this tokenizer's, or the template refuses a turn.
    """
    overrides = overrides or ProfileConfig()
    named = read_profile(overrides.name) if overrides.name is not None else None
    if named is not None:
        _check_marks(tokenizer, named)
    has_template = bool(getattr(tokenizer, "chat_template", None)) and not encoder_decoder
    layout = overrides.layout or (named.layout if named else "chat" if has_template else "plain")
    spoken = named if named is not None and named.layout == layout else None
    if layout == "chat" and encoder_decoder:
        raise ConfigError("language.profile asks for a chat layout, and the LLM is an encoder–decoder; use 'plain'.")
    if layout == "chat" and not has_template and spoken is None:
        raise ConfigError("language.profile.layout is 'chat', but the tokenizer has no chat template; use 'plain'.")
    end = tuple(overrides.end) if overrides.end is not None else _end_mark(tokenizer, spoken)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0]
    frame: dict[str, str] = {}
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    system = overrides.system
    if spoken is not None and layout == "chat":
        system = spoken.system if system is None else system
        frame = _published_frame(spoken, system)
    elif layout == "chat":
        frame = _chat_frame(tokenizer, system or "")
        ends = _ids(tokenizer, frame["between"])
        if overrides.end is None and spoken is None and ends:
            end = (ends[0],)  # the mark that closes an assistant's turn
    else:
        if encoder_decoder:
            closing = end
        if tokenizer.bos_token_id is not None and _opens_with_bos(tokenizer):
            opening = (tokenizer.bos_token_id,)
    if spoken is not None and spoken.opening is not None:
        opening = _ids(tokenizer, spoken.opening)
    if overrides.opening is not None:
        opening = tuple(overrides.opening)
    separator = overrides.separator
    if separator is None:
        separator = "" if layout == "chat" or encoder_decoder or _brings_its_own_blank(tokenizer) else " "
    return Profile(
        layout=layout,
        opening=opening,
        end=end,
        pad=pad,
        separator=separator,
        closing=closing,
        decoder_opening=opening if encoder_decoder else (),
        system=system or "",
        stop=tuple(overrides.stop if overrides.stop is not None else spoken.stop if spoken else ()),
        slots_first=True if overrides.slots_first is None else overrides.slots_first,
        encoder_decoder=encoder_decoder,
        instruction_limit=instruction_limit,
        target_limit=target_limit,
        **frame,
    )


@dataclass
class Truncations:
    """How many texts were cut, and by how many ids in all."""

    instructions: int = 0
    targets: int = 0
    ids: int = 0

    @property
    def texts(self) -> int:
        """Texts that were cut."""
        return self.instructions + self.targets


class Joiner:
    """Makes the LLM's rows and the Q-Former's instruction ids out of rendered words; holds tokenizers, no weights."""

    def __init__(
        self, tokenizer: Any, profile: Profile, instruction_tokenizer: Any | None, instruction_limit: int = 128
    ):
        """`instruction_tokenizer` None: a Q-Former that reads no instruction."""
        self.tokenizer, self.profile = tokenizer, profile
        self.instruction_tokenizer, self.instruction_limit = instruction_tokenizer, instruction_limit
        self.truncations = Truncations()
        self._frames: dict[str, tuple[int, ...]] = {}

    def read_ids(self, instruction: str) -> tuple[int, ...]:
        """What the Q-Former reads: [CLS] words [SEP], the words cut on the left to the limit (marks among it)."""
        if self.instruction_tokenizer is None:
            return ()
        words = word_ids(self.instruction_tokenizer, instruction.replace(IMAGE_MARK, " "))
        kept = self._cut_left(words, self.instruction_limit - 2)
        return (self.instruction_tokenizer.cls_token_id, *kept, self.instruction_tokenizer.sep_token_id)

    def target_ids(self, target: str) -> tuple[int, ...]:
        """A target as it is trained on and scored: separator and words cut on the right to the limit, then the end."""
        words = self.answer_ids(target)
        limit = self.profile.target_limit - len(self.profile.end)
        if len(words) > limit:
            self.truncations.targets += 1
            self.truncations.ids += len(words) - limit
        return (*words[:limit], *self.profile.end)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Separator and words of an answer, neither cut nor ended: what a candidate is scored on."""
        return word_ids(self.tokenizer, self.profile.separator + answer.strip())

    def row(self, rendered: Rendered, reads: Sequence[int | Sequence[int]], *, answered: bool) -> Row:
        """One row of the LLM: slots for `reads`, the words, and the trained target.

        `reads` has one entry a picture: the number of its read, or of a video those of its frames in time order, which
        stand side by side.  Slots stand at the front of the user's words, or where `<image>` marks stand in the first
        instruction, a mark for a picture or a whole video.

        Raises:
            DataError: the instruction has another number of `<image>` marks than there are reads (0 marks are fine).
        """
        turns = list(rendered.turns) or [*rendered.history, Turn(rendered.instruction, rendered.target)]
        trained = [bool(rendered.turns)] * (len(turns) - 1) + [True]
        pieces: list[Text | Slot] = []
        slots = [
            [Slot(read)] if isinstance(read, int) else [Slot(each, frame) for frame, each in enumerate(read)]
            for read in reads
        ]
        for number, (turn, learn) in enumerate(zip(turns, trained, strict=True)):
            last = number == len(turns) - 1
            pieces += self._words(turn.instruction, slots if number == 0 else [], first=number == 0)
            if last and self.profile.layout == "chat":
                pieces.append(Text(self._frame("answer")))
            if not last or answered:
                ids = self.target_ids(turn.answer) if learn else (*self.answer_ids(turn.answer), *self.profile.end)
                pieces.append(Text(ids, trained=learn))
                if not last and self.profile.layout == "chat":
                    pieces.append(Text(self._frame("between")))
        return _merged(pieces)

    def _words(self, instruction: str, slots: list[list[Slot]], first: bool) -> list[Text | Slot]:
        parts = instruction.split(IMAGE_MARK)
        marks = len(parts) - 1
        if not slots or marks == 0:
            parts = [instruction.replace(IMAGE_MARK, "")]
            marks = 0
        elif marks != len(slots):
            raise DataError(
                f"the instruction has {marks} {IMAGE_MARK} marks and the record {len(slots)} pictures; "
                f"give none or as many: '{instruction}'."
            )
        profile = self.profile
        spans = self._cut_parts([word_ids(self.tokenizer, part.strip()) for part in parts])
        front = [] if marks else [slot for picture in slots for slot in picture]
        words: list[Text | Slot] = list(front)
        for number, ids in enumerate(spans):
            if number:
                words += slots[number - 1]
            words.append(Text(ids))
        if profile.layout == "chat":
            head = [Text((*profile.opening, *self._frame("head")))] if first else []
            return [*head, *words, Text(self._frame("middle"))]
        if not first:
            return words
        opening = Text(profile.opening)
        if profile.slots_first and not marks:
            return [*front, opening, *words[len(front) :]]
        return [opening, *words]

    def _frame(self, name: str) -> tuple[int, ...]:
        if name not in self._frames:
            ids = _ids(self.tokenizer, getattr(self.profile, name))
            if name == "between" and ids[: len(self.profile.end)] == self.profile.end:
                ids = ids[len(self.profile.end) :]  # the end mark stands behind every target already
            self._frames[name] = ids
        return self._frames[name]

    def _cut_parts(self, spans: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The user's words cut on the left to the limit, over all parts together; the frame is never cut."""
        fixed = len(self.profile.closing) + (len(self.profile.opening) if self.profile.layout == "plain" else 0)
        surplus = sum(map(len, spans)) - (self.profile.instruction_limit - fixed)
        if surplus <= 0:
            return spans
        self.truncations.instructions += 1
        self.truncations.ids += surplus
        kept = []
        for span in spans:
            cut = min(surplus, len(span))
            kept.append(span[cut:])
            surplus -= cut
        return kept

    def _cut_left(self, ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
        if len(ids) > limit:
            self.truncations.instructions += 1
            self.truncations.ids += len(ids) - limit
        return ids[max(0, len(ids) - limit) :]


def _merged(pieces: Sequence[Text | Slot]) -> Row:
    """Neighbouring texts of the same kind joined, empty ones dropped."""
    row: list[Text | Slot] = []
    for piece in pieces:
        if isinstance(piece, Text):
            if not piece.ids:
                continue
            if row and isinstance(row[-1], Text) and row[-1].trained == piece.trained:
                row[-1] = Text(row[-1].ids + piece.ids, piece.trained)
                continue
        row.append(piece)
    return tuple(row)


def word_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of what a person, a file or a model wrote: what looks like a mark in it (`</s>`) stays words, so that no
    record ends an answer or opens a turn.
    """
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids) if text else ()


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()


def _end_mark(tokenizer: Any, spoken: NamedProfile | None) -> tuple[int, ...]:
    if spoken is not None and spoken.end is not None:
        return _ids(tokenizer, spoken.end)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the LLM's tokenizer has no end mark (eos_token); give one as language.profile.end: [ID].")
    return (tokenizer.eos_token_id,)


def _opens_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself opens a text with its BOS; never assumed, some families have one and skip it."""
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _brings_its_own_blank(tokenizer: Any) -> bool:
    """SentencePiece-like tokenizers put a blank before a text's first word; byte-level ones do not."""
    tokens = tokenizer.convert_ids_to_tokens(list(_ids(tokenizer, "a")))
    return bool(tokens) and tokens[0].startswith("\u2581")


def _check_marks(tokenizer: Any, named: NamedProfile) -> None:
    for mark in named.marks:
        ids = _ids(tokenizer, mark)
        if len(ids) != 1 or ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ConfigError(
                f"language.profile.name is '{named.name}', and the LLM's tokenizer does not know its mark '{mark}'; "
                f"name the profile that belongs to the LLM, or 'plain'."
            )


def _published_frame(spoken: NamedProfile, system: str) -> dict[str, str]:
    """The literal texts of a named chat profile around the words, with its system text in the head if there is one."""
    head = spoken.head
    if system:
        if spoken.head_with_system is None:
            raise ConfigError(
                f"language.profile.system is set, and the profile '{spoken.name}' has no place for a system text; "
                f"leave it out."
            )
        head = spoken.head_with_system.replace("{system}", system)
    return {"head": head, "middle": spoken.middle, "between": spoken.between, "answer": spoken.answer}


def _chat_frame(tokenizer: Any, system: str) -> dict[str, str]:
    """The literal texts of a chat template around the words, found by rendering marks and splitting at them.

    Without a system text there is no system turn, or an empty one where that leaves less in front of the words: it
    keeps out the one that some templates put in by themselves.
    """
    if system:
        return _rendered_frame(tokenizer, [{"role": "system", "content": system}])
    frame = _rendered_frame(tokenizer, [])
    try:
        emptied = _rendered_frame(tokenizer, [{"role": "system", "content": ""}])
    except ConfigError:  # a template that knows no system turns has none to keep out
        return frame
    return emptied if len(emptied["head"]) < len(frame["head"]) else frame


def _rendered_frame(tokenizer: Any, opening: list[dict[str, str]]) -> dict[str, str]:
    first, answer, second = "\u0001first\u0001", "\u0001answer\u0001", "\u0001second\u0001"
    turns = [
        *opening,
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own, and may raise anything
        mend = "leave language.profile.system out, or set layout: plain" if opening else "set layout: plain"
        raise ConfigError(
            f"the LLM's chat template refuses the turns it is given ({' '.join(str(error).split())}); in "
            f"language.profile {mend}."
        ) from None
    found = re.fullmatch(f"(.*?){first}(.*?){answer}(.*?){second}(.*)", text, flags=re.DOTALL)
    if found is None:
        raise ConfigError(
            "the LLM's chat template changes or drops the words it is given; set language.profile.layout: plain."
        )
    head, middle, between, _ = found.groups()
    return {"head": head, "middle": middle, "between": between}
