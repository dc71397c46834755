"""Training: any split of a step gives one gradient, a run can be killed anywhere, and monitors disturb nothing."""

import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, tracking

from qformer import cards, images, loading, saved, vlm
from qformer.assemble import Prepared
from qformer.backbones.decoder_only import DecoderOnly
from qformer.config import TrainConfig
from qformer.data.batch import StepMaker, mixture_of, open_sources
from qformer.errors import ConfigError, DataError, TrainingError
from qformer.processes import Processes
from qformer.sample import Batch, Read, Slot, Text, row_length, trained_tokens
from qformer.train import checkpoint, lock, loop, monitors, optim
from qformer.train.step import NotFiniteError, not_finite, train_step
from tests import world

LINE = '{"id": "new", "image": "pictures/0.png", "instruction": "what", "target": "red"}\n'


def append(file, text):
    file.write_text(file.read_text() + text)


def replace(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def data(tmp_path):
    world.write_pictures(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def make(towers, data, tmp_path):
    """Settings of a run in a folder of its own."""

    def make(*changes, name="run", **more):
        return world.settings(towers, data, tmp_path / name, *changes, **more)

    return make


def maker_of(settings, model, **changes):
    loaded = cards.load_all(settings.data.tasks, "train")
    sources = open_sources(loaded, Path(settings.data.root))
    mixture = mixture_of(sources, settings.data, {}, settings.seed)
    apart = model.language.is_encoder_decoder
    values = {"batch_size": 6, "steps": 4, "soft_tokens": 4, "apart": apart, **changes}
    return StepMaker(mixture, sources, model.assembler(training=True), **values)


def gradients(model, maker, step=0):
    """Gradients of one step, by name, without taking it."""
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.0)
    kept = {}
    optimizer.register_step_pre_hook(
        lambda *_: kept.update({name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None})
    )
    model.train()
    report = train_step(
        model, model.objective, maker[step].batches, maker.assembler.dummy(model.vision.settings.size), optimizer,
        Accelerator(cpu=True), None,
    )  # fmt: skip
    return report, kept


# -- schedule and groups ----------------------------------------------------------------------------------------------


def test_rate_warms_up_then_follows_a_cosine():
    settings = TrainConfig(steps=60_000, rate=1e-5, warmup_rate=1e-8, warmup_steps=1000)
    assert optim.learning_rate(0, settings) == 1e-8
    assert optim.learning_rate(500, settings) == pytest.approx((1e-8 + 1e-5) / 2)
    assert optim.learning_rate(1000, settings) == 1e-5
    assert optim.learning_rate(30_500, settings) == pytest.approx(5e-6)
    assert optim.learning_rate(60_000, settings) == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize("decay_queries", [False, True])
def test_weight_decay_is_for_matrices_alone(make, decay_queries):
    model = loading.build(make(), report=lambda _: None)
    named = model.trainable()
    decayed, spared = optim.parameter_groups(named, 0.05, decay_queries)
    names = {id(parameter): name for name, parameter in named.items()}
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    with_queries = "connector.qformer.queries" in {names[id(parameter)] for parameter in decayed["params"]}
    assert with_queries == decay_queries
    for parameter in spared["params"]:
        assert parameter.ndim == 1 or names[id(parameter)].endswith("queries")
    assert len(decayed["params"]) + len(spared["params"]) == len(named)


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "packed"), [("llama", False), ("llama", True), ("t5", False)])
def test_any_split_of_a_step_gives_the_same_gradient(make, family, packed):
    settings = make(family=family)
    model = loading.build(settings, report=lambda _: None)
    whole, expected = gradients(model, maker_of(settings, model))
    split = maker_of(settings, model, micro_batch_tokens=40, packed=packed)
    assert len(split[0].batches) > 2
    for batch in split[0].batches:
        answers = [trained_tokens(row) if family == "t5" else 0 for row in batch.rows]
        lengths = [row_length(row, 4) - answer for row, answer in zip(batch.rows, answers, strict=True)]
        padded = len(lengths) * (max(lengths) + max(answers))  # an encoder–decoder's are two rectangles
        assert len(lengths) == 1 or (sum(lengths) if packed else padded) <= 40
    report, found = gradients(model, split)
    assert report.counts == whole.counts and report.loss == pytest.approx(whole.loss, rel=1e-5)
    for name in expected:
        if not name.endswith("key.bias"):
            assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_an_encoder_decoders_budget_is_of_prompts_and_answers(make):
    """A long prompt and a long answer side by side would be padded to both."""

    def row(prompt, answer):
        return Prepared(f"{prompt}+{answer}", (), (), (Text((5,) * prompt), Text((6,) * answer, trained=True)))

    rows = [row(90, 10), row(10, 90), row(80, 5), row(12, 80)]
    settings = make(family="t5")
    model = loading.build(settings, report=lambda _: None)
    cut = {}
    for apart in (False, True):
        maker = maker_of(settings, model, micro_batch_tokens=210, apart=apart)
        cut[apart] = [[each.name for each in group] for group in maker.groups(rows)]
    assert cut[False] == [["90+10", "10+90"], ["12+80", "80+5"]]  # 2 · (90 + 90) positions are computed of 200
    assert cut[True] == [["12+80", "10+90"], ["90+10", "80+5"]]


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(make, monkeypatch):
    """Told by what the optimizer is given; what is logged is the norm before."""
    given, optimizer_for = [], optim.optimizer_for

    def watched(named, settings):
        optimizer = optimizer_for(named, settings)
        norm = torch.nn.utils.get_total_norm
        optimizer.register_step_pre_hook(
            lambda *_: given.append(float(norm([p.grad for p in named.values() if p.grad is not None])))
        )
        return optimizer

    monkeypatch.setattr(loop, "optimizer_for", watched)
    free, clipped = (
        run(make("train.steps=1", *more, name=f"run{len(more)}")) for more in ((), ("train.max_norm=1e-3",))
    )
    logged = [json.loads((directory / "metrics.jsonl").read_text())["gradient_norm"] for directory in (free, clipped)]
    assert logged[0] == logged[1] > 0.01
    assert given == pytest.approx([logged[0], 1e-3], rel=1e-3)


def test_rows_that_cannot_be_kept_apart_are_padded_and_that_is_said_once(make, monkeypatch):
    told = []
    monkeypatch.setattr(DecoderOnly, "_packs", None)
    loop.train(make("train.steps=2"), say=told.append, quiet=True)
    assert sum("cannot be kept apart in one tensor row, so they are padded" in line for line in told) == 1


def test_every_trained_parameter_gets_a_gradient_except_those_that_cannot(make):
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    _, found = gradients(model, maker_of(settings, model))
    without = {name for name in model.trainable() if name not in found or not found[name].any()}
    last = model.connector.size.layers - 1
    assert not {name for name in without if not name.endswith("key.bias")}
    frozen = {name for name, p in model.connector.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(f"qformer.blocks.{last}.text_feed_forward") for name in frozen)


def test_a_dummy_changes_nothing(make):
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    dummy = maker_of(settings, model).assembler.dummy(model.vision.settings.size)
    assert model.objective.counts(dummy) == {"answer": 0}
    assert float(model(dummy)["answer"].detach()) == 0.0


# -- data order -------------------------------------------------------------------------------------------------------


def rows_of(data):
    return [
        (name, row, batch.pixels[batch.reads[0].picture].sum().item())
        for batch in data.batches
        for name, row in zip(batch.samples, batch.rows, strict=True)
    ]


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_see_the_same_data_crops_and_flips_included(make, ranks, workers):
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    alone = maker_of(settings, model)

    def pictures(data):
        return {
            (name, tuple(batch.pixels[batch.reads[place].picture].flatten().tolist()))
            for batch in data.batches
            for place, name in enumerate(batch.samples)
        }

    shared = [maker_of(settings, model, rank=rank, ranks=ranks) for rank in range(ranks)]
    loaders = [iter(torch.utils.data.DataLoader(each, batch_size=None, num_workers=workers)) for each in shared]
    for step in range(3 if workers else 4):
        parts = [next(loader) for loader in loaders]
        assert set.union(*map(pictures, parts)) == pictures(alone[step])
        assert sum(len(pictures(part)) for part in parts) == len(pictures(alone[step]))


def test_a_data_folder_that_moved_gives_the_same_pixels(make, data, tmp_path, monkeypatch):
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    here = maker_of(settings, model)[0].batches[0].pixels
    shutil.move(data, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "elsewhere", Path("elsewhere")):
        moved = dataclasses.replace(settings, data=dataclasses.replace(settings.data, root=str(root)))
        moved = dataclasses.replace(
            moved, data=dataclasses.replace(moved.data, tasks={str(tmp_path / "elsewhere" / "colours.yaml"): 1.0})
        )
        model.settings = moved
        assert torch.equal(maker_of(moved, model)[0].batches[0].pixels, here)


def test_a_dialogue_beyond_the_llm_is_a_broken_record(make, data):
    line = json.loads((data / "records.jsonl").read_text().splitlines()[0])
    turns = [{"instruction": "what colour is it " * 30, "answer": "it is red"}] * 40
    (data / "records.jsonl").write_text(json.dumps({"id": "long", "image": line["image"], "turns": turns}) + "\n")
    with pytest.raises(DataError, match=r"long: its row takes \d+ positions, and the LLM has \d+; lower"):
        run(make("train.steps=1"))


def test_rows_on_one_picture_share_its_encoding(make, data):
    lines = (data / "records.jsonl").read_text().splitlines()
    second = {**json.loads(lines[0]), "id": "again", "instruction": "say the colour"}
    (data / "records.jsonl").write_text("\n".join([lines[0], json.dumps(second)]) + "\n")
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    [batch] = maker_of(settings, model, batch_size=2)[0].batches
    assert len(batch.pixels) == 1 and len(batch.reads) == 2


def test_pictures_encoded_once_give_the_gradients_of_a_copy_a_read(make, data):
    lines = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
    shared = [{**line, "image": f"pictures/{number % 2}.png"} for number, line in enumerate(lines)]
    (data / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shared))
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    maker = maker_of(settings, model)
    [batch] = maker[0].batches
    assert (len(batch.pixels), len(batch.reads)) == (2, 6)
    copied = dataclasses.replace(
        batch,
        pixels=batch.pixels[[read.picture for read in batch.reads]],
        reads=tuple(dataclasses.replace(read, picture=number) for number, read in enumerate(batch.reads)),
    )
    expected, wanted = gradients(model, maker)
    maker.groups, maker.assembler.batch = lambda prepared: [prepared], lambda *_: copied
    report, found = gradients(model, maker)
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    for name in wanted:
        if not name.endswith("key.bias"):
            assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


# -- runs -------------------------------------------------------------------------------------------------------------


def run(settings):
    return loop.train(settings, say=lambda _: None, quiet=True)


def weights_of(directory):
    from qformer.weights import load_tensors

    return load_tensors(saved.adapter_directory(directory) / vlm.ADAPTER_FILE)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_learns_and_leaves_what_it_promises(make):
    settings = make("train.steps=30", "train.monitor_every=10", "train.rate=1e-2")
    directory = run(settings)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert {"gap", "cosine", "entropy"} <= lines[9].keys() and "gap" not in lines[8]
    for number, line in enumerate(lines):
        measured = [line[name] for name in ("gradient_norm", "samples_per_second", "tokens_per_second")]
        assert all(math.isfinite(value) and value > 0 for value in measured)
        assert line["tokens_per_second"] > 4 * line["samples_per_second"]  # four soft tokens, and words behind them
        assert line["learning_rate"] == optim.learning_rate(number, settings.train) > 0
    mixture = json.loads((directory / "mixture.json").read_text())
    assert mixture["colours"]["drawn"] == 180 and mixture["colours"]["passes"] == 7.5
    assert (directory / "checkpoints" / "step-30" / "adapter.safetensors").exists()


def test_long_waits_for_data_are_said_where_cores_are_idle(make, monkeypatch):
    directory = run(make("train.steps=2"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["waited"] < 1 for line in lines)

    def slow():
        for step in range(3):
            time.sleep(0.02)
            yield step

    supply = loop._Supply(slow())
    for _ in supply:
        assert 0.02 <= supply.waited < 1
    monkeypatch.setattr(loop, "MANY_STEPS", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    [said] = supply.summary(2)
    assert int(said.split(" %")[0]) > 50 and said.endswith("waiting for data; raise data.workers, which is 2")
    assert not supply.summary(7)
    monkeypatch.setattr(loop, "MANY_STEPS", 4)
    assert not supply.summary(2)


def test_monitors_leave_the_run_bit_equal(make):
    plain = run(make("qformer.dropout=0.1", name="plain"))
    watched = run(make("qformer.dropout=0.1", "train.monitor_every=1", name="watched"))
    assert same(weights_of(plain), weights_of(watched))


def test_going_on_equals_never_stopping(make):
    whole = run(make("train.steps=6", "qformer.dropout=0.1", name="whole"))
    halves = make("train.steps=6", "qformer.dropout=0.1", "train.checkpoint_every=2", name="halves")
    interrupted = halves.directory

    class Stop(Exception):
        pass

    save = checkpoint.save

    def stop_after_four(folder, step, *rest):
        save(folder, step, *rest)
        if step == 4:
            raise Stop

    checkpoint.save = stop_after_four
    try:
        with pytest.raises(Stop):
            run(halves)
    finally:
        checkpoint.save = save
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    run(halves)
    assert same(weights_of(whole), weights_of(interrupted))
    first, second = ((d / "metrics.jsonl").read_text().splitlines() for d in (whole, interrupted))
    assert [json.loads(line)["loss"] for line in first] == [json.loads(line)["loss"] for line in second]


@pytest.mark.parametrize("wanted", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_steps_the_run_ends_bit_equal(make, tmp_path, wanted):
    """SIGKILLs at random moments, restarted each time."""
    changes = ("train.steps=40", "train.checkpoint_every=3", "qformer.dropout=0.1")
    whole = run(make(*changes, name="whole"))
    killed = make(*changes, name="killed")
    command = [sys.executable, "-m", "qformer", "train", str(tmp_path / "killed.yaml"), *changes]
    chance = random.Random(3)
    kills = 0
    while kills < wanted:
        before = progress(killed.directory)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        target = min(38, before + chance.randint(1, 8))
        while process.poll() is None and progress(killed.directory) < target:
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert same(weights_of(whole), weights_of(killed.directory))


def progress(directory):
    try:
        return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def test_old_checkpoints_go_and_the_last_stay(make):
    directory = run(make("train.steps=5", "train.checkpoint_every=1", "train.keep_checkpoints=2"))
    assert [path.name for path in saved.checkpoints(directory)] == ["step-4", "step-5"]


def test_more_steps_may_be_asked_for_and_other_data_or_model_may_not(make):
    run(make("train.steps=2"))
    run(make("train.steps=3", "train.log_every=2"))
    with pytest.raises(ConfigError, match=r"train\.rate was 0\.001 and is 0\.5"):
        run(make("train.steps=4", "train.rate=0.5"))
    with pytest.raises(ConfigError, match=r"qformer\.queries was 4 and is 5"):
        run(make("qformer.queries=5"))


def test_fewer_steps_than_were_done_are_refused(make):
    directory = run(make("train.steps=3"))
    with pytest.raises(ConfigError, match=r"train\.steps is 2, and .*run has done 3; set it to at least 3"):
        run(make("train.steps=2"))
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("file", ["optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(make, file):
    directory = run(make("train.steps=2"))
    (directory / "checkpoints" / "step-foo").mkdir()
    (directory / "checkpoints" / "step-foo" / "adapter.safetensors").touch()
    damaged = directory / "checkpoints" / "step-2" / file
    damaged.write_bytes(damaged.read_bytes()[:-10])
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(TrainingError, match=rf"step-2/{file}: it is missing or not whole .*remove .*step-2"):
            run(make("train.steps=3"))
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        damaged.unlink(missing_ok=True)
        before.pop(damaged, None)


def test_a_checkpoint_of_another_llm_is_refused(make, towers, tmp_path):
    from tests.tiny import tiny_llm

    settings = make("train.steps=1")
    run(settings)
    other = tmp_path / "elsewhere" / "llama"
    tiny_llm(other, "llama", seed=9)
    with pytest.raises(ConfigError, match="trained with another LLM"):
        run(make("train.steps=2", f"language.name={other}"))
    with pytest.raises(ConfigError, match=r"qformer\.plug"):
        loading.load(settings.directory, language=str(other))


def test_the_first_value_that_is_not_finite_stops_the_run_and_is_saved(make, monkeypatch):
    settings = make()
    build = loading.build

    def spoiled(*arguments, **more):
        model = build(*arguments, **more)
        with torch.no_grad():
            model.connector.qformer.blocks[0].query_feed_forward.outer.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(loading, "build", spoiled)
    with pytest.raises(
        NotFiniteError,
        match=r"qformer\.blocks\.0\.query_feed_forward.* at step 1, with the samples r.*; lower train\.rate",
    ):
        run(settings)
    told = json.loads((settings.directory / "not_finite.json").read_text())
    assert told["step"] == 1 and len(told["samples"]) == 6


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is_finite(make, monkeypatch):
    settings, build = make(), loading.build
    name = "connector.qformer.blocks.1.query_feed_forward.outer.weight"

    def spoiled(*arguments, **more):
        model = build(*arguments, **more)
        dict(model.named_parameters())[name].register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(loading, "build", spoiled)
    with pytest.raises(NotFiniteError, match=rf"not finite in the gradient of {re.escape(name)} at step 1, with the"):
        run(settings)
    told = json.loads((settings.directory / "not_finite.json").read_text())
    assert told["where"] == f"the gradient of {name}" and len(told["samples"]) == 6
    assert not saved.checkpoints(settings.directory)


def test_the_micro_batches_without_a_finite_loss_are_named():
    model = torch.nn.Linear(2, 1)
    batches = [Batch(torch.empty(0), (), (), samples) for samples in (("a",), ("b", "c"), ("d",), ("e",))]
    losses = [torch.tensor(each) for each in (1.0, float("nan"), 2.0, float("inf"), 0.0)]  # the last of a dummy
    error = not_finite(model, losses, batches)
    assert error.where == "the loss" and error.samples == ("b", "c", "e")
    model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.tensor([float("inf")])
    error = not_finite(model, [torch.tensor(1.0)] * 5, batches)
    assert error.where == "the gradient of bias" and error.samples == ("a", "b", "c", "d", "e")


def test_a_value_that_is_not_finite_leaves_the_checkpoint_before_it_good(make, monkeypatch):
    """NaN at the fourth step: its samples are named, and without it the run goes on as if it had never been."""
    changes = ("train.steps=6", "train.checkpoint_every=1", "qformer.dropout=0.1")
    whole = run(make(*changes, name="whole"))
    settings = make(*changes)
    forward = vlm.VLM.forward
    passes = []

    def spoiled(self, batch):
        sums = forward(self, batch)
        passes.append(batch.samples)
        return {part: total * float("nan") if len(passes) == 4 else total for part, total in sums.items()}

    with monkeypatch.context() as patch:
        patch.setattr(vlm.VLM, "forward", spoiled)
        with pytest.raises(NotFiniteError, match="at step 4, with the samples") as caught:
            run(settings)
    assert caught.value.samples == passes[3]
    assert json.loads((settings.directory / "not_finite.json").read_text())["samples"] == list(passes[3])
    assert saved.checkpoints(settings.directory)[-1].name == "step-3"
    assert all(tensor.isfinite().all() for tensor in weights_of(saved.last_checkpoint(settings.directory)).values())
    run(settings)
    assert same(weights_of(whole), weights_of(settings.directory))


def test_a_full_disk_leaves_earlier_checkpoints_whole(make, monkeypatch):
    directory = run(make("train.steps=2"))
    before = weights_of(directory)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot be written .*No space left.*what was there before is whole"):
        run(make("train.steps=3"))
    assert same(before, weights_of(directory))
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full_is_called_so():
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint._write({"state": torch.zeros(100_000)}, Path("/dev/full"))


def test_broken_records_end_the_run_or_are_listed(make, data):
    (data / "pictures" / "3.png").write_bytes(b"no picture")
    with pytest.raises(Exception, match=r"3\.png"):
        run(make("train.steps=8", name="strict"))
    said = []
    directory = loop.train(make("train.steps=8", "data.on_error=skip", name="lenient"), say=said.append, quiet=True)
    listed = [json.loads(line) for line in (directory / "broken.jsonl").read_text().splitlines()]
    assert {(line["task"], line["record"]) for line in listed} == {("colours", 4)} and "3.png" in listed[0]["reason"]
    assert any("colours: 1 broken record(s) were skipped, number 4;" in line for line in said)


def test_the_summary_of_broken_records_is_of_all_processes_and_all_starts(make, data):
    (data / "pictures" / "3.png").write_bytes(b"no picture")
    changes = ("data.on_error=skip", "train.checkpoint_every=4")
    directory = run(make("train.steps=4", *changes))
    before = (directory / "broken.jsonl").read_text().splitlines()
    other = {"step": 2, "task": "colours", "record": 9, "reason": "told by another process"}
    late = {**other, "step": 5, "record": 11}
    (directory / "broken.jsonl.1").write_text(f"{json.dumps(other)}\n{json.dumps(late)}\n")
    said = []
    loop.train(make("train.steps=8", *changes), say=said.append, quiet=True)
    assert any("colours: 2 broken record(s) were skipped, number 4, 9;" in line for line in said)
    after = (directory / "broken.jsonl").read_text().splitlines()
    assert after[: len(before)] == before and len({json.loads(line)["step"] for line in after}) == len(after)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
@pytest.mark.parametrize(("workers", "cached"), [(0, False), (1, False), (0, True)])
def test_a_picture_that_takes_for_ever_is_a_broken_record(make, data, tmp_path, monkeypatch, workers, cached):
    monkeypatch.setattr(images, "PATIENCE", 0.3)
    (data / "pictures" / "3.png").unlink()
    os.mkfifo(data / "pictures" / "3.png")
    changes = ("train.steps=8", f"data.workers={workers}")
    if cached:
        still = ("vision.train_transform.mode=squash", "vision.train_transform.flip=0")
        changes = (*changes, *still, f"vision.cache={tmp_path / 'features'}")
    with pytest.raises(DataError, match=r"3\.png is not open after 0\.3 seconds; check the file, and the disk"):
        run(make(*changes, name="strict"))
    directory = run(make(*changes, "data.on_error=skip", name="lenient"))
    [line, *_] = [json.loads(line) for line in (directory / "broken.jsonl").read_text().splitlines()]
    assert line["record"] == 4 and "is not open after" in line["reason"]


def test_a_run_that_met_a_broken_record_may_go_on_without_it(make, data):
    run(make("train.steps=2"))
    (data / "pictures" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png"):
        run(make("train.steps=8"))
    assert run(make("train.steps=8", "data.on_error=skip"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: append(data / "records.jsonl", LINE), "records"),
        (lambda data: replace(data / "colours.yaml", "template: instruction}", "template: vqa}"), "card"),
        (lambda data: replace(data / "records.jsonl", "it is green", "it is white"), "content"),
    ],
)
def test_a_run_does_not_go_on_with_other_records_or_another_card(make, data, spoil, sentence):
    run(make("train.steps=1"))
    spoil(data)
    with pytest.raises(ConfigError, match=rf"other data: {sentence} of 'colours' was .* and is"):
        run(make("train.steps=2"))


@pytest.mark.parametrize("index", [False, True])
def test_data_are_known_again_by_content_whatever_file_holds_them(make, data, tmp_path, index):
    """A replaced file is noticed though it is of the same size and time, a copied one is the same."""
    changes = (f"data.index={tmp_path / 'index'}",) if index else ()
    directory = run(make("train.steps=1", *changes))
    described = json.loads((directory / "data.json").read_text())["colours"]
    state = (data / "records.jsonl").stat()
    copy = data / "copy.jsonl"
    copy.write_bytes((data / "records.jsonl").read_bytes())
    os.replace(copy, data / "records.jsonl")
    run(make("train.steps=2"))  # from another place than before: in memory, or still in memory
    assert json.loads((directory / "data.json").read_text())["colours"] == described
    replace(data / "records.jsonl", "it is green", "it is white")
    os.utime(data / "records.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (data / "records.jsonl").stat().st_size == state.st_size
    with pytest.raises(ConfigError, match=rf"content of 'colours' was {described['content']} and is [0-9a-f]{{16}}"):
        run(make("train.steps=3", *changes))


def test_a_run_from_before_contents_were_noted_goes_on(make):
    directory = run(make("train.steps=1"))
    told = json.loads((directory / "data.json").read_text())
    del told["colours"]["content"]
    (directory / "data.json").write_text(json.dumps(told))
    run(make("train.steps=2"))
    assert "content" in json.loads((directory / "data.json").read_text())["colours"]


def test_a_run_directory_takes_one_run_at_a_time(make, monkeypatch):
    settings = make("train.steps=2")
    with lock.locked(settings.directory):
        with pytest.raises(TrainingError, match=rf"another run is writing there \(process {os.getpid()} on .*\); wait"):
            run(settings)
        assert not (settings.directory / "checkpoints").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(settings)
    run(settings)  # whatever ended the one before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forked data workers")
def test_data_workers_that_outlive_a_killed_run_do_not_keep_its_directory(tmp_path):
    """What the system kills for want of memory is one process; its workers notice seconds later."""
    with lock.locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        told, tell = os.pipe()
        worker = os.fork()
        if not worker:
            try:
                os.write(tell, b"begun")
                time.sleep(30)
            finally:
                os._exit(0)
    try:
        assert os.read(told, 5) == b"begun"
        with lock.locked(tmp_path / "run"):
            assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(told)
        os.close(tell)


def test_where_the_file_system_has_no_locks_a_run_goes_without(make, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert run(make("train.steps=1"))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_directory_that_cannot_be_is_refused_before_anything_is_loaded(make, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(loading, "build", None)
    with pytest.raises(TrainingError, match=r"output is .*file is a file; give another output"):
        run(make(f"output={tmp_path / place}"))


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "mixture.json"])
def test_what_cannot_be_written_is_said_in_a_sentence(make, monkeypatch, file):
    import builtins
    import io

    opened = io.open

    def full(path, mode="r", *more, **options):
        if file in str(path) and mode[0] in "wa":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *more, **options)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(TrainingError, match=r"cannot be written \(No space left on device\)"):
        run(make("train.steps=1"))


def test_a_config_cut_off_by_a_kill_cannot_be(make, monkeypatch):
    directory = run(make("train.steps=1"))
    before = (directory / "config.yaml").read_text()
    monkeypatch.setattr(loop.config, "save", lambda settings, path: path.write_text("na") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(make("train.steps=2"))
    assert (directory / "config.yaml").read_text() == before


def test_no_text_is_cut_in_silence(make):
    said = []
    limits = ("language.instruction_limit=6", "train.log_every=100", "train.steps=4")
    directory = loop.train(make(*limits), say=said.append, quiet=True)
    cut = [json.loads(line)["truncations"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert sum(cut) > 0 and any(f"{sum(cut)} text(s) were cut to their limits" in line for line in said)


def test_trained_tokens_that_do_not_decode_to_the_target_stop_the_run(make, monkeypatch):
    from qformer.text import Joiner

    monkeypatch.setattr(Joiner, "target_ids", lambda self, target: (*self.answer_ids(target)[3:], *self.profile.end))
    with pytest.raises(TrainingError, match="the trained tokens decode to"):
        run(make())


def test_targets_that_the_llms_tokenizer_cannot_give_back_are_counted_by_set(make, data):
    lines = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
    for number in (3, 17):
        lines[number] = {**lines[number], "target": f"it is Ångström {number}", "candidates": []}
    lines[5]["target"] = ""
    (data / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    loop.train(make("train.steps=1", "data.on_error=skip"), say=said.append, quiet=True)
    [told] = [line for line in said if "lose characters" in line]
    assert told.startswith("colours: 2 of 23 targets lose characters in the LLM's tokenizer: 'it is Ångström 3' comes")
    assert told.index("lose") > 0 and said.index(told) < len(said) - 1  # before the first step, not after the last


def test_trackers_that_cannot_log_are_refused(make, monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown tracker 'tensorbord'\. Did you mean 'tensorboard'"):
        run(make("train.log_with=[tensorbord]"))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run(make("train.log_with=[wandb]"))


class Notes(tracking.GeneralTracker):
    """A tracker that writes a file."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        self.file = Path(logging_dir) / f"{run_name}.notes"

    @property
    def tracker(self):
        return self.file

    def store_init_configuration(self, values):
        self.log(values)

    def log(self, values, step=None, **_):
        with self.file.open("a") as file:
            file.write(json.dumps([step, values]) + "\n")

    def finish(self):
        self.log({"finished": True})


def test_what_is_measured_reaches_the_trackers(make, monkeypatch):
    """All of accelerate's own way of doing it, with a tracker in tensorboard's place that needs no package."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Notes)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    directory = run(make("train.log_with=[tensorboard]", "train.steps=2", "train.monitor_every=2"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first, *logged, last = [json.loads(line) for line in (directory / "run.notes").read_text().splitlines()]
    assert json.loads(first[1]["settings"])["train"]["steps"] == 2
    assert [{"step": step, **values} for step, values in logged] == lines and "gap" in lines[1]
    assert last == [None, {"finished": True}]


# -- monitors ---------------------------------------------------------------------------------------------------------


def test_alarm_speaks_after_three_bad_readings_in_a_row():
    alarm = monitors.BlindnessAlarm()
    collapsed = {"cosine": 0.999, "entropy": 1.0, "gap": 1.0}
    assert alarm(collapsed) == alarm(collapsed) == []
    assert "collapsed" in alarm(collapsed)[0]
    blind = {"cosine": 0.1, "entropy": 1.0, "gap": 0.001}
    assert alarm(blind) == alarm(blind) == []
    assert "pictures hardly matter" in alarm(blind)[0]
    assert alarm({"cosine": 0.1, "entropy": 1.0, "gap": 0.5}) == []


def test_a_run_says_what_three_bad_readings_in_a_row_mean(make, monkeypatch):
    build, said = loading.build, []

    def collapsed(*arguments, **more):
        model = build(*arguments, **more)
        with torch.no_grad():
            model.connector.qformer.queries[:] = model.connector.qformer.queries[:1]
        return model

    monkeypatch.setattr(loading, "build", collapsed)
    settings = make("train.steps=3", "train.monitor_every=1", "train.rate=1e-8", "train.warmup_steps=0")
    loop.train(settings, say=said.append, quiet=True)
    warnings = [line for line in said if re.match(r"step \d", line)]
    assert [line.partition(" (")[0] for line in warnings] == [
        "step 3: the query outputs are nearly equal",
        "step 3: the pictures hardly matter",  # to weights as they were drawn
    ]


def test_readings_have_the_values_of_what_they_measure(make):
    """Equal queries have the cosine 1, attention without questions the entropy 1, equal pictures the gap 0."""
    settings = make()
    model = loading.build(settings, report=lambda _: None)
    [batch] = maker_of(settings, model)[0].batches
    found = monitors.readings(model, batch)
    with torch.no_grad():
        outputs, _ = model.eval().look(batch)
        others = dataclasses.replace(batch, pixels=batch.pixels.roll(-1, 0))
        worse = float(model(others)["answer"] - model(batch)["answer"]) / model.objective.counts(batch)["answer"]
    pairs = [
        torch.cosine_similarity(row[one], row[two], dim=0)
        for row in outputs
        for one, two in itertools.combinations(range(4), 2)
    ]
    assert found["cosine"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5) and found["cosine"] < 0.9
    assert 0 < found["entropy"] < 1
    assert found["gap"] == pytest.approx(worse, abs=1e-6) and abs(worse) > 1e-5
    qformer = model.connector.qformer
    with torch.no_grad():
        qformer.queries[:] = qformer.queries[:1]
        for name, parameter in qformer.named_parameters():
            if "cross_attention.query" in name:
                parameter.zero_()
    equal = dataclasses.replace(batch, pixels=batch.pixels[:1].expand_as(batch.pixels))
    found = monitors.readings(model, equal)
    assert found == pytest.approx({"cosine": 1.0, "entropy": 1.0, "gap": 0.0}, abs=1e-5)


def test_the_gap_is_positive_where_another_samples_picture_makes_it_worse():
    class Sees(torch.nn.Module):
        """Loses half a nat a row on the picture of that number, and three on any other."""

        device = torch.device("cpu")
        objective = SimpleNamespace(counts=lambda batch: {"answer": 6})

        def look(self, batch):
            return torch.eye(3)[None, [0, 0, 1]], torch.tensor(0.25)

        def forward(self, batch):
            own = [read.picture == number for number, read in enumerate(batch.reads)]
            return {"answer": torch.tensor([0.5 if each else 3.0 for each in own]).sum()}

    rows = tuple((Slot(number), Text((1, 2), trained=True)) for number in range(3))
    batch = Batch(torch.zeros(3, 3, 1, 1), tuple(Read(number, (number,)) for number in range(3)), rows)
    found = monitors.readings(Sees(), batch)
    assert found == pytest.approx({"cosine": 1 / 3, "entropy": 0.25, "gap": 3 * (3.0 - 0.5) / 6})


def test_the_gap_is_measured_with_other_samples_pictures():
    def of(*rows):
        """Rows of pictures; every picture of every row has a read of its own."""
        reads = [Read(picture, (place,)) for place, row in enumerate(rows) for picture in row]
        slots = iter(range(len(reads)))
        made = tuple((*(Slot(next(slots)) for _ in row), Text((1,), trained=True)) for row in rows)
        return Batch(torch.zeros(max(map(max, rows)) + 1, 3, 1, 1), tuple(reads), made)

    def moved(*rows):
        found = monitors.with_others_pictures(of(*rows))
        return None if found is None else [read.picture for read in found.reads]

    assert moved([0], [1], [2], [1]) == [1, 2, 0, 2]
    assert moved([0, 1], [2, 3], [4, 5]) == [2, 3, 4, 5, 0, 1]
    assert moved([0, 1, 2, 3], [4, 5, 6, 7]) == [4, 5, 6, 7, 0, 1, 2, 3]
    assert moved([0], [0]) is None
    assert moved([0, 1], [1, 2]) is None


# -- processes --------------------------------------------------------------------------------------------------------

TRAIN = """
import os, sys
from accelerate import PartialState
from qformer import config
from qformer.train.loop import train

train(config.load(sys.argv[1], sys.argv[2:]), say=lambda _: None, quiet=True)
assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])
"""


@pytest.mark.slow
def test_a_run_of_two_processes_has_the_losses_of_one(make, tmp_path):
    """Whole runs under torchrun: the same losses and rates, step by step."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    changes = ["train.steps=6", "train.batch_size=7", "train.micro_batch_tokens=60"]
    lines = []
    for ranks in (1, 2):
        directory = make(*changes, name=f"ranks{ranks}").directory
        launch = ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={28900 + os.getpid() % 500}"]
        command = [sys.executable, "-m", *launch, str(script), f"{directory}.yaml", *changes]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        lines.append([json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()])
    one, pair = lines
    assert [line["step"] for line in pair] == [line["step"] for line in one] == list(range(1, 7))
    for alone, shared in zip(one, pair, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert shared["learning_rate"] == alone["learning_rate"]


@pytest.mark.parametrize(("first_of_all", "first_here", "mine"), [(True, True, 0), (False, True, 1), (False, False, 2)])
def test_processes_open_their_data_in_turn_and_none_waits_for_one_that_failed(
    monkeypatch, first_of_all, first_here, mine
):
    waits = []

    class State:
        num_processes, is_main_process, is_local_main_process = 4, first_of_all, first_here

        def wait_for_everyone(self):
            waits.append("wait")

    monkeypatch.setattr("accelerate.PartialState", State)
    processes = Processes(mine, State.num_processes)
    assert processes.in_turn(lambda: len(waits)) == mine
    assert len(waits) == 3

    def fail():
        raise DataError("the file is cut short")

    with pytest.raises(DataError, match="cut short"):
        processes.in_turn(fail)
    assert len(waits) == 6
