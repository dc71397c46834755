"""Videos and several pictures in one model: training, scoring, ranking and asking see the same reads in time order."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qformer
from qformer import cards, cli, config, exporting, gallery, loading, plugging, render
from qformer.assemble import Assembler, Item, Pixels, reads_of
from qformer.config import RunConfig
from qformer.data.batch import StepData, StepMaker, mixture_of, open_sources
from qformer.data.check import check
from qformer.data.index import Index
from qformer.data.jsonl import JsonLines
from qformer.errors import ConfigError, DataError
from qformer.evaluate.run import score
from qformer.sample import Batch, Row, Slot, Text, Video, row_length
from qformer.text import Rendered
from qformer.train import loop
from qformer.vlm import VLM
from tests import world
from tests.films import film, folder

QUERIES = 4
RECORDS: list[dict[str, Any]] = [
    {"id": "film", "video": "a.mp4", "instruction": "what colour is it"},
    {"id": "same film", "video": "a.mp4", "instruction": "is there a bird"},
    {"id": "frames", "video": "frames", "instruction": "what colour is it"},
    {"id": "picture", "image": "0.png", "instruction": "how many?"},
    {"id": "two", "images": ["1.png", "2.png"], "instruction": "is <image> left of <image> please"},
    {"id": "three", "images": ["0.png", "1.png", "2.png"], "instruction": "how many?"},
    {"id": "both", "images": ["0.png", "b.avi"], "instruction": "the thing left of <image> is <image> it"},
]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    film(root / "a.mp4", 12, "libx264")
    film(root / "b.avi", 9)
    folder(root / "frames", [f"{k}.png" for k in range(6)])
    for number, colour in enumerate(list(world.COLOURS.values())[:3]):
        Image.blend(
            Image.new("RGB", (48, 48), colour), Image.linear_gradient("L").resize((48, 48)).convert("RGB"), 0.4
        ).save(root / f"{number}.png")
    lines = [{**each, "target": "it is red", "candidates": ["it is red", "it is green indeed"]} for each in RECORDS]
    (root / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = "reader: jsonl, files: {records: records.jsonl, images: .}, template: instruction"
    (root / "colours.yaml").write_text(
        f"name: colours\nversion: 1\ntrain: {{{section}}}\n"
        f"eval: {{{section}, split: all, answer: rank, metric: accuracy}}\n"
        f"variants:\n  two: {{train: {{options: {{frames: 2}}}}}}\n"
        f"  written: {{eval: {{answer: generate, metric: exact_match, decoding: {{max_new_tokens: 4}}}}}}\n"
    )
    return root


@pytest.fixture
def make(towers: Path, data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*changes: str, name: str = "run", **more: Any) -> RunConfig:
        return world.settings(towers, data, tmp_path / name, *changes, **more)

    return make


BUILT: dict[tuple[str, int | None], VLM] = {}
"""By LLM and frames told apart: towers are read once for all tests."""


def build(settings: RunConfig) -> VLM:
    """A model whose every adapter weight is redrawn, but those that tell frames apart."""
    kind = settings.language.name, settings.qformer.frames
    if kind not in BUILT:
        model = BUILT[kind] = loading.build(settings, report=lambda _: None)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.connector.named_parameters():
                if "frame_embedding" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    own = copy.copy(BUILT[kind])
    own._modules = {**own._modules, "connector": copy.deepcopy(own.connector)}
    own.settings = settings
    return own.eval()


def maker_of(settings: RunConfig, assembler: Assembler, **changes: Any) -> StepMaker:
    chosen = cards.load_all(settings.data.tasks, "train")
    sources = open_sources(chosen, Path(settings.data.root), on_error=settings.data.on_error)
    values = {"batch_size": 7, "steps": 3, "soft_tokens": QUERIES, "on_error": settings.data.on_error, **changes}
    return StepMaker(mixture_of(sources, settings.data, {}, settings.seed), sources, assembler, **values)


def by_sample(data: StepData) -> dict[str, tuple[Batch, Row]]:
    return {name: (batch, row) for batch in data.batches for name, row in zip(batch.samples, batch.rows, strict=True)}


def slots(row: Row) -> list[Slot]:
    return [piece for piece in row if isinstance(piece, Slot)]


def shown(batch: Batch, row: Row) -> list[list[float]]:
    """The pixels behind each slot of a row."""
    return [batch.pixels[batch.reads[slot.read].picture].flatten().tolist() for slot in slots(row)]


# -- what a batch holds -----------------------------------------------------------------------------------------------


def test_frames_are_reads_in_time_order_and_a_video_is_opened_once(
    make: Callable[..., RunConfig], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qformer import videos

    opened = []
    frames = videos.frames
    monkeypatch.setattr(videos, "frames", lambda video, *more: (opened.append(video.path), frames(video, *more))[1])
    settings = make("vision.train_transform.mode=squash", "vision.train_transform.flip=0")
    [batch] = maker_of(settings, build(settings).assembler(training=True))[0].batches
    rows = dict(zip(batch.samples, batch.rows, strict=True))
    assert {name: [slot.frame for slot in slots(row)] for name, row in rows.items()} == {
        "film": [0, 1, 2, 3],
        "same film": [0, 1, 2, 3],
        "frames": [0, 1, 2, 3],
        "picture": [0],
        "two": [0, 0],
        "three": [0, 0, 0],
        "both": [0, 0, 1, 2, 3],
    }
    assert sorted(opened) == [data / "a.mp4", data / "b.avi", data / "frames"]
    assert len(batch.pixels) == 3 * 4 + 3  # each frame and each picture once
    assert (
        len(batch.reads) == 4 * 4 + 3 + 2 + 1
    )  # the film is read with two instructions; "how many?" of picture 0 once
    for name in ("film", "frames", "both"):
        brightness = [float(batch.pixels[batch.reads[slot.read].picture].mean()) for slot in slots(rows[name])[-4:]]
        assert brightness == sorted(brightness) and brightness[0] < brightness[-1] - 1
    for row in rows.values():
        assert row_length(row, QUERIES) == QUERIES * len(slots(row)) + sum(
            len(piece.ids) for piece in row if isinstance(piece, Text)
        )
    kinds = [type(piece).__name__ for piece in rows["both"]]
    assert kinds == ["Text", "Slot", "Text", "Slot", "Slot", "Slot", "Slot", "Text", "Text"]


def test_a_token_budget_counts_every_frame(make: Callable[..., RunConfig]) -> None:
    settings = make()
    assembler = build(settings).assembler(training=True)
    rows = [row_length(row, QUERIES) for _, row in by_sample(maker_of(settings, assembler)[0]).values()]
    budget = 2 * max(rows)
    batches = maker_of(settings, assembler, micro_batch_tokens=budget)[0].batches
    assert len(batches) > 1
    for batch in batches:
        assert max(row_length(row, QUERIES) for row in batch.rows) * len(batch.rows) <= budget


def test_the_number_of_frames_is_a_cards_option(make: Callable[..., RunConfig], data: Path) -> None:
    settings = make(f"data.tasks={{{data / 'colours.yaml'}:two: 1.0}}")
    [batch] = maker_of(settings, build(settings).assembler(training=True))[0].batches
    rows = dict(zip(batch.samples, batch.rows, strict=True))
    assert [slot.frame for slot in slots(rows["film"])] == [0, 1]
    files = {"records": data / "records.jsonl", "images": data}
    for wrong in (0, "four", True, 1025):
        with pytest.raises(ConfigError, match=f"options.frames is {wrong!r}; it takes a whole number from 1 to 1024"):
            JsonLines(files, {"frames": wrong}, "colours")


def test_all_frames_of_a_video_are_cropped_alike(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    gradient = Image.radial_gradient("L").resize((60, 40)).convert("RGB")
    for place in range(4):
        (tmp_path / "still").mkdir(exist_ok=True)
        gradient.save(tmp_path / "still" / f"{place}.png")
        gradient.save(tmp_path / f"{place}.png")
    assembler = build(make("vision.train_transform.scale=[0.2, 1.0]")).assembler(training=True)
    crops = []
    for key in ((0, 1), (0, 2)):
        pixels: Pixels = {}
        video = Item("v", (Video(tmp_path / "still"),), Rendered("what"))
        prepared = assembler.prepare(video, pixels, answered=False, key=key)
        first, *others = (pixels[name].values for name in prepared.pictures)
        assert len(others) == 3 and all(torch.equal(first, other) for other in others)
        crops.append(first)
    assert not torch.equal(*crops)
    apart: Pixels = {}
    pictures = Item("p", tuple(tmp_path / f"{place}.png" for place in range(4)), Rendered("what"))
    assembler.prepare(pictures, apart, answered=False, key=(0, 1))
    assert len({tuple(each.values.flatten().tolist()) for each in apart.values()}) == 4


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (1, 2)])
def test_ranks_and_workers_see_the_same_frames(make: Callable[..., RunConfig], ranks: int, workers: int) -> None:
    settings = make()
    assembler = build(settings).assembler(training=True)

    def seen(data: StepData) -> dict[str, list[list[float]]]:
        return {name: shown(batch, row) for name, (batch, row) in by_sample(data).items()}

    alone = maker_of(settings, assembler)
    makers = [maker_of(settings, assembler, rank=rank, ranks=ranks) for rank in range(ranks)]
    loaders = [iter(torch.utils.data.DataLoader(each, batch_size=None, num_workers=workers)) for each in makers]
    for step in range(2):
        together: dict[str, list[list[float]]] = {}
        for loader in loaders:
            together.update(seen(next(loader)))
        assert together == seen(alone[step])


def test_a_row_of_too_many_frames_is_refused(make: Callable[..., RunConfig], data: Path) -> None:
    assembler = build(make()).assembler(training=False)
    assembler.room = (30, QUERIES)
    item = Item("film", (Video(data / "a.mp4", 9),), Rendered("what"))
    with pytest.raises(
        DataError, match=r"film: its row takes \d+ positions, and the LLM has 30; .*look at fewer frames"
    ):
        assembler.prepare(item, {}, answered=False)


def test_marks_stand_for_whole_videos(make: Callable[..., RunConfig], data: Path) -> None:
    assembler = build(make()).assembler(training=False)
    item = Item("both", (Video(data / "a.mp4"), data / "0.png"), Rendered("<image> <image> <image>"))
    with pytest.raises(DataError, match="the instruction has 3 <image> marks and the record 2 pictures"):
        assembler.prepare(item, {}, answered=False)
    assert reads_of((data / "0.png", Video(data / "a.mp4", (1, 5)), data / "1.png")) == [0, range(1, 3), 3]


# -- training and scoring ---------------------------------------------------------------------------------------------


def test_a_batch_of_unlike_numbers_of_pictures_answers_as_one_by_one(
    make: Callable[..., RunConfig], data: Path
) -> None:
    for family in ("llama", "t5"):
        model = build(make(name=family, family=family))
        pictures = [
            [data / "a.mp4"],
            [data / "0.png"],
            [data / "1.png", data / "2.png"],
            [data / "0.png", data / "b.avi"],
        ]
        prompts = ["what colour is it", "how many?", "is <image> left of <image>", "how many?"]
        assert model.generate(pictures, prompts, max_new_tokens=6) == [
            model.generate([each], [prompt], max_new_tokens=6)[0]
            for each, prompt in zip(pictures, prompts, strict=True)
        ]
        together = model.rank(pictures, prompts, ["it is red", "two cats indeed"])
        alone = [
            model.rank([p], [t], ["it is red", "two cats indeed"])[0] for p, t in zip(pictures, prompts, strict=True)
        ]
        assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-4)
        assert model.rank([Video(data / "a.mp4", 2)], prompts[:1], ["it is red"])[0] != pytest.approx(together[0][:1])


def test_training_sees_what_scoring_sees(make: Callable[..., RunConfig], data: Path) -> None:
    """The loss of a row is minus the likelihood of its target as a candidate, videos and several pictures alike."""
    settings = make("vision.train_transform.mode=squash", "vision.train_transform.flip=0")
    model = build(settings)
    [batch] = maker_of(settings, model.assembler(training=True))[0].batches
    with torch.inference_mode():
        found, _ = model.language.log_likelihood(*model.seen(batch))
    records = {each["id"]: each for each in RECORDS}
    for name, likelihood in zip(batch.samples, found.tolist(), strict=True):
        record = records[name]
        names = record.get("images") or [record.get("image") or record["video"]]
        [[ranked]] = model.rank([[data / each for each in names]], [record["instruction"]], ["it is red"])
        assert ranked == pytest.approx(likelihood, abs=1e-3)


def test_a_run_trains_and_scores_with_workers_as_without(make: Callable[..., RunConfig], data: Path) -> None:
    short = ("train.steps=2", "train.batch_size=7", "qformer.frames=4", "data.workers=")
    runs = [
        loop.train(make(*short[:-1], f"data.workers={workers}", name=f"w{workers}"), quiet=True, say=lambda _: None)
        for workers in (0, 1)
    ]
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    model = qformer.load(runs[0])
    trained = model.connector.qformer.frame_embedding
    assert trained is not None and trained.shape == (3, 32) and bool(trained.abs().max() > 0)
    for card in ("", ":written"):
        loaded = cards.load_all([f"{data / 'colours.yaml'}{card}"], "eval")
        results = [
            score(
                model, loaded, data, directory=runs[0] / f"eval{size}", batch_size=size, shuffled=False, quiet=True,
                say=lambda _: None,
            )
            for size in (1, 7)
        ]  # fmt: skip
        assert [next(iter(each.values()))["samples"] for each in results] == [len(RECORDS)] * 2
        name = f"colours{card.replace(':', '.')}.predictions.jsonl"
        alone, lines = (
            [json.loads(line) for line in (runs[0] / f"eval{size}" / name).read_text().splitlines()] for size in (1, 7)
        )
        assert [each["prediction"] for each in alone] == [each["prediction"] for each in lines]
    named = {each["id"]: each["images"] for each in lines}
    assert named["film"] == ["a.mp4"] and named["frames"] == ["frames"] and named["both"] == ["0.png", "b.avi"]
    html = gallery.gallery("colours", lines, data)
    assert html.count('alt="a.mp4"') in (4, 8) and gallery.NO_PICTURE not in html


def test_a_video_that_cannot_be_decoded_is_listed(make: Callable[..., RunConfig], data: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(data, root)
    content = (root / "b.avi").read_bytes()
    (root / "b.avi").write_bytes(content[: len(content) // 3])
    (root / "frames" / "0.png").write_bytes(b"")
    strict = make(f"data.root={root}")
    assembler = build(strict).assembler(training=True)
    found = maker_of(strict, assembler)[0]
    assert found.error is not None and "\n" not in str(found.error)
    lenient = dataclasses.replace(strict, data=dataclasses.replace(strict.data, on_error="skip"))
    step = maker_of(lenient, assembler)[0]
    said = sorted(words for _, _, words in step.broken)
    assert len(said) == 2 and sum(len(batch.rows) for batch in step.batches) == 5
    assert said[0].startswith(f"both: the video {root / 'b.avi'} ") and said[1].startswith("frames: the picture ")
    card = cards.load(str(root / "colours.yaml"))
    checked = check(
        card, root, Index(root, None), every=True, seed=0, max_pixels=10**6, track=lambda *_: lambda _: None
    )
    assert [len(section.pictures) for section in checked.sections] == [2, 2]
    assert checked.sections[0].looked == 6


def test_records_of_videos_are_checked(data: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "a", "video": "a.mp4", "image": "0.png", "instruction": "what", "target": "red"},
        {"id": "b", "video": 7, "instruction": "what", "target": "red"},
        {"id": "c", "video": "../a.mp4", "instruction": "what", "target": "red"},
        {"id": "d", "video": "frames", "instruction": "what", "target": "red", "length": 3},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = JsonLines({"records": tmp_path / "r.jsonl", "images": data}, {"frames": 6}, "mine")
    for place, said in enumerate(
        (
            "it has a 'video' and pictures beside it; name all it is about as 'images'",
            "'video' holds 7 where text belongs",
            "leads out of files.images",
        )
    ):
        with pytest.raises(DataError, match=said):
            records[place]
    assert records[3].images == (Video(data / "frames", 6),)
    assert "video" not in records[3].fields and records[3].fields["length"] == 3


def test_a_still_gif_is_a_picture_wherever_it_is_not_called_a_video(tmp_path: Path) -> None:
    from qformer.vlm import _as_video

    Image.new("RGB", (40, 30), "red").save(tmp_path / "cover.gif")
    lines = [{"id": name, name: "cover.gif", "instruction": "what", "target": "red"} for name in ("image", "video")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = JsonLines({"records": tmp_path / "r.jsonl", "images": tmp_path}, {}, "mine")
    assert [sample.images for sample in records] == [(tmp_path / "cover.gif",), (Video(tmp_path / "cover.gif", 4),)]
    assert _as_video(str(tmp_path / "cover.gif")) == str(tmp_path / "cover.gif")
    assert gallery._shown("cover.gif", tmp_path).count("<img ") == 1


# -- the frame embedding ----------------------------------------------------------------------------------------------


def test_a_fresh_frame_embedding_changes_nothing_and_a_trained_one_later_frames_alone(
    make: Callable[..., RunConfig], data: Path
) -> None:
    without, fresh = build(make()), build(make("qformer.frames=4", name="fresh"))
    pictures = [[data / "a.mp4"], [data / "frames"], [data / "0.png"], [data / "1.png", data / "2.png"]]
    prompts = ["what colour is it"] * 4
    before = without.rank(pictures, prompts, ["it is red", "two cats"])
    assert fresh.rank(pictures, prompts, ["it is red", "two cats"]) == before
    learned = fresh.connector.qformer.frame_embedding
    assert learned is not None and not learned.any()
    assert torch.equal(without.connector.projection.weight, fresh.connector.projection.weight)
    with torch.no_grad():
        learned[2] = 0.5
    after = fresh.rank(pictures, prompts, ["it is red", "two cats"])
    assert after[2:] == before[2:] and after[0] != before[0] and after[1] != before[1]
    assert fresh.rank([Video(data / "a.mp4", 3)], prompts[:1], ["two cats"]) == without.rank(
        [Video(data / "a.mp4", 3)], prompts[:1], ["two cats"]
    )
    with pytest.raises(ConfigError, match=r"a video's frame 9 is read, and qformer.frames is 4; have so many looked"):
        fresh.rank([Video(data / "a.mp4", 9)], prompts[:1], ["two cats"])


def test_one_read_at_two_times_is_told_apart(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A film of two frames shows each of them twice: two reads, four slots, and four places in time."""
    folder(tmp_path / "short", ["0.png", "1.png"])
    model = build(make("qformer.frames=4"))
    with torch.no_grad():
        model.connector.qformer.frame_embedding.normal_()  # type: ignore[union-attr]
    batch = model.assembler(training=False)([Item("v", (Video(tmp_path / "short"),), Rendered("what"))], answered=False)
    soft, [row] = model.seen(batch)
    assert soft.shape[0] == 4 and [slot.read for slot in slots(row)] == [0, 1, 2, 3]
    plain = model.read(batch)
    shift = model.connector.qformer.frame_embedding @ model.connector.projection.weight.T  # type: ignore[operator]
    read = [batch.reads[slot.read].picture for slot in slots(batch.rows[0])]
    assert torch.allclose(soft[0], plain[read[0]])
    for frame in (1, 2, 3):
        assert torch.allclose(soft[frame], plain[slots(batch.rows[0])[frame].read] + shift[frame - 1], atol=1e-6)


def test_a_step_without_videos_gives_the_embedding_a_gradient_of_zero(make: Callable[..., RunConfig]) -> None:
    """Every process must have one for every parameter, whatever its share of a step holds."""
    settings = make("qformer.frames=4")
    model = build(settings)
    dummy = model.assembler(training=True).dummy(model.vision.settings.size)
    model.train()
    model(dummy)["answer"].backward()
    learned = model.connector.qformer.frame_embedding
    assert learned is not None and learned.grad is not None and not learned.grad.any()
    sum(model(batch)["answer"] for batch in maker_of(settings, model.assembler(training=True))[0].batches).backward()
    assert bool((learned.grad.abs().sum(1) > 0).all())


def test_the_embedding_is_saved_loaded_kept_under_another_llm_and_started_from(
    make: Callable[..., RunConfig], towers: Path, data: Path, tmp_path: Path
) -> None:
    model = build(make("qformer.frames=4"))
    learned = model.connector.qformer.frame_embedding
    assert learned is not None
    with torch.no_grad():
        learned.normal_()
    model.save(tmp_path / "adapter")
    loaded = qformer.load(tmp_path / "adapter")
    assert torch.equal(loaded.connector.qformer.frame_embedding, learned)  # type: ignore[arg-type]
    film_and_prompt = ([data / "a.mp4"], ["what colour is it"])
    assert loaded.rank(*film_and_prompt, ["two cats"]) == model.rank(*film_and_prompt, ["two cats"])
    other = plugging.plug(
        tmp_path / "adapter", world.towers(towers, "gpt2")["language"], start="random", report=lambda _: None
    )
    assert torch.equal(other.connector.qformer.frame_embedding, learned)  # type: ignore[arg-type]
    for frames, kept in ((None, True), (0, None), (8, False)):
        change = [] if frames is None else [f"qformer.frames={frames}"]
        init = f"qformer.init=[{{from: {tmp_path / 'adapter'}, parts: [norm, queries, embeddings, self_attention, "
        init += "cross_attention, query_feed_forward, text_feed_forward, projection]}]"
        if kept is True:
            init = f"qformer.init={tmp_path / 'adapter'}"
        settings = make(
            init, f"qformer.tokenizer={world.towers(towers, 'llama')['bert']}", *change, name=f"from{frames}"
        )
        started = loading.build(settings, report=lambda _: None).connector.qformer.frame_embedding
        if kept is None:
            assert started is None
        elif kept:
            assert torch.equal(started, learned)  # type: ignore[arg-type]
        else:
            assert started is not None and len(started) == 7 and not started.any()


def test_training_it_alone(make: Callable[..., RunConfig]) -> None:
    model = build(make("qformer.frames=4"))
    model.train_only(["frames"])
    assert list(model.trainable()) == ["connector.qformer.frame_embedding"]


def test_other_forms_have_no_place_for_it(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    model = build(make("qformer.frames=4"))
    tensors = model.connector.state_dict()
    size = dataclasses.replace(model.connector.size, vocabulary=30522)
    exporting.to_lavis(tensors, size, "llm_proj", 1e-5, tmp_path / "zero.pth")
    assert not any("frame" in name for name in torch.load(tmp_path / "zero.pth")["model"])
    with torch.no_grad():
        model.connector.qformer.frame_embedding[0] = 1.0  # type: ignore[index]
    with pytest.raises(ConfigError) as caught:
        exporting.to_lavis(model.connector.state_dict(), size, "llm_proj", 1e-5, tmp_path / "one.pth")
    assert str(caught.value) == (
        "LAVIS cannot express this model: it has no embedding of frames, and one of 4 was trained here "
        "(qformer.frames); export an adapter that was trained without."
    )
    with pytest.raises(
        ConfigError, match="transformers' InstructBLIP cannot express this model: it has no embedding of"
    ):
        exporting._without_frames(model.connector.state_dict(), "transformers' InstructBLIP")


def test_a_number_of_frames_that_cannot_be_told_apart_is_refused(make: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"qformer.frames is 1, and a single frame is told apart from nothing"):
        build(make("qformer.frames=1"))
    with pytest.raises(ConfigError, match=r"qformer.frames is -1; it must be at least 0"):
        make("qformer.frames=-1")


# -- for people -------------------------------------------------------------------------------------------------------


def test_rendering_shows_frames(make: Callable[..., RunConfig], data: Path) -> None:
    blocks = {block.plain.splitlines()[0]: block.plain for block in render.render(make(), 7)}
    assert f"  video        {data / 'a.mp4'} (4 frames, evenly spread)\n" in blocks["film"]
    for frame in (1, 2, 3, 4):
        assert f"⟨4 soft tokens of frame {frame} of 4 of video 1⟩" in blocks["film"]
    both = blocks["both"]
    places = [both.index(f"⟨4 soft tokens of {what}⟩") for what in ("picture 1", "frame 1 of 4 of video 2")]
    assert places == sorted(places)
    text = render.words_of(
        "colours", Item("x", (Video(data / "a.mp4", 1), Video(data / "b.avi", (3, 1))), Rendered("a"))
    )
    assert f"{data / 'a.mp4'} (the frame in the middle)" in text.plain
    assert f"{data / 'b.avi'} (frames 1, 3)" in text.plain


def test_a_video_can_be_asked_about(
    make: Callable[..., RunConfig],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(make())
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)
    short = ["--device", "cpu", "--max-new-tokens", "3"]
    answers = []
    for more in ([], ["--frames", "2"]):
        assert cli.main(["ask", str(tmp_path), str(data / "a.mp4"), "what colour is it", *short, *more]) == 0
        answers.append(capsys.readouterr().out)
    asked = ["what colour is it"]
    assert answers == [
        f"{model.generate([video], asked, max_new_tokens=3)[0]}\n"
        for video in (data / "frames/../a.mp4", Video(data / "a.mp4", 2))
    ]
    assert cli.main(["ask", str(tmp_path), "a.mp4", "what", "--frames", "0"]) == 2
    assert "ask.frames is 0; it must be at least 1" in capsys.readouterr().err
    assert cli.main(["ask", str(tmp_path), str(tmp_path / "gone.mp4"), "what", *short]) == 1
    said = capsys.readouterr().err
    assert "is missing; check its name and its folder." in said and "Traceback" not in said


def test_the_settings_say_it(make: Callable[..., RunConfig]) -> None:
    assert config.RunConfig().qformer.frames is None and make("qformer.frames=4").qformer.frames == 4
