"""The feature cache: what is kept is exact, whole, told beforehand, and found again whatever was killed."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from qformer import assemble, config, features, loading
from qformer import run as pipeline
from qformer.assemble import Item
from qformer.backbones.vision import FrozenTower, load_vision
from qformer.config import VisionConfig
from qformer.errors import ConfigError, DataError, TrainingError
from qformer.features import UNFINISHED, Cache, Tally, fingerprint
from qformer.sample import Video
from qformer.text import Rendered
from qformer.train import caching, loop
from qformer.train.caching import Cost
from tests import films, world
from tests.test_train import gradients, maker_of, run, same, weights_of

PLAIN = ("vision.train_transform.mode=squash", "vision.train_transform.flip=0")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def data(tmp_path):
    world.write_pictures(tmp_path / "data")
    for number in range(24):  # no two of one content
        file = tmp_path / "data" / "pictures" / f"{number}.png"
        with Image.open(file) as picture:
            picture.putpixel((5, 5), (10 * number, 0, 99))
            picture.save(file)
    return tmp_path / "data"


@pytest.fixture
def make(towers, data, tmp_path):
    """Settings of a run without chance in its pictures; `cache` names a folder for features."""

    def make(*changes, name="run", cache=None, **more):
        kept = () if cache is None else (f"vision.cache={tmp_path / cache}",)
        return world.settings(towers, data, tmp_path / name, *PLAIN, *kept, *changes, **more)

    return make


MODELS = {}


def built(settings, *, anew=False):
    """A model of these settings; the same for all tests of one LLM, but for those that change it."""
    if anew:
        return loading.build(settings, report=lambda _: None)
    model = MODELS.setdefault(settings.language.name, None) or loading.build(settings, report=lambda _: None)
    MODELS[settings.language.name], model.settings = model, settings
    return model


def filled(settings, model, step=0, **changes):
    """The filler of a run, and a step's data before and after it did its work."""
    kept = features.filler(settings, model.vision, training=True, say=lambda _: None)
    maker = maker_of(settings, model, **changes)
    maker.assembler.cache = kept.cache
    data = maker[step]
    before = list(data.batches)
    data.batches = kept.complete(data.batches, data.tally)
    kept.flush()
    return kept, before, data


class Completed:
    """A maker whose batches come out of the cache."""

    def __init__(self, maker, kept):
        self.maker, self.kept, self.assembler = maker, kept, maker.assembler
        self.assembler.cache = kept.cache

    def __getitem__(self, step):
        data = self.maker[step]
        data.batches = self.kept.complete(data.batches, data.tally)
        return data


def cached_files(folder):
    return sorted(file for file in Path(folder).rglob("*.safetensors"))


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_loss_and_gradients_are_those_without_a_cache(make, family):
    model = built(make(family=family))
    expected, gradient = gradients(model, maker_of(model.settings, model, micro_batch_tokens=60))
    ways = [("float32", 1e-5, 1e-4)]
    if family == "llama":
        ways += [("float16", 1e-3, 1e-2), ("bfloat16", 1e-2, 1e-1)]
    for dtype, bound, bound_of_gradients in ways:
        settings = make(f"vision.cache_dtype={dtype}", cache="kept", family=family)
        kept = features.filler(settings, model.vision, training=True, say=lambda _: None)
        for state in ("cold", "warm"):
            maker = Completed(maker_of(settings, model, micro_batch_tokens=60), kept)
            assert len(maker[0].batches) > 1
            report, found = gradients(model, maker)
            assert report.counts == expected.counts
            assert report.loss == pytest.approx(expected.loss, rel=bound), (dtype, state)
            for name, value in gradient.items():
                if not name.endswith("key.bias"):
                    assert (found[name] - value).norm() <= bound_of_gradients * value.norm(), (dtype, state, name)
        assert kept.made == 6 and kept.size == 17 * 24 * (4 if dtype == "float32" else 2)


def test_features_are_computed_in_the_runs_precision(make):
    settings = make("train.precision=bfloat16", cache="kept")
    model = built(settings)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        exact = model.vision(pixels).values
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.vision(pixels).values
    found = features.filler(settings, model.vision, training=True, say=print).encode(pixels)
    answering = features.filler(settings, model.vision, training=False, say=print).encode(pixels)
    assert (found - coarse).norm() < 0.2 * (found - exact).norm()
    torch.testing.assert_close(answering, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_tower_in_half_precision_computes_in_its_own_with_a_cache_as_without(make, dtype):
    settings = make("train.precision=bfloat16", f"vision.dtype={dtype}", cache="kept")
    model, pixels = built(settings, anew=True), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cast = []
    model.vision.register_forward_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.encode(pixels).values.float()
    fillers = [features.filler(settings, model.vision, training=training, say=print) for training in (True, False)]
    assert fillers[0].cache.folder == fillers[1].cache.folder
    for kept in fillers:
        assert (kept.encode(pixels).float() - wanted).norm() < 0.02 * wanted.norm()
    assert len(cast) > 2 and not any(cast)


def test_a_run_gives_the_same_bits_whatever_was_kept_when_it_began(make, tmp_path, monkeypatch):
    changes = ("train.steps=5", "train.checkpoint_every=2", "qformer.dropout=0.1", "vision.cache_dtype=float16")
    cold = weights_of(run(make(*changes, name="cold", cache="kept")))
    assert same(cold, weights_of(run(make(*changes, name="warm", cache="kept"))))
    halves, write, left = make(*changes, name="halves", cache="other"), Cache.write, iter(range(17))

    def stop_in_the_midst(self, key, values):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(self, key, values)

    monkeypatch.setattr(Cache, "write", stop_in_the_midst)
    with pytest.raises(KeyboardInterrupt):
        run(halves)
    monkeypatch.undo()
    assert len(cached_files(tmp_path / "other")) < len(cached_files(tmp_path / "kept"))
    assert same(cold, weights_of(run(halves)))


def test_a_run_goes_on_with_a_cache_that_began_without(make):
    expected = weights_of(run(make("train.steps=2", name="without")))
    run(make("train.steps=1", name="mixed"))
    found = weights_of(run(make("train.steps=2", name="mixed", cache="kept")))
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name
    with pytest.raises(ConfigError, match=r"vision\.cache_dtype was None and is 'float16'"):
        run(make("train.steps=3", "vision.cache_dtype=float16", name="mixed", cache="kept"))


def test_what_is_made_of_a_picture_does_not_depend_on_those_beside_it(make):
    settings = make(cache="kept")
    model = built(settings, anew=True)
    kept = features.filler(settings, model.vision, training=True, say=print)
    pictures = torch.randn(11, 3, 32, 32)
    together = kept.encode(pictures)
    assert kept.at_once == features.AT_ONCE
    assert torch.equal(torch.cat([kept.encode(each[None]) for each in pictures]), together)
    moody = features.filler(settings, model.vision, training=True, say=print)
    places = torch.arange(features.AT_ONCE).float()[:, None, None]
    tower = model.vision.read
    model.vision.read = lambda pixels: tower(pixels)._replace(
        values=tower(pixels).values + (places if len(pixels) == features.AT_ONCE else 0)
    )
    assert moody.at_once == 1
    torch.testing.assert_close(moody.encode(pictures), together, rtol=1e-5, atol=1e-5)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_other_weights_another_build_or_another_view_have_a_folder_of_their_own(make, towers, tmp_path):
    whole = load_vision(make().vision)

    def folder(*changes, training=True, spoil=None):
        settings = make(*changes, cache="kept")
        tower = whole
        if spoil or "vision." in "".join(changes):
            tower = load_vision(settings.vision)
        if spoil:
            spoil(tower.model)
        return features.filler(settings, tower, training=training, say=print).cache.folder

    def one_weight(model):
        with torch.no_grad():
            next(model.parameters()).view(-1)[7] += 1e-3

    def heads(model):
        model.layers[0].attention.num_attention_heads = 2

    own = folder()
    assert folder(training=False) == own  # answering sees what training saw
    assert folder("vision.revision=null") == own  # an encoder that was loaded anew
    others = [
        folder(spoil=one_weight),
        folder(spoil=heads),
        folder("vision.block=-2"),
        folder("vision.norm=false"),
        folder("vision.class_token=false"),
        folder("vision.dtype=bfloat16"),
        folder("vision.mean=[0.4, 0.5, 0.5]"),
        folder("vision.train_transform.mode=pad"),
        folder("vision.eval_transform.mode=crop", training=False),
        folder("vision.cache_dtype=float16"),
        folder("train.precision=bfloat16"),
        folder("data.max_pixels=1000"),
    ]
    assert len({own, *others}) == 1 + len(others)
    told = json.loads((own / "way.json").read_text())
    assert told["pictures"]["mode"] == "squash" and told["tower"] == fingerprint(whole.model)


def test_a_picture_is_known_by_its_content(make, data):
    settings = make(cache="kept")
    model = built(settings)
    kept, before, _ = filled(settings, model)
    assert len(before[0].keys) == 6 and before[0].features is None
    shutil.move(data / "pictures" / "0.png", data / "aside.png")
    for number in range(24):
        if number:
            Image.new("RGB", (9, 9), (number, 0, 0)).save(data / "pictures" / f"{number}.png")
    shutil.copy(data / "aside.png", data / "pictures" / "0.png")
    _, before, data_ = filled(settings, model)
    seen = {name for batch in before for name in batch.samples}
    assert len(before[0].keys) == len(seen - {"r0"}) and data_.tally.read == len(seen & {"r0"})
    assert len(cached_files(kept.cache.folder)) == 6 + len(seen - {"r0"})


@pytest.mark.parametrize("given", ["path", "bytes", "opened"])
def test_pictures_of_every_kind_are_kept(make, data, given):
    settings = make(cache="kept")
    model = built(settings)
    kept = features.filler(settings, model.vision, training=False, say=print)
    file = data / "pictures" / "0.png"
    with Image.open(file) as image:
        picture = {"path": file, "bytes": file.read_bytes(), "opened": image.copy()}[given]
    item = Item("one", (picture,), Rendered("what colour is it"))
    whole = model.assembler(training=False)([item], answered=False)
    assembler = model.assembler(training=False, cache=kept.cache)
    first = assembler([item], answered=False)
    assert len(first.pixels) == 1 and torch.equal(first.pixels, whole.pixels)
    kept.complete([first])
    kept.flush()
    again = assembler([item], answered=False)
    assert again.pictures == 1 and not len(again.pixels) and assembler.tally.read == 1
    torch.testing.assert_close(model.tokens(again).values, model.tokens(whole).values, rtol=1e-4, atol=1e-5)


def test_frames_of_folders_and_files_are_kept(make, tmp_path):
    settings = make(cache="kept")
    model = built(settings)
    kept = features.filler(settings, model.vision, training=False, say=print)
    stills = films.folder(tmp_path / "stills", [f"{place}.png" for place in range(5)])
    film = films.film(tmp_path / "film.mp4", 12)
    items = [Item("one", (Video(stills), Video(film), Video(film, (1, 3))), Rendered("what colour is it"))]
    whole = model.assembler(training=False)(items, answered=False)
    assembler = model.assembler(training=False, cache=kept.cache)
    first = assembler(items, answered=False)
    assert torch.equal(first.pixels, whole.pixels) and len(first.keys) == 10
    [made] = kept.complete([first])
    kept.flush()
    [again] = kept.complete([assembler(items, answered=False)])
    assert assembler.tally.read == 10 and assembler.tally.opened == 10
    assert torch.equal(again.features, made.features)
    torch.testing.assert_close(model.tokens(again).values, model.tokens(whole).values, rtol=1e-4, atol=1e-5)


def test_a_video_that_changes_while_it_is_read_is_not_kept(make, tmp_path, monkeypatch):
    settings = make(cache="kept")
    model = built(settings)
    kept = features.filler(settings, model.vision, training=False, say=print)
    film, frames = films.film(tmp_path / "film.mp4", 5), assemble.videos.frames

    def replaced(*arguments):
        with film.open("ab") as file:
            file.write(b"more")
        yield from frames(*arguments)

    monkeypatch.setattr(assemble.videos, "frames", replaced)
    with pytest.raises(DataError, match=r"one: the video .*film\.mp4 was changed while it was read; start again"):
        model.assembler(training=False, cache=kept.cache)(
            [Item("one", (Video(film),), Rendered("what"))], answered=False
        )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: file.unlink(), r"r\d+: the picture .*\.png is missing"),
        (lambda file: file.write_bytes(b"no picture"), r"r\d+: the picture .*\.png is not a picture"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), r"r\d+: the picture .*\.png is cut short or broken"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said_as_without_a_cache(make, data, spoil, sentence):
    for file in (data / "pictures").iterdir():
        spoil(file)
    settings = make(cache="kept")
    model = built(settings)
    maker = maker_of(settings, model)
    maker.assembler.cache = features.filler(settings, model.vision, training=True, say=print).cache
    with pytest.raises(DataError, match=sentence):
        raise maker[0].error


# -- what is saved ----------------------------------------------------------------------------------------------------


def test_nothing_is_opened_or_encoded_that_is_there(make, monkeypatch):
    settings = make(cache="kept")
    model = built(settings)
    kept, _, expected = filled(settings, model)
    maker = maker_of(settings, model)
    maker.assembler.cache = kept.cache
    monkeypatch.setattr(assemble.images, "load_image", None)
    monkeypatch.setattr(FrozenTower, "forward", None)
    for workers in (0, 1):
        data = next(iter(torch.utils.data.DataLoader(maker, batch_size=None, num_workers=workers)))
        assert (data.tally.read, data.tally.opened) == (6, 0)
        [batch] = kept.complete(data.batches, data.tally)
        assert torch.equal(batch.features, expected.batches[0].features)
        assert model.tokens(batch).values.shape == (6, 17, 24)


def test_a_picture_of_two_micro_batches_is_encoded_once(make, data):
    lines = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
    (data / "records.jsonl").write_text(
        "".join(json.dumps({**line, "image": "pictures/0.png"}) + "\n" for line in lines)
    )
    settings = make(cache="kept")
    kept, before, _ = filled(settings, built(settings), micro_batch_tokens=40)
    assert len(before) > 2 and kept.made == 1


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],
        lambda content: content[:3],
        lambda content: b"",
        lambda content: content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
    ],
)
def test_a_damaged_file_is_made_again_and_that_is_said(make, damage):
    settings = make(cache="kept")
    model = built(settings)
    kept, _, expected = filled(settings, model)
    [file, *_] = cached_files(kept.cache.folder)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    said = []
    again = features.filler(settings, model.vision, training=True, say=said.append)
    maker = maker_of(settings, model)
    maker.assembler.cache = again.cache
    for _ in range(2):
        data = maker[0]
        [batch] = again.complete(data.batches, data.tally)
        again.flush()
    assert said == [f"{file}: its features are not whole, and are made again"]
    assert file.read_bytes() == content and torch.equal(batch.features, expected.batches[0].features)


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_written(make, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(self, content):
        if UNFINISHED in self.parts and b"crc32" in content:
            write(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"it cannot be written \(No space left on device\); make room there, or"):
        run(make(cache="kept"))
    assert not cached_files(tmp_path / "kept") and not [*(tmp_path / "kept").glob(f"*/{UNFINISHED}/*.*")]


def test_killed_in_the_midst_of_writing_no_file_is_half_there(tmp_path):
    """Two processes write the same pictures at once, and are killed."""
    cache = Cache(tmp_path)
    values = torch.randn(64, 512)
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            end, number = time.monotonic() + 5, 0
            try:
                while time.monotonic() < end:
                    cache.write(f"{number:02x}{number}", values + number)
                    number = (number + 1) % 97
            finally:
                os._exit(1)
        children.append(child)
    time.sleep(0.5)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    tally = Tally()
    found = {number: cache.read(f"{number:02x}{number}", tally) for number in range(97)}
    assert not tally.damaged and sum(each is not None for each in found.values()) > 5
    assert all(each is None or torch.equal(each, values + number) for number, each in found.items())


def test_what_killed_processes_left_is_removed_after_a_day(make):
    settings = make(cache="kept")
    tower = load_vision(settings.vision)
    folder = features.filler(settings, tower, training=True, say=print).cache.folder / UNFINISHED
    for name in ("new", "old"):
        (folder / name).write_text("half")
    (folder / "trial").mkdir()
    for name in ("old", "trial"):
        os.utime(folder / name, (0, 0))
    features.filler(settings, tower, training=True, say=print)
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_numbers_that_a_type_cannot_hold_are_refused(make):
    settings = make("vision.cache_dtype=float16", cache="kept")
    model = built(settings, anew=True)
    with torch.no_grad():
        model.vision.model.layernorm.bias.fill_(1e6)
    kept = features.filler(settings, model.vision, training=True, say=print)
    with pytest.raises(TrainingError, match=r"cache_dtype is float16, which ends at 65504, and .* gives 1e\+06; set"):
        kept.encode(torch.zeros(1, 3, 32, 32))


# -- settings and what is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "chance"),
    [
        (("vision.train_transform.mode=random_crop",), r"vision\.train_transform .*\(mode: random_crop\)"),
        (("vision.train_transform.flip=0.5",), r"vision\.train_transform .*\(flip: 0\.5\)"),
        (("vision.eval_transform.mode=random_crop",), r"vision\.eval_transform .*\(mode: random_crop\)"),
    ],
)
def test_chance_in_the_transforms_is_refused_before_anything_is_read(make, changes, chance):
    with pytest.raises(ConfigError, match=rf"vision\.cache keeps one view of each picture, and {chance}; set vision"):
        make(*changes, cache="kept")


def test_a_folder_that_cannot_be_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"vision\.cache is .*file, where nothing can be written \(Not a directory\)"):
        run(make(cache="file"))


def test_size_cost_and_what_was_done_are_said(make, data, tmp_path):
    said = []
    validated = (f"validation.tasks=[{data / 'colours.yaml'}]", "validation.limit=7")
    settings = make("train.steps=8", *validated, cache="kept")
    loop.train(settings, say=said.append, quiet=True)
    told = [line for line in said if "vision.cache" in line]
    assert "kept in" in told[0] and "1.6 KB a picture; 0 are there already, and" in told[0]
    assert told[1] == "vision.cache: 24 pictures are drawn in this run, whose features take 39.2 KB"
    assert told[2] == "vision.cache: up to 7 of the validation's samples come on top, as it meets them"
    assert "(8 pictures)" in told[3] and ("each is seen 2.0 times" in told[3] or "does not pay here" in told[3])
    assert told[4] == "vision.cache: features were read 32 times and made for 24 pictures"
    assert len(cached_files(tmp_path / "kept")) == 24
    [file, *_] = cached_files(tmp_path / "kept")
    file.write_bytes(b"")
    said.clear()
    loop.train(make("train.steps=8", name="next", cache="kept"), say=said.append, quiet=True)
    assert "24 are there already" in next(line for line in said if "vision.cache" in line)
    assert any("not whole" in line for line in said)


def test_a_cache_that_does_not_fit_is_refused_with_what_it_takes(make, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    sentence = (
        r"has 20\.0 KB left, and the features of the more than 13 pictures of this run take 21\.2 KB \(1\.6 KB each\); "
        r"name a folder on a larger disk, set vision\.cache_dtype: bfloat16, draw from fewer"
    )
    with pytest.raises(ConfigError, match=sentence):
        run(make(cache="kept"))
    assert not cached_files(tmp_path / "kept")
    run(make("vision.cache_dtype=bfloat16", "train.steps=3", cache="kept"))
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=0))
    run(make("vision.cache_dtype=bfloat16", "train.steps=3", name="next", cache="kept"))  # all of it is there


def test_a_runs_pictures_are_counted_from_its_records(make, data):
    settings = make()
    model = built(settings)
    maker = maker_of(settings, model, steps=10, batch_size=6)
    assert caching._count(maker, 0, most=1000) == (24, 60.0, True)
    assert caching._count(maker, 8, most=1000) == (12, 12.0, True)
    assert caching._count(maker, 0, most=5) == (6, 0.0, False)
    numbers = {maker.mixture.draw(number).place for number in range(48, 60)}
    assert numbers == set(maker.mixture.places(48, 60)["colours"])


@pytest.mark.parametrize(
    ("cost", "from_", "words"),
    [
        (Cost(8, 30.0, 10.0, 2.0, 1.0), 2, "each is seen 2.5 times: it pays"),
        (Cost(8, 2.0, 1.0, 3.0, 2.0), 5, "each is seen 2.5 times: it does not pay in this run, but may in the next"),
        (Cost(8, 0.5, 0.5, 1.0, 1.5), math.inf, "reading is no faster, so it does not pay here"),
    ],
)
def test_whether_it_pays_is_reckoned(cost, from_, words):
    assert cost.pays_from == from_ and words in cost.verdict(2.5)
    made = cost.opening + cost.encoding
    if from_ < math.inf:
        assert from_ * made > made + cost.writing + (from_ - 1) * cost.reading
        assert cost.verdict(None).endswith(f"from a picture's use number {from_}")
        assert from_ == 2 or (from_ - 1) * made <= made + cost.writing + (from_ - 2) * cost.reading


def test_scores_are_those_without_a_cache_and_the_second_time_nothing_is_opened(make, data, tmp_path, monkeypatch):
    settings = make("train.steps=2", cache="kept")
    directory = run(settings)
    shutil.copytree(tmp_path / "kept", tmp_path / "aside")
    said, found = [], {}

    def score(output):
        pipeline.score(
            directory, [str(data / "colours.yaml")], data, output=output, shuffled=False, say=said.append, quiet=True
        )
        return [json.loads(line) for line in (output / "colours.predictions.jsonl").read_text().splitlines()]

    found["kept"] = score(tmp_path / "one")
    [told] = [line for line in said if "1.6 KB a picture; 12 are there already" in line]
    assert told.endswith("; 24 samples of a picture each add 39.2 KB")
    with monkeypatch.context() as patched:
        patched.setattr(assemble.images, "load_image", None)
        found["again"] = score(tmp_path / "two")
    shutil.rmtree(tmp_path / "kept")
    found["without"] = score(tmp_path / "three")
    assert not (tmp_path / "kept").exists()
    for way in ("again", "without"):
        for one, other in zip(found["kept"], found[way], strict=True):
            assert one.keys() == other.keys() and one["prediction"] == other["prediction"]


def test_settings_are_saved_and_read_back(make, tmp_path):
    settings = make("vision.cache_dtype=float16", cache="kept")
    config.save(settings, tmp_path / "saved.yaml")
    assert config.load(tmp_path / "saved.yaml").vision == settings.vision
    with pytest.raises(ConfigError, match="cache_dtype"):
        make("vision.cache_dtype=int8", cache="kept")
    assert VisionConfig().cache is None


def test_two_processes_share_a_cache(make, tmp_path):
    """What one has kept meanwhile, the other does not encode."""
    settings = make(cache="kept")
    model = built(settings)
    one, two = (features.filler(settings, model.vision, training=True, say=print) for _ in range(2))
    maker = maker_of(settings, model)
    maker.assembler.cache = one.cache
    mine, its = maker[0].batches, maker[0].batches
    [first] = one.complete(mine)
    one.flush()
    [second] = two.complete(its)
    assert (one.made, two.made) == (6, 0) and torch.equal(first.features, second.features)
