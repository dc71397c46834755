"""What the demo's LLM knows of the full demo's held-out sets if it is told the scene: `python benchmarks/told.py`.

A perfect Q-Former would say what stands in each of the nine places.  This says it in the LLM's own words: nine soft
tokens, each the sum of the embeddings of a phrase ("small red metal cube top left", "nothing top right") over the root
of their number, as the LLM has read scenes before.  Its answers, by the cards' own prompts and ways of answering, are
then as good as the frozen LLM allows; what the full demo scores below that is the adapter's part.

A row a form of question: how many, the share that is right, and the share that the most frequent answer would have
(choosing blindly where there are options).  Dialogues are ranked among their hundred replies: the mean reciprocal rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from qformer.backbones.language import LanguageTower
from qformer.backbones.language_loading import load_language
from qformer.config import LanguageConfig
from qformer.demo import scenes, unseen
from qformer.demo.scenes import Ask, Dice, Scene
from qformer.named import located
from qformer.text import Joiner, Rendered, lettered, load_templates

SEED = 73_001
BLOCK = 64
PLACES = tuple(f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS)
SETS = {
    "GQA": ("relation", "query", "two_step", "verify", "choose"),
    "TextVQA": ("reads", "text", "label", "says_so"),
    "HatefulMemes": ("mean",),
    "VizWiz": ("tell", "missing", "this", "see", "many"),
    "ScienceQA": ("matter", "map", "property"),
}  # fmt: skip
FORMS = {**scenes.FORMS, **unseen.FORMS}


@dataclass(frozen=True)
class Told:
    """A question about a scene, as the LLM is asked it."""

    scene: Scene
    rendered: Rendered
    answer: str
    candidates: tuple[str, ...] = ()


def held_out() -> Iterator[Scene]:
    """Scenes as held-out sets have them, of a seed of their own."""
    return (scenes.sample_scene(SEED, number, held_out=True) for number in count())


def questions(form: str, size: int) -> list[Told]:
    """Of one form, a scene each, no answer more often than it must."""
    found, used = [], Counter[str]()
    for scene in held_out():
        dice = Dice("told", SEED, scene.number)
        if asks := list(FORMS[form](scene, dice)):
            ask = min(dice.shuffled(asks), key=lambda each: used[each.answer])
            used[ask.answer] += 1
            found.append(Told(scene, Rendered(prompt(form, ask)), ask.answer, choices(form, ask)))
        if len(found) == size:
            return found
    raise AssertionError(form)


def prompt(form: str, ask: Ask) -> str:
    """In the words of the set's card."""
    if form == "mean":
        return load_templates("hatefulmemes_zero_shot").templates[0].format(text=ask.question)
    if form in unseen.SUBJECTS:
        hint = unseen.SUBJECTS[form].hint.replace("\n", " ")
        words = load_templates("scienceqa_zero_shot").templates[0]
        asked = words.format(question=ask.question, options=lettered(ask.options))
        return f"Context: {hint} {asked}" if hint else asked
    return load_templates("short_answer").templates[0].format(question=ask.question)


def choices(form: str, ask: Ask) -> tuple[str, ...]:
    """What is ranked; nothing where an answer is written."""
    return ("yes", "no") if form == "mean" else ask.options if form in unseen.SUBJECTS else ()


def soft_tokens(llm: LanguageTower, found: list[Scene]) -> Tensor:
    """(N, 9, L): each place's phrase as one position."""
    rows = []
    for scene in found:
        said = {thing.place: scenes.phrase(thing) for thing in scene.things}
        for place in PLACES:
            ids = llm.tokenizer(" " + said.get(place, f"nothing {place}"), add_special_tokens=False).input_ids
            words = llm.embedded(torch.tensor(ids))
            rows.append(words.sum(0) / len(ids) ** 0.5)
    return torch.stack(rows).unflatten(0, (len(found), len(PLACES)))


def right(llm: LanguageTower, asked: list[Told]) -> list[bool]:
    """Whether each question is answered rightly."""
    joiner, found = Joiner(llm.tokenizer, llm.profile, None), []
    for start in range(0, len(asked), BLOCK):
        part = asked[start : start + BLOCK]
        soft = soft_tokens(llm, [each.scene for each in part])
        rows = [joiner.row(each.rendered, [read], answered=False) for read, each in enumerate(part)]
        if part[0].candidates:
            ranked = llm.rank(soft, rows, [each.candidates for each in part])
            answers = [
                max(zip(scores, each.candidates, strict=True))[1] for scores, each in zip(ranked, part, strict=True)
            ]
        else:
            answers = llm.generate(soft, rows, max_new_tokens=10)
        found += [answer == each.answer for answer, each in zip(answers, part, strict=True)]
    return found


def dialogues(llm: LanguageTower, size: int) -> str:
    """The row of Visual Dialog: every round, behind those before."""
    joiner, ranks, said = Joiner(llm.tokenizer, llm.profile, None), [], Counter[tuple[str, str]]()
    spoken = ((scene, unseen.dialogue(scene, scene.number, said)) for scene in held_out())
    pool = unseen.replies()
    for scene, rounds in islice(((scene, rounds) for scene, rounds in spoken if rounds), size):
        history, rows = "", []
        for each in rounds:
            words = load_templates("short_answer").templates[0].format(question=f"{each.question}?")
            rendered = Rendered(f"Dialog history: {history}\n {words}" if history else words)
            rows.append(joiner.row(rendered, [0], answered=False))
            history += f"{' ' if history else ''}Question: {each.question}? Answer: {each.answer}."
        for each, scores in zip(rounds, llm.rank(soft_tokens(llm, [scene]), rows, [pool] * len(rows)), strict=True):
            best = sorted(zip(scores, pool, strict=True), reverse=True)
            ranks.append(1 + [reply for _, reply in best].index(each.answer))
    blindly = sum(1 / rank for rank in range(1, len(pool) + 1)) / len(pool)
    found = statistics.mean(1 / rank for rank in ranks)
    return f"| Visual Dialog | ten rounds, mean reciprocal rank | {len(ranks)} | {found:.1%} | {blindly:.1%} |"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="demo:language")
    parser.add_argument("--questions", type=int, default=400, help="of each form")
    options = parser.parse_args()
    llm = load_language(located(LanguageConfig(name=options.language)))
    print("| set | form of question | questions | right | most frequent, or blindly |")
    print("|---|---|---:|---:|---:|")
    for name, forms in SETS.items():
        for form in forms:
            asked = questions(form, options.questions)
            known = Counter(each.answer for each in asked)
            blindly = [1 / len(each.candidates) for each in asked if each.candidates]
            beside = statistics.mean(blindly) if blindly else known.most_common(1)[0][1] / len(asked)
            found = right(llm, asked)
            print(f"| {name} | {form} | {len(asked)} | {statistics.mean(found):.1%} | {beside:.1%} |", flush=True)
    print(dialogues(llm, -(-options.questions // unseen.ROUNDS)))


if __name__ == "__main__":
    main()
