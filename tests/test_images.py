"""Pictures: opened safely or refused with a sentence, and transformed as torchvision does, chance by key."""

import io
import os
import signal
import threading
import time

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from qformer import images
from qformer.config import TransformConfig
from qformer.errors import DataError
from qformer.images import ImageTransform, load_image, picture_key

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def noise(width, height, seed=0):
    values = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(values)


def transform(mode="squash", size=32, interpolation="bicubic", **settings):
    return ImageTransform(TransformConfig(mode=mode, **settings), size, MEAN, STD, interpolation)


# -- opening ----------------------------------------------------------------------------------------------------------


def test_paths_bytes_and_pictures_open_alike(tmp_path):
    noise(9, 7).save(tmp_path / "a.png")
    opened = [
        load_image(source, 1000, "s")
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), noise(9, 7))
    ]
    assert all(numpy.array_equal(opened[0], each) and each.mode == "RGB" for each in opened)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no alarms")
def test_a_picture_that_never_ends_is_given_up_and_other_alarms_are_kept(tmp_path, monkeypatch):
    rung = []

    def ring(*_):
        rung.append(time.monotonic())

    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    os.mkfifo(tmp_path / "a.png")
    noise(9, 7).save(tmp_path / "b.png")
    monkeypatch.setattr(images, "PATIENCE", 0.2)
    try:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 30.0)
        began = time.monotonic()
        with pytest.raises(DataError, match=r"s: the picture .*a\.png is not open after 0\.2 seconds; check the file"):
            load_image(tmp_path / "a.png", 1000, "s")
        assert load_image(tmp_path / "b.png", 1000, "s").size == (9, 7)
        left = signal.getitimer(signal.ITIMER_REAL)[0]
        assert left == pytest.approx(30.0 - (time.monotonic() - began), abs=0.1)
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # one that comes first is left alone
        load_image(tmp_path / "b.png", 1000, "s")
        assert signal.getsignal(signal.SIGALRM) is ring
        while not rung:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGALRM, before[0])
        signal.setitimer(signal.ITIMER_REAL, *before[1])


def test_outside_the_main_thread_pictures_open_too(tmp_path):
    noise(9, 7).save(tmp_path / "a.png")
    found = []
    thread = threading.Thread(target=lambda: found.append(load_image(tmp_path / "a.png", 1000, "s").size))
    thread.start()
    thread.join()
    assert found == [(9, 7)]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture = noise(8, 8).convert("L").convert("I").convert("I;16") if mode == "I;16" else noise(8, 8).convert(mode)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    picture.save(file)
    assert load_image(file, 1000, "s").mode == "RGB"


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 100, "s").getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", 100, "s").size == (4, 6)


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, monkeypatch):
    encoded = io.BytesIO()
    noise(8, 8).save(encoded, "DDS")
    odd = bytearray(encoded.getvalue())
    odd[80] = 26  # pixel flags that no decoder knows
    with pytest.raises(DataError, match=r"sample 's': a picture is cut short or broken \(Unknown pixel format"):
        load_image(bytes(odd), 1000, "sample 's'")
    for raised, sentence in (
        (RuntimeError("Failed to decode image"), r"a\.avif is cut short or broken \(Failed to decode image\); fetch"),
        (PermissionError(13, "Permission denied"), r"a\.avif may not be read; change its permissions"),
    ):
        monkeypatch.setattr(images.Image, "open", lambda *_, raised=raised: (_ for _ in ()).throw(raised))
        with pytest.raises(DataError, match=sentence):
            load_image(tmp_path / "a.avif", 1000, "s")


def test_what_cannot_be_opened_is_named(tmp_path):
    noise(40, 40).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for source, sentence in (
        (tmp_path / "none.png", r"sample 's': the picture .*none\.png is missing"),
        (tmp_path / "cut.png", r"cut\.png is cut short or broken \(.*\); fetch it again\.$"),
        (tmp_path / "text.jpg", r"text\.jpg is not a picture that can be read; fetch it again or save it as PNG\.$"),
        (tmp_path / "empty.jpg", r"empty\.jpg is not a picture"),
        (tmp_path, "is a folder, not a picture; name a file in it"),
        (whole[:200], "sample 's': a picture is cut short"),
    ):
        with pytest.raises(DataError, match=sentence):
            load_image(source, 10_000, "sample 's'")


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    noise(100, 90).save(tmp_path / "large.png")
    monkeypatch.setattr(images, "_plain", lambda picture: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=r"100×90 pixels, more than data\.max_pixels \(8,999\)"):
        load_image(tmp_path / "large.png", 8_999, "s")


def test_pictures_are_told_apart_by_path_or_content(tmp_path):
    assert picture_key(tmp_path / "a.png") == str(tmp_path / "a.png")
    assert picture_key(tmp_path / "b" / "a.png", tmp_path) == "b/a.png" == picture_key("b/a.png")
    assert picture_key(noise(4, 4)) == picture_key(noise(4, 4)) != picture_key(noise(4, 4, seed=1))
    assert picture_key(noise(4, 8)) != picture_key(noise(8, 4))
    buffer = io.BytesIO()
    noise(4, 4).save(buffer, "PNG")
    assert picture_key(buffer.getvalue()) == picture_key(buffer.getvalue())


# -- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (32, 32), (20, 31), (33, 32)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash_and_crop_equal_torchvision(size, interpolation):
    picture = noise(*size)
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    squash = transforms.Compose([transforms.Resize((32, 32), FILTERS[interpolation]), *last])
    crop = transforms.Compose([transforms.Resize(32, FILTERS[interpolation]), transforms.CenterCrop(32), *last])
    assert torch.allclose(transform("squash", interpolation=interpolation)(picture), squash(picture), atol=1e-6)
    assert torch.allclose(transform("crop", interpolation=interpolation)(picture), crop(picture), atol=1e-6)


def test_padding_keeps_the_whole_picture():
    values = transform("pad")(Image.new("RGB", (64, 16), (255, 0, 0)))
    assert values.shape == (3, 32, 32)
    assert torch.allclose(values[:, :11].abs().max(), torch.tensor(0.0), atol=0.01)  # the mean colour, normalised
    assert torch.allclose(values[0, 16], torch.tensor((1 - MEAN[0]) / STD[0]), atol=1e-5)


def test_random_crops_belong_to_their_key():
    picture, cut = noise(48, 40), transform("random_crop", scale=[0.3, 0.9], flip=0.5)
    assert torch.equal(cut(picture, (0, "a")), cut(picture, (0, "a")))
    assert not torch.equal(cut(picture, (0, "a")), cut(picture, (1, "a")))
    assert not torch.equal(cut(picture, (0, "a")), cut(picture, (0, "b")))


def test_random_crops_have_the_area_and_shape_asked_for():
    """A picture whose colours are its coordinates shows which part was taken."""
    side = 256
    ramp = numpy.zeros((side, side, 3), dtype=numpy.uint8)
    ramp[..., 0], ramp[..., 1] = numpy.arange(side)[None], numpy.arange(side)[:, None]
    cut = ImageTransform(
        TransformConfig(mode="random_crop", scale=[0.25, 0.5], ratio=[0.8, 1.25]), 64, (0,) * 3, (1,) * 3, "nearest"
    )
    areas = []
    for number in range(200):
        values = cut(Image.fromarray(ramp), (number,)) * 255
        width, height = (float(values[channel].max() - values[channel].min()) + 1 for channel in (0, 1))
        areas.append(width * height / side**2)
        assert 0.75 < width / height < 1.33
    assert 0.22 < min(areas) < 0.28 and 0.46 < max(areas) < 0.53


def test_half_of_the_pictures_are_mirrored():
    picture = Image.fromarray(
        numpy.tile(numpy.array([[[0] * 3] * 16 + [[255] * 3] * 16], dtype=numpy.uint8), (32, 1, 1))
    )
    flipped = transform("squash", flip=0.5)
    left = [bool(flipped(picture, (number,))[0, 0, 0] > 0) for number in range(1000)]
    assert abs(sum(left) - 500) < 5 * 250**0.5


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = (numpy.arange(256).reshape(16, 16) * 257).astype(numpy.uint16)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    opened = load_image(tmp_path / "deep.png", 10_000, "record 1")
    assert numpy.array_equal(numpy.asarray(opened)[..., 0], shades >> 8)


def test_an_opened_picture_that_is_cut_short_is_refused(tmp_path):
    noise(64, 64).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with (
        Image.open(tmp_path / "a.png") as opened,
        pytest.raises(DataError, match="record 1: a picture is cut short"),
    ):
        load_image(opened, 10_000, "record 1")
