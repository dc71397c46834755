"""Evaluation shared by processes, and gone on with after a kill: the same files in every case."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qformer import cards
from qformer.cards import TaskCard
from qformer.errors import DataError, QFormerError
from qformer.evaluate.kept import FOLDER, Unfinished, forget
from qformer.evaluate.outcome import Answer
from qformer.evaluate.run import score
from qformer.processes import ALONE, Processes
from qformer.sample import Sample
from qformer.text import Rendered
from tests.test_evaluate import RANK, Namer, world

ORIGIN = {"source": "run", "checkpoint": "run/checkpoints/step-3", "step": 3, "adapter": "0a", "vision": {}}
GENERATE = "answer: generate, metric: exact_match, question_type: kind"


def scored(root: Path, model: Any, where: str, **options: Any) -> dict[str, Any]:
    """Scores of all cards in a folder."""
    given = {"origin": ORIGIN, "quiet": True, "say": lambda line: None, "batch_size": 7, **options}
    chosen = given.pop("cards", None) or cards.load_all([str(root / "colours.yaml")], "eval")
    return score(model, chosen, root, directory=root / where, **given)


def files(folder: Path) -> dict[str, str]:
    """All files of a directory of scores; none may be hidden or half-written."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# -- an interruption --------------------------------------------------------------------------------------------------


class Mortal(Namer):
    """Is killed as it is asked one batch too many."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().look(samples, instructions)


KILLED = """
import sys
from pathlib import Path
from tests.test_spread import Mortal, scored

scored(Path(sys.argv[1]), Mortal(int(sys.argv[2])), "killed")
"""


@pytest.mark.parametrize("section", [RANK, pytest.param(GENERATE, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_and_equals_one_that_was_not(tmp_path: Path, section: str) -> None:
    """SIGKILL at the fourth batch of one pass and at the third of the other; a line cut short besides."""
    world(tmp_path, section)
    scored(tmp_path, Namer(), "whole")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for batches, kept in ((3, 21), (8, 60 + 14)):  # of nine batches a pass, the last of four
        ran = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(batches)], env=environment, check=False)
        assert ran.returncode == -signal.SIGKILL
        [file] = (tmp_path / "killed" / FOLDER).glob("colours-*/0.jsonl")
        assert len(file.read_text().splitlines()) == kept
        assert not (tmp_path / "killed" / "colours.json").exists()
        with file.open("a") as stream:
            stream.write('{"question": "torn')
    model, said = Namer(), list[str]()
    scored(tmp_path, model, "killed", say=said.append)
    assert model.batches == [7] * 6 + [4]  # of the second pass two batches were kept
    assert said[0] == "colours: goes on with 74 answers that an interrupted evaluation left."
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def interrupted(root: Path, where: str, batches: int, **options: Any) -> None:
    class Stopped(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            if len(self.batches) == batches:
                raise KeyboardInterrupt
            return super().look(samples, instructions)

    with pytest.raises(KeyboardInterrupt):
        scored(root, Stopped(), where, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"origin": {**ORIGIN, "adapter": "0b"}},
        {"origin": {**ORIGIN, "qformer": {"instruction_limit": 64}}},
        {"origin": {**ORIGIN, "max_pixels": 1000}},
        {"origin": {**ORIGIN, "vision": {"fingerprint": None}}},
        {"version": "0.0.0"},
        {"section": GENERATE},
        {"section": f"{RANK}, normalize: mean"},
        {"origin": None},
    ],
    ids=["adapter", "Q-Former", "pixels", "unknown tower", "version", "way of answering", "normalize", "no origin"],
)
def test_answers_of_another_model_or_another_way_are_not_taken(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    world(tmp_path)
    interrupted(tmp_path, "eval", 3)
    model = Namer()
    if "version" in change:
        monkeypatch.setattr("qformer.evaluate.run.__version__", change["version"])
        change = {}
    world(tmp_path, change.pop("section", RANK))
    scored(tmp_path, model, "eval", **change)
    assert sum(model.batches) == 120
    assert not (tmp_path / "eval" / FOLDER).exists()


def test_answers_are_found_again_under_another_metric_and_after_sets_that_were_done(tmp_path: Path) -> None:
    world(tmp_path)
    card = tmp_path / "colours.yaml"
    card.write_text(card.read_text() + "variants: {short: {eval: {metric_options: {normaliser: lower}}}}\n")
    both = cards.load_all([str(card), f"{card}:short"], "eval")
    interrupted(tmp_path, "eval", 20, cards=both)  # the first set is done
    assert (tmp_path / "eval" / "colours.json").exists()
    model = Namer()
    results = scored(tmp_path, model, "eval", cards=both)
    assert [result["score"] for result in results.values()] == [1.0, 1.0]
    assert len(model.batches) == 36 - 20
    assert sorted(files(tmp_path / "eval")) == [
        "colours.json", "colours.predictions.jsonl", "colours.short.json", "colours.short.predictions.jsonl",
    ]  # fmt: skip


def test_a_batch_that_was_kept_in_part_is_asked_whole(tmp_path: Path) -> None:
    world(tmp_path)
    scored(tmp_path, Namer(), "whole")
    interrupted(tmp_path, "eval", 2)
    [file] = (tmp_path / "eval" / FOLDER).glob("colours-*/0.jsonl")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:9]) + "not JSON\n[]\n")
    model = Namer()
    scored(tmp_path, model, "eval")
    assert len(model.batches) == 17
    assert files(tmp_path / "eval") == files(tmp_path / "whole")


def test_answers_of_a_tower_that_nothing_tells_apart_are_not_kept(tmp_path: Path) -> None:
    world(tmp_path)
    interrupted(tmp_path, "eval", 3, origin={**ORIGIN, "vision": {"fingerprint": None}})
    assert not (tmp_path / "eval").exists()


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    world(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / FOLDER).write_text("in the way")
    with pytest.raises(DataError, match=r"0\.jsonl: answers cannot be kept \(.*\); make room, or name another place"):
        scored(tmp_path, Namer(), "eval")


def test_of_an_answer_the_kept_candidates_and_what_was_cut_come_back(tmp_path: Path) -> None:
    choices = ("a", "b", "c", "d")
    given = [
        Answer("b", ("b", "d"), (-0.1, -1 / 3), 2),
        Answer("c", choices, (0.0, -1.0, 2.0, 1e-300)),
        Answer("x\u2028"),
    ]
    Unfinished(tmp_path, "t", {}).add(["1", "2", "3"], [choices, choices, ()], given)
    again = Unfinished(tmp_path, "t", {})
    assert again.take_up() == 3
    assert [again.kept("1", choices), again.kept("2", choices), again.kept("3", ())] == given
    assert again.kept("4", ()) is None


def test_processes_give_each_other_what_they_lack_and_no_more(tmp_path: Path) -> None:
    """Two disks with an answer in common."""
    for disk, questions in enumerate((["1", "2"], ["2", "3"])):
        answers = [Answer(f"answer {question}") for question in questions]
        Unfinished(tmp_path / str(disk), "t", {}).add(questions, [()] * 2, answers)

    def taken_up(processes: Processes) -> tuple[dict[str, Any], list[Any]]:
        given: list[Any] = []

        class Listening(Threads):
            def gathered(self, values: Sequence[Any]) -> list[Any]:
                given.extend(values)
                return super().gathered(values)

        assert isinstance(processes, Threads)
        listening = Listening(processes.index, processes.count, processes.meeting, processes.table)
        kept = Unfinished(tmp_path / str(processes.index), "t", {}, processes.index)
        assert kept.take_up(listening) == 3
        return kept.found, given

    (one, told), (other, _) = together(2, taken_up)
    assert {name: entry["text"] for name, entry in one.items()} == {name: f"answer {name}" for name in "123"}
    assert one == other
    assert told == [{"1", "2"}, {"1": one["1"]}]


def test_what_was_cut_before_an_interruption_is_counted_after_it(tmp_path: Path) -> None:
    class Cutting(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            self.language.truncations.instructions += 2
            return super().look(samples, instructions)

    world(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, Cutting(), "eval")
    assert scored(tmp_path, Namer(), "eval")["colours"]["truncations"] == 8


# -- several processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threads(Processes):
    """Processes that are threads: they meet at a barrier and lay their values side by side."""

    meeting: Any = None
    table: dict[int, list[Any]] = field(default_factory=dict)

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        self.table[self.index] = list(values)
        self.meeting.wait(60)
        found = [value for index in range(self.count) for value in self.table[index]]
        self.meeting.wait(60)
        return found

    def in_turn(self, work: Callable[[], Any]) -> Any:
        return work()


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What each of so many processes gives, or the error that it ended with."""
    meeting, table = threading.Barrier(count), dict[int, list[Any]]()
    found: list[Any] = [None] * count

    def one(index: int) -> None:
        try:
            found[index] = work(Threads(index, count, meeting, table))
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("count", [2, 3, 12])
def test_processes_share_the_questions_and_write_what_one_writes(tmp_path: Path, count: int) -> None:
    world(tmp_path)
    alone = scored(tmp_path, Namer(), "alone")
    models = [Namer() for _ in range(count)]
    said: list[str] = []
    results = together(
        count,
        lambda processes: scored(
            tmp_path, models[processes.index], "shared", processes=processes, say=said.append
        ),
    )  # fmt: skip
    assert results == [alone] * count
    assert sum(sum(model.batches) for model in models) == 120
    assert max(len(model.batches) for model in models) - min(len(model.batches) for model in models) <= 2
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert len([line for line in said if "recipe" in line]) == 1  # one of them speaks


def test_processes_forget_the_same_answers_at_once(tmp_path: Path) -> None:
    def work(processes: Processes) -> None:
        for task in range(50):
            processes.gathered(())
            forget(tmp_path / str(task), "t")

    for task in range(50):
        for name in ("t-0a", "t-0b"):
            (tmp_path / str(task) / FOLDER / name).mkdir(parents=True)
    assert together(8, work) == [None] * 8
    assert not list(tmp_path.rglob(FOLDER))


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    world(tmp_path)
    scored(tmp_path, Namer(), "alone")

    class Stopped(Namer):
        def look(self, samples: Sequence[Sample], instructions: Sequence[Rendered]) -> list[str]:
            if len(self.batches) == 3:
                raise DataError("the power is gone")
            return super().look(samples, instructions)

    ended = together(3, lambda processes: scored(tmp_path, Stopped(), "shared", processes=processes))
    assert [str(error) for error in ended] == ["the power is gone"] * 3 or all(
        isinstance(error, QFormerError) for error in ended
    )
    model = Namer()
    scored(tmp_path, model, "shared")
    assert len(model.batches) == 18 - 9
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


def test_a_process_that_fails_ends_them_all(tmp_path: Path) -> None:
    chosen = world(tmp_path, _17={"image": "broken.png"})
    found = together(2, lambda processes: scored(tmp_path, Namer(), "eval", cards=chosen, processes=processes))
    assert isinstance(found[0], DataError) and "broken.png' is truncated" in str(found[0])
    assert type(found[1]) is QFormerError and str(found[1]).startswith("another process: r17: ")


def elsewhere(root: Path, **changes: dict[str, Any]) -> list[dict[str, TaskCard]]:
    """The cards of two machines: on the second one the records are another file."""
    (root / "other").mkdir()
    world(root / "other", **changes)
    card = world(root)["colours"]
    assert card.eval is not None
    files = {"records": "other/records.jsonl", "images": "."}
    return [{"colours": card}, {"colours": dataclasses.replace(card, eval=dataclasses.replace(card.eval, files=files))}]


def test_a_record_that_one_machine_lacks_is_named_before_anything_is_asked(tmp_path: Path) -> None:
    """Its answers would stand at the wrong questions otherwise, and make a score."""
    chosen, models = elsewhere(tmp_path, _5={"target": ""}), [Namer(), Namer()]

    def work(processes: Processes) -> Any:
        given = {"cards": chosen[processes.index], "processes": processes, "on_error": "skip"}
        return scored(tmp_path, models[processes.index], "eval", **given)

    for error in together(2, work):
        assert isinstance(error, DataError)
        assert str(error).startswith("colours: record 6 is not the same for all processes; give every machine the same")
    assert not models[0].batches + models[1].batches
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("lost", [True, False])
def test_a_machine_whose_files_fail_ends_them_all(tmp_path: Path, lost: bool) -> None:
    """Neither waits for the other: a file that is not there, or a broken record that is to end the scoring."""
    chosen = elsewhere(tmp_path, _5={"target": ""})
    if lost:
        (tmp_path / "other" / "records.jsonl").unlink()
    found = together(
        2, lambda processes: scored(tmp_path, Namer(), "eval", cards=chosen[processes.index], processes=processes)
    )
    assert type(found[0]) is QFormerError and str(found[0]).startswith("another process: ")
    assert isinstance(found[1], DataError) and "records.jsonl" in str(found[1])


def test_processes_hear_of_a_failure_before_the_end_of_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = world(tmp_path, _7={"image": "broken.png"})  # of the second batch, and so of the second process
    monkeypatch.setattr("qformer.evaluate.predict.ROUND", 3)
    models = [Namer(), Namer()]

    def work(processes: Processes) -> Any:
        return scored(tmp_path, models[processes.index], "eval", cards=chosen, processes=processes, batch_size=4)

    found = together(2, work)
    assert isinstance(found[1], DataError) and isinstance(found[0], QFormerError)
    assert [len(model.batches) for model in models] == [3, 1]  # of eight and seven


def test_nothing_is_written_before_all_have_arrived() -> None:
    arrived: list[int] = []

    def work(processes: Processes) -> Any:
        if not processes.first:
            time.sleep(0.2)
        arrived.append(processes.index)
        return processes.told(lambda: sorted(arrived))

    assert together(2, work) == [[0, 1], [0, 1]]


def test_a_score_that_cannot_be_computed_ends_them_all(tmp_path: Path) -> None:
    chosen = world(tmp_path)
    (tmp_path / "eval").write_text("a file where a directory belongs")
    found = together(
        2, lambda processes: scored(tmp_path, Namer(), "eval", cards=chosen, processes=processes, origin=None)
    )
    assert isinstance(found[0], DataError) and "scores cannot be written" in str(found[0])
    assert "another process: " in str(found[1])


def test_a_process_alone_agrees_with_itself() -> None:
    assert ALONE.told(lambda: 3) == ALONE.agreed(lambda: 3) == ALONE.in_turn(lambda: 3) == 3
    assert ALONE.first and ALONE.share(5) and ALONE.gathered([1]) == [1]


# -- whole models -----------------------------------------------------------------------------------------------------

SHARED = """
import json, sys
from pathlib import Path

from accelerate import PartialState
from qformer import cards
from qformer.processes import joined
from tests.test_spread import build, scored_whole

root, towers = Path(sys.argv[1]), Path(sys.argv[2])
processes = joined()
assert PartialState().num_processes == processes.count == 2, processes
assert PartialState().process_index == processes.index
for family in ("llama", "t5"):
    model = build(root, towers, family)
    asked = []
    for name in ("answer", "rank_samples"):
        method = getattr(model, name)

        def counting(samples, *given, method=method, name=name):
            asked.extend(f"{name} {each.id} {each.images}" for each in samples)
            return method(samples, *given)

        setattr(model, name, counting)
    results = scored_whole(root, model, f"two-{family}", 4, processes)
    (root / f"asked-{family}-{processes.index}.json").write_text(json.dumps([asked, results]))
"""


def build(root: Path, towers: Path, family: str) -> Any:
    from qformer import loading  # heavy, and most tests here have a model of a few lines
    from tests import world as whole

    return loading.build(whole.settings(towers, root, root / family, family=family), report=str)


def scored_whole(root: Path, model: Any, where: str, batch_size: int, processes: Processes = ALONE) -> dict[str, Any]:
    chosen = cards.load_all([str(root / "colours.yaml"), str(root / "colours.yaml") + ":said"], "eval")
    return scored(root, model, where, cards=chosen, batch_size=batch_size, processes=processes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data with a card that ranks, and a variant of it that generates."""
    from tests import world as whole

    root = tmp_path_factory.mktemp("spread")
    card = whole.write_pictures(root, count=13)
    said = "{answer: generate, metric: exact_match, decoding: {max_new_tokens: 4, num_beams: 2}}"
    card.write_text(f"{card.read_text()}variants: {{said: {{eval: {said}}}}}\n")
    return root


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.mark.slow  # of one card each: `tests/test_many.py`
def test_two_processes_equal_one(pictures: Path, towers: Path) -> None:
    """gloo under torchrun, both kinds of LLM, ranking and generating: the same bytes, and each question asked once."""
    alone = {family: scored_whole(pictures, build(pictures, towers, family), f"one-{family}", 4) for family in FAMILIES}
    script = pictures / "shared.py"
    script.write_text(SHARED)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={27900 + os.getpid() % 500}"]
    command = [sys.executable, "-m", *launch, *map(str, (script, pictures, towers))]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for family in FAMILIES:
        pair = [json.loads((pictures / f"asked-{family}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [results for _, results in pair] == [alone[family]] * 2
        one, other = (set(asked) for asked, _ in pair)
        assert one and other and not one & other
        assert sum(len(asked) for asked, _ in pair) == 2 * 2 * 13  # two cards, and both kinds of pictures
        assert files(pictures / f"two-{family}") == files(pictures / f"one-{family}")


FAMILIES = ("llama", "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_equals_one_of_thirty_two(pictures: Path, towers: Path, family: str) -> None:
    model = build(pictures, towers, family)
    found = {}
    for size in (1, 32):
        scored_whole(pictures, model, f"{family}-{size}", size)
        found[size] = {
            name: [json.loads(line) for line in text.splitlines()]
            for name, text in files(pictures / f"{family}-{size}").items()
            if name.endswith(".predictions.jsonl")
        }
    assert len(found[1]) == 2
    for name, lines in found[1].items():
        for mine, theirs in zip(lines, found[32][name], strict=True):
            near = theirs.pop("candidates", {})
            assert mine.pop("candidates", {}) == pytest.approx(near, rel=1e-4)
            assert mine == theirs


# -- every card -------------------------------------------------------------------------------------------------------

EVERY = """
import os, sys
from pathlib import Path

from qformer.processes import joined
from tests.test_spread import build, every_card

processes = joined()
assert processes.count == int(os.environ["WORLD_SIZE"]) == 2
every_card(Path(sys.argv[1]), build(Path(sys.argv[1]).parent, Path(sys.argv[2]), sys.argv[3]), "two", 1, processes)
"""


def every_card(root: Path, model: Any, where: str, batch_size: int, processes: Processes = ALONE) -> dict[str, Any]:
    """All shipped cards that are scored, over the files of `tests/fixtures`."""
    chosen = cards.load_all(["held_in", "held_out", "aokvqa:multiple_choice"], "eval")
    assert len(chosen) == 20
    given = {"cards": chosen, "batch_size": batch_size, "shuffled": False, "processes": processes}
    return scored(root, model, where, **given)


def predictions(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = files(folder)
    return {
        name: [json.loads(line) for line in found[name].splitlines()] for name in found if "predictions" in name
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_card_is_scored_alike_however_it_is_asked(
    tmp_path: Path, towers: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of one and of thirty-two, by one process and by two, at once and with many interruptions."""
    from tests import fixtures

    root = fixtures.root(tmp_path)
    model = build(tmp_path, towers, family)
    every_card(root, model, "one", 1)
    every_card(root, model, "many", 32)
    alone, many = predictions(root / "one"), predictions(root / "many")
    assert len(alone) == 20 and set(alone) == set(many)
    for name, lines in alone.items():
        for mine, theirs in zip(lines, many[name], strict=True):
            near = theirs.pop("candidates", {})
            assert mine.pop("candidates", {}) == pytest.approx(near, rel=1e-4), name
            assert {**mine, "score": 0} == {**theirs, "score": 0}, name
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-9), name

    script = tmp_path / "every.py"
    script.write_text(EVERY)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={27400 + os.getpid() % 500}"]
    command = [sys.executable, "-m", *launch, *map(str, (script, root, towers, family))]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert files(root / "two") == files(root / "one")

    attempts, left = 0, 0

    def mortal(method: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*given: Any) -> Any:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return method(*given)

        return asked

    for name in ("answer", "rank_samples"):
        monkeypatch.setattr(model, name, mortal(getattr(model, name)))
    while not (root / "again" / "vsr.json").exists():
        attempts, left = attempts + 1, 11
        with suppress(KeyboardInterrupt):
            every_card(root, model, "again", 1)
    assert attempts > 4
    assert files(root / "again") == files(root / "one")
