"""Encoders of one's own, for pictures and other signals, and another encoder under a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qformer import loading, weights
from qformer.backbones.vision import OwnTower, VisionSettings
from qformer.config import RunConfig
from qformer.errors import ConfigError
from qformer.nn.tokens import Tokens
from qformer.sample import Batch, Read
from qformer.text import Rendered
from qformer.vlm import VLM
from tests import world
from tests.tiny import tiny_vision


class Spectrogram:
    """Power of the 17 pitches in windows of 32 samples: sounds (B, S) -> tokens (B, P, 17); silence is no token."""

    width = 17

    def __call__(self, sounds: Tensor) -> Tokens:
        windows = sounds.unfold(1, 32, 16)
        return Tokens(torch.fft.rfft(windows).abs().log1p(), windows.abs().sum(-1) > 0)


class Gait(nn.Module):
    """Three axes of an accelerometer (B, 3, S) -> tokens (B, P, 12), as a plain tensor."""

    width, name = 12, "gait"

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(3, 12, kernel_size=8, stride=4)
        self.noise = nn.Dropout(0.5)

    def forward(self, axes: Tensor) -> Tensor:
        return self.noise(self.filter(axes)).transpose(1, 2)


class Patches:
    """Pictures (B, 3, 16, 16) -> their 16 patches as they are."""

    width = 48
    settings = VisionSettings(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", patch=4)

    def __call__(self, pixels: Tensor) -> Tokens:
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        return Tokens(patches.flatten(3).flatten(1, 2), None, (4, 4))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.fixture
def settings(towers: Path, tmp_path: Path) -> RunConfig:
    return world.settings(towers, tmp_path, tmp_path / "run")


def sounds() -> Tensor:
    """A low and a high tone, and the low one again, shorter, with silence behind it."""
    time = torch.arange(320) / 320
    tones = torch.stack([torch.sin(time * 2 * torch.pi * pitch) for pitch in (12, 90, 12)])
    tones[2, 160:] = 0
    return tones


def movements() -> Tensor:
    return torch.randn(3, 3, 40, generator=torch.Generator().manual_seed(4))


SIGNALS: list[tuple[Any, Any]] = [(Spectrogram, sounds), (Gait, movements)]


def questions(vlm: VLM, signals: Tensor) -> Batch:
    """The same question about each signal, with another answer for the second."""
    joiner = vlm.joiner()
    asked = [Rendered("what is it", answer) for answer in ("it is red", "no", "it is red")]
    return Batch(
        pixels=signals,
        reads=tuple(Read(number, joiner.read_ids("what is it")) for number in range(3)),
        rows=tuple(joiner.row(rendered, [number], answered=True) for number, rendered in enumerate(asked)),
        samples=("low", "high", "short"),
    )


@pytest.mark.parametrize(("encoder", "signals"), SIGNALS)
def test_an_adapter_learns_to_read_other_signals(settings: RunConfig, encoder: Any, signals: Any) -> None:
    own = encoder()
    vlm = loading.build(settings, vision=own, report=str).train()
    batch = questions(vlm, signals())
    assert vlm.read(batch).shape == (3, 4, vlm.language.width)
    before = {name: tensor.clone() for name, tensor in vlm.vision.state_dict().items()}
    optimizer = torch.optim.AdamW(vlm.trainable().values(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = vlm(batch)["answer"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    norm = vlm.connector.norm.weight.grad
    assert norm is not None and norm.shape == (encoder.width,) and norm.abs().sum() > 0
    assert not any(name.startswith("vision") for name in vlm.trainable())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vlm.vision.state_dict().items())


def test_an_encoders_mask_keeps_silence_out(settings: RunConfig) -> None:
    vlm = loading.build(settings, vision=Spectrogram(), report=str).eval()
    ids = torch.tensor([vlm.joiner().read_ids("what is it")])
    padded = sounds()[2:]
    alone = padded[:, :160]
    # Windows that reach into the silence are tokens too, so the cut is where one begins.
    assert vlm.vision(padded).mask.sum() == vlm.vision(alone).mask.sum() + 1
    kept = torch.nn.functional.pad(alone, (0, 16))
    torch.testing.assert_close(vlm.soft_prompts(padded, ids), vlm.soft_prompts(kept, ids), rtol=1e-5, atol=1e-5)


def test_an_encoder_of_ones_own_stays_frozen_and_in_evaluation_mode(settings: RunConfig) -> None:
    vlm = loading.build(settings, vision=Gait(), report=str).train()
    assert isinstance(vlm.vision, OwnTower)
    assert not any(module.training for module in vlm.vision.modules())
    assert torch.equal(vlm.vision(movements()).values, vlm.vision(movements()).values)


@pytest.mark.parametrize(("encoder", "signals"), SIGNALS)
def test_an_adapter_of_such_an_encoder_is_saved_and_loaded_with_it(
    settings: RunConfig, tmp_path: Path, encoder: Any, signals: Any
) -> None:
    torch.manual_seed(3)
    own = encoder()
    vlm = loading.build(settings, vision=own, report=str).eval()
    vlm.save(tmp_path / "adapter")
    told: list[str] = []
    loaded = loading.load(tmp_path / "adapter", vision=own, report=told.append)
    assert len(told) == 1 and "made: nothing" in told[0]
    ids = torch.tensor([vlm.joiner().read_ids("what is it")] * 3)
    assert torch.equal(loaded.soft_prompts(signals(), ids), vlm.soft_prompts(signals(), ids))
    name = getattr(encoder, "name", "Spectrogram")
    with pytest.raises(
        ConfigError, match=rf"vision\.name is 'callable:{name}', an encoder that was given as a callable"
    ):
        loading.load(tmp_path / "adapter")


def test_an_encoder_that_says_how_its_pictures_are_made_answers_about_files(settings: RunConfig) -> None:
    vlm = loading.build(settings, vision=Patches(), report=str)
    answers = vlm.generate([Image.new("RGB", (30, 20), "red")], ["what colour is it"], max_new_tokens=3)
    assert len(answers) == 1
    blind = loading.build(settings, vision=Spectrogram(), report=str)
    with pytest.raises(ConfigError, match="'callable:Spectrogram' does not say how pictures are made for it"):
        blind.generate([Image.new("RGB", (30, 20))], ["what colour is it"])


def test_an_encoder_without_a_width_or_with_another_one_is_refused(settings: RunConfig) -> None:
    with pytest.raises(
        ConfigError, match="was given as a callable, and its width is None; give it an attribute `width`"
    ):
        loading.build(settings, vision=lambda signals: signals, report=str)
    wrong = Spectrogram()
    wrong.width = 16
    vlm = loading.build(settings, vision=wrong, report=str)
    with pytest.raises(ConfigError, match=r"gave \(3, 19, 17\) for 3 signals; it is to give tokens \(3, P, 16\)"):
        vlm.encode(sounds())


# -- another encoder under a saved adapter ----------------------------------------------------------------------------


@pytest.fixture
def adapter(settings: RunConfig, tmp_path: Path) -> tuple[VLM, Path]:
    """A model on the tiny ViT (24 wide), with every adapter weight redrawn, and where its adapter is."""
    vlm = loading.build(settings, report=str)
    with torch.no_grad():
        for parameter in vlm.connector.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    vlm.save(tmp_path / "adapter")
    return vlm, tmp_path / "adapter"


ANEW = {
    "norm.weight", "norm.bias",
    "qformer.blocks.0.cross_attention.key.weight", "qformer.blocks.0.cross_attention.value.weight",
}  # fmt: skip


def test_another_encoder_keeps_what_fits_and_lists_what_was_made_anew(
    adapter: tuple[VLM, Path], tmp_path: Path
) -> None:
    vlm, place = adapter
    wider = str(tiny_vision(tmp_path / "wider", width=32))
    told: list[str] = []
    swapped = loading.load(place, vision=wider, strict=False, report=told.append)
    [table] = told
    before, after = vlm.connector.state_dict(), swapped.connector.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == ANEW
    assert f"was trained on '{vlm.settings.vision.name}' of width 24, and '{wider}' is 32 wide" in table
    kept = len(after) - len(ANEW)
    assert f"  loaded: {kept}\n" in table
    assert "  shape differs: 4\n" in table
    for name in ("norm.weight (24,), wanted (32,)", "cross_attention.key.weight (32, 24), wanted (32, 32)"):
        assert name in table
    pixels = torch.randn(1, 3, 32, 32)
    ids = torch.tensor([vlm.joiner().read_ids("what is it")])
    assert torch.isfinite(swapped.soft_prompts(pixels, ids)).all()
    swapped.save(tmp_path / "again")
    again = loading.load(tmp_path / "again", report=told.append)
    assert "made: nothing" in told[1]  # it is the adapter's own encoder now
    assert torch.equal(again.soft_prompts(pixels, ids), swapped.soft_prompts(pixels, ids))


def test_a_swap_is_the_same_every_time(adapter: tuple[VLM, Path]) -> None:
    first, second = (
        loading.load(adapter[1], vision=Spectrogram(), strict=False, report=str).connector for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_swap_is_asked_for_and_told(adapter: tuple[VLM, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"of width 24, and 'callable:Spectrogram' is 17 wide; .* with strict=False"):
        loading.load(adapter[1], vision=Spectrogram())
    loading.load(adapter[1], vision=Spectrogram(), strict=False)
    said = capsys.readouterr()
    assert "shape differs: 4" in said.err
    assert said.out == ""


def test_another_encoder_of_the_same_width_is_told_too(
    adapter: tuple[VLM, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tiny_vision(tmp_path / "other", seed=1))
    loading.load(adapter[1], vision=other)
    assert f"was trained on '{adapter[0].settings.vision.name}' and now reads '{other}'" in capsys.readouterr().err


def test_a_damaged_adapter_is_not_taken_for_one_of_another_encoder(adapter: tuple[VLM, Path]) -> None:
    file = adapter[1] / "adapter.safetensors"
    tensors = weights.load_tensors(file)
    tensors["norm.weight"] = torch.zeros(17)
    weights.save_tensors(file, tensors)
    with pytest.raises(ConfigError, match=r"do not fit.*norm\.weight \(found \(17,\), wanted \(24,\)\)"):
        loading.load(adapter[1], vision=Spectrogram(), strict=False)
